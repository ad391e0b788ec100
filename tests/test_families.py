"""Every model family through the three verbs, on two ranks, and what only some of them are told."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cdpo.engine.shards.manifest import load_manifest, save_manifest
from cdpo.engine.shards.reader import ShardReaders
from cdpo.engine.shards.sample import PairMeta
from cdpo.engine.shards.writer import write_shard
from diffusers import (
    DDIMScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from launching import ForkServer, World, losses, make_world

LOG_2 = math.log(2)


@pytest.fixture(scope="module")
def xl_world(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> World:
    """A tiny Stable Diffusion XL whose shards two ranks made."""
    folder = tmp_path_factory.mktemp("xl")
    return make_world(folder, server, backbone="sdxl", ranks=2)


@pytest.fixture(scope="module")
def lcm_world(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> World:
    """A tiny latent consistency model whose shards two ranks made."""
    return make_world(tmp_path_factory.mktemp("lcm"), server, backbone="lcm", ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["xl_world", "lcm_world"])
def test_from_prompts_to_report_on_two_ranks(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    of: World = request.getfixturevalue(family)
    run = tmp_path / "run"
    # A learning rate at which twenty steps of a tiny model show in its images.
    knobs = ("train.steps=20", "train.caption_dropout=0.2", "train.optimizer.lr=1e-2")
    of.train(run, *knobs, ranks=2, zero=2).succeeded()
    found = losses(run)
    assert len(found) == 20
    assert found[0] == pytest.approx(LOG_2, abs=1e-6)
    assert all(map(math.isfinite, found))
    assert len(set(found)) > 15  # it learns, and each step meets other pairs and noise

    overrides = [f"run_dir={run}", f"data.path={of.shards}"]
    of.server.run("compare", of.recipe, overrides, ranks=2).succeeded()
    results = json.loads((run / "compare" / "results.json").read_text())
    for prompt_set in results["prompt_sets"]:
        for scorer in prompt_set["scorers"]:
            assert scorer["base_scores"] != scorer["tuned_scores"]
    assert len(results["prompt_sets"]) == 2  # training and held-out prompts
    assert (run / "compare" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize(("family", "beta"), [("xl_world", 500), ("lcm_world", 20)])
def test_the_same_curve_under_every_zero_stage(
    family: str, beta: float, request: pytest.FixtureRequest, tmp_path: Path, zero: int
) -> None:
    of: World = request.getfixturevalue(family)
    # As in tests/engine/test_trainer.py: rounding enters the loss multiplied by beta.
    calm = (f"objective.beta={beta}", "train.optimizer.eps=1e-6")
    of.train(tmp_path / "other", *calm, ranks=2, zero=zero).succeeded()
    of.train(tmp_path / "run", *calm).succeeded()
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "run"), abs=1e-5)


@pytest.mark.slow
def test_the_sdxl_adapter_is_one_that_users_load(xl_world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    xl_world.train(run, "train.steps=4", "train.optimizer.lr=1e-2").succeeded()
    pipeline = StableDiffusionXLPipeline.from_pretrained(xl_world.folder / "sdxl")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        size = {"height": 16, "width": 16}
        return pipeline("tree", latents=start, num_inference_steps=2, **size, output_type="pt")[0]

    base = draw()
    pipeline.load_lora_weights(run / "lora")
    assert not torch.equal(draw(), base)


@pytest.mark.slow
def test_a_killed_consistency_run_goes_on_to_the_last_bit(lcm_world: World, tmp_path: Path) -> None:
    lcm_world.train(tmp_path / "whole").succeeded()
    killed = lcm_world.train(tmp_path / "killed", failpoint="train.step@4:kill")
    assert killed.code != 0
    lcm_world.train(tmp_path / "killed").succeeded()
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_the_consistency_adapter_is_one_that_users_load(lcm_world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    lcm_world.train(run, "train.steps=4", "train.optimizer.lr=1e-2").succeeded()
    unet = UNet2DConditionModel.from_pretrained(lcm_world.folder / "lcm_unet")
    pipeline = StableDiffusionPipeline.from_pretrained(lcm_world.folder / "lcm", unet=unet)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        options = {"height": 16, "width": 16, "guidance_scale": 3.0, "output_type": "pt"}
        step_noise = torch.Generator().manual_seed(1)
        return pipeline(
            "tree", latents=start, num_inference_steps=2, generator=step_noise, **options
        )[0]

    base = draw()
    pipeline.load_lora_weights(run / "lora")
    assert not torch.equal(draw(), base)


def swapped(meta: PairMeta) -> PairMeta:
    winner, loser = meta.original_size
    return meta.model_copy(update={"original_size": (loser, winner)})


def resized(meta: PairMeta) -> PairMeta:
    return meta.model_copy(update={"original_size": ((300, 400), (64, 48))})


def rewrite(shards: Path, folder: Path, change: Callable[[PairMeta], PairMeta]) -> Path:
    """The same shards with other records."""
    manifest = load_manifest(shards)
    readers = ShardReaders(shards, manifest)
    shutil.copytree(shards, folder)
    entries = []
    for entry in manifest.shards:
        samples = [readers.read(entry, index) for index in range(entry.count)]
        changed = ((change(sample.meta), sample.images) for sample in samples)
        entries.append(write_shard(folder / entry.name, changed, manifest.contents))
    save_manifest(folder, manifest.model_copy(update={"shards": tuple(entries)}))
    return folder


@pytest.mark.slow
def test_original_sizes_of_winner_and_loser_reach_sdxl_and_nobody_else(
    xl_world: World, world: World, tmp_path: Path
) -> None:
    """The shards say how large each image was: another size is another loss, from the second step
    on (the first is log 2 whatever is drawn)."""

    def curve(of: World, name: str, shards: Path) -> list[float]:
        run = tmp_path / name
        of.train(run, f"data.path={shards}", "train.steps=3", "train.sample_every=0").succeeded()
        return losses(run)

    different = rewrite(xl_world.shards, tmp_path / "different", resized)
    exchanged = rewrite(different, tmp_path / "exchanged", swapped)
    curves = [
        curve(xl_world, "as-sampled", xl_world.shards),
        curve(xl_world, "a", different),
        curve(xl_world, "b", exchanged),
    ]
    assert [found[0] for found in curves] == pytest.approx([LOG_2] * 3, abs=1e-6)
    assert len({found[2] for found in curves}) == 3

    told = rewrite(world.shards, tmp_path / "told", resized)
    assert curve(world, "sd", world.shards) == curve(world, "sd-told", told)
