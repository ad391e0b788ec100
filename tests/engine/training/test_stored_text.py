"""Training on stored prompts, without text encoders: the same losses to the bit, or one line."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from cdpo.engine.shards.manifest import PromptFile, load_manifest, save_manifest
from diffusers import StableDiffusionPipeline
from launching import ForkServer, World, losses, make_world, metrics
from part_changes import CHANGES
from safetensors.torch import load_file, save
from shard_server import serving
from transformers import CLIPTextModel

STORED = "data.text=stored"
# Half of the captions are dropped, a guided picture is drawn, and validation prompts are scored.
ASKED = (
    *("train.caption_dropout=0.5", "train.sample_every=6", "train.precision=bf16"),
    *("evaluate.every=6", "evaluate.images=1", "evaluate.prompts=1"),
)


@pytest.fixture(scope="module")
def world_of(
    tmp_path_factory: pytest.TempPathFactory, server: ForkServer
) -> Callable[[str], World]:
    """The world of a family, whose shards are made without prompts and have them added."""

    @cache
    def make(family: str) -> World:
        folder, asked = tmp_path_factory.mktemp(family) / "world", {"count": 1}
        world = make_world(folder, server, backbone=family, prompts__validation=asked)
        before = {path: path.read_bytes() for path in world.shards.glob("*.tar")}
        manifest = (world.shards / "manifest.json").read_bytes()
        assert b'"text"' not in manifest.replace(b'"text": "', b"")
        server.run("prepare", world.recipe, [STORED, *ASKED]).succeeded()
        assert {path: path.read_bytes() for path in world.shards.glob("*.tar")} == before
        assert "nothing to do" in server.run("prepare", world.recipe, [STORED, *ASKED]).text
        return world

    return make


def without_encoders(world: World, family: str, folder: Path) -> Path:
    """A copy of the model that lacks the weights of its text encoders."""
    shutil.copytree(world.folder / family, folder)
    for encoder in folder.glob("text_encoder*"):
        for weights in [*encoder.glob("*.safetensors"), *encoder.glob("*.bin")]:
            weights.unlink()
    return folder


LONG = ("sdxl", "flux", "flux2", "sana", "qwen_image", "qwen_image21", "lcm", "sd3", "z_image")


@pytest.mark.parametrize("family", ["sd", *(pytest.param(f, marks=pytest.mark.long) for f in LONG)])
def test_losses_are_those_of_a_live_run_and_no_encoder_is_read(
    world_of: Callable[[str], World], tmp_path: Path, family: str
) -> None:
    world, live, stored = world_of(family), tmp_path / "live", tmp_path / "stored"
    world.train(live, *ASKED).succeeded()
    model = f"model.path={without_encoders(world, family, tmp_path / 'model')}"
    world.train(stored, *ASKED, STORED, model).succeeded()
    assert losses(stored) == losses(live)
    picture = "samples/step-00000006.png"
    assert (stored / picture).read_bytes() == (live / picture).read_bytes()
    rows = [(run / "evaluations.jsonl").read_text().splitlines() for run in (live, stored)]
    assert [row.partition('"seconds"')[0] for row in rows[0]] == [
        row.partition('"seconds"')[0] for row in rows[1]
    ]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_merged_pipeline_lacks_encoders_that_are_not_there_and_the_run_says_so(
    world_of: Callable[[str], World], tmp_path: Path, kind: str
) -> None:
    world, path = world_of("sd"), tmp_path / "model"
    model = f"model.path={without_encoders(world, 'sd', path)}"
    knobs = (
        STORED,
        *ASKED[2:3],
        "train.steps=1",
        f"adapter.type={kind}",
        "export.formats=[merged]",
    )
    outcome = world.train(tmp_path / "run", *knobs, model).succeeded()
    [told] = [line for line in outcome.text.splitlines() if line.startswith("  merged ")]
    assert "without text_encoder" in told and str(path) in told
    own = CLIPTextModel.from_pretrained(world.folder / "sd" / "text_encoder")
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "merged", text_encoder=own)
    assert merged.encode_prompt("a rocket", "cpu", 1, False)[0].isfinite().all()
    whole = world.train(tmp_path / "whole", *knobs).succeeded()
    assert not any(line.startswith("  merged ") for line in whole.text.splitlines())


@pytest.mark.long
def test_encoders_under_zero_3_are_those_of_prepare(tmp_path: Path, server: ForkServer) -> None:
    """With biases as they are when trained, which DeepSpeed's linear layers round on their own."""
    recipe = tiny.build(tmp_path)
    encoder = CLIPTextModel.from_pretrained(tmp_path / "sd" / "text_encoder")
    for name, weight in encoder.named_parameters():
        if name.endswith("bias"):
            weight.data.uniform_(-0.5, 0.5)
    encoder.save_pretrained(tmp_path / "sd" / "text_encoder")
    world = World(tmp_path, tiny.write_recipe(tmp_path / "recipe.yaml", recipe), server)
    bf16 = ("train.precision=bf16", "train.steps=2")
    server.run("prepare", world.recipe, [STORED, *bf16]).succeeded()
    ways = {"live": (), "stored": (STORED,)}
    for run, how in ways.items():
        world.train(tmp_path / run, *bf16, *how, zero=3).succeeded()
    assert losses(tmp_path / "live") == losses(tmp_path / "stored")


