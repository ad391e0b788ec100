"""What decides a result is known by its content: each part, whatever its files, and from files that
have not changed without reading them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from cdpo.engine.models import (
    fingerprint_store,
    known_fingerprints,
    latent_diffusion,
    load_backbone,
)
from cdpo.engine.models.fingerprints import changed_parts
from cdpo.engine.recipe import Model, Recipe
from part_changes import CHANGES

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_world: Path, tmp_path: Path) -> Path:
    """A Stable Diffusion of the test's own."""
    return Path(shutil.copytree(tiny_world / "sd", tmp_path / "sd"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is hashed, in a place where files count as settled at once."""
    found: list[object] = []
    real = latent_diffusion.fingerprints_of
    monkeypatch.setattr(
        latent_diffusion, "fingerprints_of", lambda pipe: (found.append(pipe), real(pipe))[1]
    )
    monkeypatch.setattr(fingerprint_store, "SETTLED", 0)
    return found


def spec(folder: Path, **changes: str) -> Model:
    return Model(path=str(folder), resolution=(16, 16), **changes)


def parts(folder: Path, precision: str = "fp32", **changes: str) -> dict[str, str]:
    return load_backbone(spec(folder, **changes), CPU, precision).fingerprints()


def test_each_part_is_noticed_alone_and_none_by_its_place(folder: Path, tmp_path: Path) -> None:
    before = parts(folder)
    assert set(before) == {part for part, _ in CHANGES.values()}
    for what, (part, change) in CHANGES.items():
        own = Path(shutil.copytree(folder, tmp_path / what))
        assert parts(own) == before if what == "unet" else True
        change(own)
        assert changed_parts(before, parts(own)) == [part], what


def test_the_second_start_computes_nothing(folder: Path, computed: list[object]) -> None:
    first = parts(folder)
    assert len(computed) == 1
    assert parts(folder) == known_fingerprints(spec(folder)) == first
    assert len(computed) == 1
    # Another precision has other values, and another VAE is another file.
    assert known_fingerprints(spec(folder), "bf16") is None
    assert known_fingerprints(spec(folder, vae=str(folder / "vae"))) is None
    assert changed_parts(first, parts(folder, vae=str(folder / "vae"))) == []


@pytest.mark.parametrize("part", ["unet", "betas"])
def test_a_file_that_changes_is_read_again(folder: Path, computed: list[object], part: str) -> None:
    """Though it keeps its size, and its time is set back."""
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    times = path.stat()
    before = parts(folder)
    CHANGES[part][1](folder)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert known_fingerprints(spec(folder)) is None
    assert changed_parts(before, parts(folder)) == [CHANGES[part][0]]
    assert len(computed) == 2


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    folder: Path, computed: list[object]
) -> None:
    backbone = load_backbone(spec(folder), CPU)
    CHANGES["vae"][1](folder)
    backbone.fingerprints()
    assert known_fingerprints(spec(folder)) is None


def test_young_files_are_not_remembered(
    folder: Path, computed: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within one tick of the clock a file may change and keep its times."""
    monkeypatch.setattr(fingerprint_store, "SETTLED", 3600)
    parts(folder)
    assert known_fingerprints(spec(folder)) is None


@pytest.mark.parametrize("spoil", ["a file", "damage"])
def test_a_store_that_does_not_work_costs_the_time_alone(
    folder: Path, computed: list[object], tmp_path: Path, monkeypatch, spoil: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "store"))
    if spoil == "a file":
        (tmp_path / "store").write_text("no folder")
    before = parts(folder)
    for path in tmp_path.glob("store/cdpo/fingerprints/*"):
        path.write_text('{"model": ')
    assert parts(folder) == before and len(computed) == 2


@pytest.fixture(scope="module")
def lcm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lcm")
    tiny.build(folder, "lcm")
    return folder


def test_a_teacher_is_a_part_once_it_is_loaded(lcm: Path, monkeypatch) -> None:
    monkeypatch.setattr(fingerprint_store, "SETTLED", 0)
    model = Model(
        backbone="lcm", path=str(lcm / "lcm"), unet=str(lcm / "lcm_unet"), resolution=(16, 16)
    )
    load: Callable[[], latent_diffusion.LatentDiffusion] = lambda: load_backbone(model, CPU)  # noqa: E731
    backbone = load()
    assert "teacher" not in backbone.fingerprints()
    backbone.load_teacher()
    before = backbone.fingerprints()
    assert {"teacher", "teacher_config"} < set(before)
    CHANGES["unet"][1](lcm / "lcm")  # the LCM has a UNet of its own
    again = load()
    again.load_teacher()
    assert changed_parts(before, again.fingerprints()) == ["teacher"]


TEMPLATE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"


@pytest.mark.parametrize(
    ("family", "file", "decides"),
    [
        ("flux2", f"tokenizer/{TEMPLATE}", True),
        ("flux2", f"tokenizer/{SETTINGS}", True),  # padding is told as well
        ("z_image", f"tokenizer/{TEMPLATE}", True),
        ("qwen_image21", f"processor/{TEMPLATE}", True),  # tells where a prompt begins
        ("qwen_image", f"tokenizer/{TEMPLATE}", False),  # whose pipeline has its own
        ("sana", f"tokenizer/{TEMPLATE}", False),
    ],
)
def test_a_chats_template_counts_where_it_decides_embeddings(
    recipe_of: Callable[..., Recipe], tmp_path: Path, family: str, file: str, decides: bool
) -> None:
    model = recipe_of(family).model
    own = Path(shutil.copytree(model.path, tmp_path / "own"))
    path = own / file
    if path.name == TEMPLATE:
        path.write_text("Hello! " + (path.read_text() if path.exists() else ""))
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    before, now = (
        load_backbone(model.model_copy(update={"path": str(place)}), CPU)
        for place in (model.path, own)
    )
    one, other = (backbone.encode_prompts(["a red cube"]).text for backbone in (before, now))
    assert torch.equal(one, other) is not decides
    changed = changed_parts(before.fingerprints(), now.fingerprints())
    assert changed == (["text"] if decides else [])


def test_how_a_pipeline_itself_says_that_it_draws_is_noticed(
    recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    model = recipe_of("qwen_image21").model
    own = Path(shutil.copytree(model.path, tmp_path / "own"))
    index = own / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"sample_sigmas": [1.0, 0.7, 0.2]}))
    before, now = (
        load_backbone(model.model_copy(update={"path": str(place)}), CPU).fingerprints()
        for place in (model.path, own)
    )
    assert changed_parts(before, now) == ["sampler"]
