"""Copies of a base: byte for byte what its users know, whatever the libraries here would write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cdpo.engine.models.base_files import copy_base, left_out
from cdpo.engine.recipe import Model
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler, PNDMScheduler
from huggingface_hub import constants
from safetensors.torch import load_file

DDIM = DDIMScheduler()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As folders on the hub: another scheduler than ours, weights twice, and things besides."""
    folder = tmp_path_factory.mktemp("base") / "sd"
    tiny.pipeline().save_pretrained(folder)
    PNDMScheduler(skip_prk_steps=True, steps_offset=1).save_pretrained(folder / "scheduler")
    edit_index(folder, scheduler=["diffusers", "PNDMScheduler"])
    (folder / "tokenizer" / "special_tokens_map.json").write_text('{"unk_token": "a"}')
    for part, stem in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        for other in (".fp16.safetensors", ".non_ema.bin", ".msgpack"):
            (folder / part / f"{stem}{other}").write_text(f"{part}{other}")
    return folder


def edit_index(folder: Path, **changes: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def copied(folder: Path, to: Path, scheduler: Any = DDIM, **model: Any) -> dict[str, bytes]:
    copy_base(Model(path=str(folder), **model), to, scheduler)
    return {str(p.relative_to(to)): p.read_bytes() for p in to.rglob("*") if p.is_file()}


def test_all_but_the_denoisers_weights_is_the_same_to_the_byte(base: Path, tmp_path: Path) -> None:
    found = copied(base, tmp_path / "copy")
    assert {name: (base / name).read_bytes() for name in found} == found
    left_out = {str(p.relative_to(base)) for p in base.rglob("*") if p.is_file()} - set(found)
    others = (".fp16.safetensors", ".non_ema.bin", ".msgpack")
    assert left_out == {
        "unet/diffusion_pytorch_model.safetensors",
        *(f"vae/diffusion_pytorch_model{other}" for other in others),
        *(f"text_encoder/model{other}" for other in others),
    }


def test_weights_of_a_variant_are_found_without_naming_it(base: Path, tmp_path: Path) -> None:
    found = copied(base, tmp_path / "copy", variant="fp16")
    assert found["vae/diffusion_pytorch_model.safetensors"] == b"vae.fp16.safetensors"
    assert found["text_encoder/model.safetensors"] == b"text_encoder.fp16.safetensors"


def test_weights_in_several_files(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    for path in (folder / "vae").glob("*.*n*s"):  # all weights
        path.unlink()
    pipeline = tiny.pipeline()
    pipeline.vae.save_pretrained(folder / "vae", max_shard_size=2000, variant="fp16")
    assert (folder / "vae/diffusion_pytorch_model.safetensors.index.fp16.json").exists()
    copied(folder, tmp_path / "copy", variant="fp16")
    pipeline.unet.save_pretrained(tmp_path / "copy" / "unet")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "copy", text_encoder=None)
    for name, value in pipeline.vae.state_dict().items():
        assert torch.equal(loaded.vae.state_dict()[name], value)
    next((folder / "vae").glob("*-00002-of-*")).unlink()
    model = Model(path=str(folder), variant="fp16")
    assert left_out(model) == ["vae"]
    copied(folder, tmp_path / "less", variant="fp16")
    assert json.loads((tmp_path / "less" / "model_index.json").read_text())["vae"] == [None, None]


def test_a_hubs_cache_of_links_without_a_safety_checker(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cached, commit = tmp_path / "hub" / "models--me--tiny", "0" * 40
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    snapshot = cached / "snapshots" / commit
    for path in sorted(p for p in base.rglob("*") if p.is_file()):
        blob = cached / "blobs" / str(path.relative_to(base)).replace("/", "-")
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(base)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    index = json.loads((base / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["requires_safety_checker"] = True
    (snapshot / "model_index.json").unlink()
    (snapshot / "model_index.json").write_text(json.dumps(index))
    found = copied(Path("me/tiny"), tmp_path / "copy")
    assert not any(p.is_symlink() for p in (tmp_path / "copy").rglob("*"))
    assert (
        found["scheduler/scheduler_config.json"]
        == (base / "scheduler/scheduler_config.json").read_bytes()
    )
    kept = json.loads(found["model_index.json"])
    absent = {"safety_checker": [None, None], "requires_safety_checker": False}
    assert kept == index | absent


@pytest.mark.parametrize("whole", [False, True])
def test_the_recipes_own_parts_stand_in_for_the_bases(
    base: Path, tmp_path: Path, whole: bool
) -> None:
    other = tiny.pipeline(seed=5)
    other.vae.save_pretrained(tmp_path / "vae")
    other.unet.register_to_config(act_fn="gelu")
    (other if whole else other.unet).save_pretrained(tmp_path / "unet")
    parts = {"vae": str(tmp_path / "vae"), "unet": str(tmp_path / "unet")}
    found = copied(base, tmp_path / "copy", **parts)
    assert json.loads(found["unet/config.json"])["act_fn"] == "gelu"
    vae = "diffusion_pytorch_model.safetensors"
    kept, wanted = load_file(tmp_path / "copy/vae" / vae), load_file(tmp_path / "vae" / vae)
    assert all(torch.equal(kept[name], value) for name, value in wanted.items())


def test_a_diffusion_models_scheduler_gives_way_to_that_of_a_consistency_model(
    base: Path, tmp_path: Path
) -> None:
    """A UNet or LoRA has made a consistency model of it; one that was one keeps its own."""
    ours = LCMScheduler(original_inference_steps=40)
    found = copied(base, tmp_path / "made", ours)
    index = json.loads(found["model_index.json"])
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    assert json.loads(found["scheduler/scheduler_config.json"])["original_inference_steps"] == 40
    own = tmp_path / "own"
    shutil.copytree(base, own)
    LCMScheduler(original_inference_steps=30).save_pretrained(own / "scheduler")
    edit_index(own, scheduler=["diffusers", "LCMScheduler"])
    found = copied(own, tmp_path / "kept", ours)
    assert json.loads(found["scheduler/scheduler_config.json"])["original_inference_steps"] == 30