@pytest.mark.long
def test_a_run_goes_on_whichever_way_its_prompts_come(
    world_of: Callable[[str], World], tmp_path: Path
) -> None:
    world, ways = world_of("sd"), {"one": ((), (STORED,)), "other": ((STORED,), ())}
    for run, (first, then) in ways.items():
        world.train(tmp_path / run, *ASKED[:3:2], "train.steps=3", *first).succeeded()
        world.train(tmp_path / run, *ASKED[:3:2], *then).succeeded()
    world.train(tmp_path / "whole", *ASKED[:3:2]).succeeded()
    for run in ways:
        assert losses(tmp_path / run) == losses(tmp_path / "whole")


def test_what_does_not_fit_is_refused(world_of: Callable[[str], World], tmp_path: Path) -> None:
    world, run = world_of("sd"), tmp_path / "run"
    world.train(run, STORED, *ASKED, "train.precision=fp32").refused(3, "train.precision", "bf16")
    unknown = "train.sample_prompts=4"
    world.train(run, STORED, *ASKED, unknown).refused(3, "data.text=stored", "prepare")

    model = tmp_path / "model"
    shutil.copytree(world.folder / "sd", model)
    part, change = CHANGES["text encoder"]
    assert part == "text"
    change(model)
    other = f"model.path={model}"
    world.train(run, STORED, *ASKED, other).refused(3, "text encoder", str(model))

    shards = tmp_path / "shards"
    shutil.copytree(world.shards, shards)
    there = f"data.path={shards}"
    [path], [whole] = (folder.glob("*.safetensors") for folder in (shards, world.shards))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    world.train(run, STORED, *ASKED, there).refused(3, path.name, "sha256")
    path.unlink()
    world.train(run, STORED, *ASKED, there).refused(3, path.name, "missing")
    manifest = load_manifest(shards)
    assert manifest.text is not None
    narrow = {name: x[..., 1:].contiguous() for name, x in load_file(whole).items()}
    path.write_bytes(save(narrow))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    entry = PromptFile(name=path.name, bytes=path.stat().st_size, sha256=digest)
    text = manifest.text.model_copy(update={"files": (entry,)})
    save_manifest(shards, manifest.model_copy(update={"text": text}))
    world.train(run, STORED, *ASKED, there).refused(3, path.name, "remove the file")
    save_manifest(shards, manifest.model_copy(update={"text": None}))
    world.train(run, STORED, *ASKED, there).refused(3, "no prompts are stored", str(shards))


@pytest.mark.long
def test_shards_and_prompts_behind_a_url_give_the_same_losses(
    world_of: Callable[[str], World], tmp_path: Path
) -> None:
    world = world_of("sd")
    asked = (STORED, "train.precision=bf16", "train.steps=2")
    world.train(tmp_path / "near", *asked).succeeded()
    [prompts] = world.shards.glob("*.safetensors")
    with serving(world.shards) as web:
        web.faults[prompts.name] = ["corrupt"]
        there = (f"data.path={web.url}", f"data.cache={tmp_path / 'cache'}")
        world.train(tmp_path / "far", *asked, *there).succeeded()
        assert web.count(prompts.name) == 2
    assert losses(tmp_path / "far") == losses(tmp_path / "near")


@pytest.mark.slow
@pytest.mark.long
def test_prompts_that_two_ranks_store_are_those_of_one(
    world_of: Callable[[str], World], tmp_path: Path, server: ForkServer
) -> None:
    world, run = world_of("sd"), tmp_path / "prepared"
    both = [f"run_dir={run}", STORED, *ASKED]
    server.run("prepare", world.recipe, both, ranks=2).succeeded()
    ours, one = (
        {name: x for path in at.glob("*.safetensors") for name, x in load_file(path).items()}
        for at in (run / "shards", world.shards)
    )
    assert ours.keys() == one.keys()
    assert all(torch.equal(ours[name], one[name]) for name in one)
    # Damaged, they are stored again; the shards stay.
    path = next((run / "shards").glob("*.safetensors"))
    before, content = (run / "shards" / "tier-1-000000.tar").stat(), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "embedded again" in server.run("prepare", world.recipe, both, ranks=2).succeeded().text
    assert path.read_bytes() == content
    assert (run / "shards" / "tier-1-000000.tar").stat() == before

    there = f"data.path={run / 'shards'}"
    world.train(tmp_path / "both", STORED, *ASKED, there, ranks=2).succeeded()
    world.train(tmp_path / "live", *ASKED, there, ranks=2).succeeded()
    assert losses(tmp_path / "both") == losses(tmp_path / "live")


@pytest.mark.long
def test_the_frozen_cache_is_filled_with_stored_prompts(
    world_of: Callable[[str], World], tmp_path: Path, server: ForkServer
) -> None:
    world = world_of("sd")
    model = f"model.path={without_encoders(world, 'sd', tmp_path / 'model')}"
    knobs = (STORED, *ASKED, "speed.frozen_cache=1", f"speed.frozen_cache_at={tmp_path / 'kept'}")
    where = (f"run_dir={tmp_path / 'run'}", f"data.path={world.shards}", model)
    outcome = server.run("cache", world.recipe, [*where, *knobs]).succeeded()
    assert "draws of pairs asked for" in outcome.text
    world.train(tmp_path / "run", *knobs, model).succeeded()
    assert metrics(tmp_path / "run")[-1]["cached"] == 1
