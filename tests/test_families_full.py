"""All of the denoiser trained in every model family, on two ranks under each ZeRO stage."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from launching import ForkServer, World, losses
from safetensors.torch import load_file
from stock import assert_draws_what_the_trainer_drew, stock_pipeline
from torch import Tensor

KILLED = -9
FULL = ("adapter.type=full", "export.formats=[merged]", "train.optimizer.lr=3e-4")
LORA = ("adapter.targets=lcm", "train.optimizer.lr=1e-2")


@dataclass(frozen=True)
class Family:
    """A world of one family, the objective it trains on here, and its stock classes.

    Rounding enters the loss multiplied by beta, and through the bend of the pseudo-Huber distance
    divided by its c: published values of either would tell apart the stages by more than the tests
    allow.
    """

    world: World
    objective: tuple[str, ...]
    pipeline: type[DiffusionPipeline]
    scheduler: type = DDIMScheduler

    def train(self, run: Path, *more: str, zero: int, failpoint: str = "") -> list[int]:
        """On two ranks."""
        knobs = (*self.objective, "train.optimizer.eps=1e-5", *more)
        done = self.world.train(run, *knobs, ranks=2, zero=zero, failpoint=failpoint)
        assert failpoint or done.codes == [0, 0], done.text
        return done.codes


def make_world(folder: Path, server: ForkServer, name: str) -> World:
    recipe = tiny.build(folder, name.removesuffix("_v"))
    if name == "sd_v":  # as Stable Diffusion 2 with zero terminal SNR
        DDIMScheduler(
            beta_schedule="scaled_linear",
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        ).save_pretrained(folder / "sd" / "scheduler")
    # Divides all but the smallest parameters for good.
    zero3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1000}}
    (folder / "zero3.json").write_text(json.dumps(zero3))
    path = tiny.write_recipe(folder / "recipe.yaml", recipe)
    server.run("prepare", path, ranks=2).succeeded()
    return World(folder, path, server)


@pytest.fixture(scope="module")
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, server: ForkServer
) -> Family:
    world = make_world(tmp_path_factory.mktemp(request.param), server, request.param)
    if request.param == "lcm":
        gentle = ("objective.beta=20", "objective.huber_c=0.1")
        return Family(world, gentle, StableDiffusionPipeline, LCMScheduler)
    xl = request.param == "sdxl"
    pipeline = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    return Family(world, ("objective.beta=500",), pipeline)


def unet(run: Path) -> dict[str, Tensor]:
    return load_file(run / "merged" / "unet" / "diffusion_pytorch_model.safetensors")


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"),
    [("sd_v", "lora"), ("sd_v", "merged"), ("sdxl", "merged"), ("lcm", "merged")],
    indirect=["family"],
)
def test_from_prompts_to_a_report_and_a_stock_pipeline(
    family: Family, kind: str, tmp_path: Path
) -> None:
    world, run = family.world, tmp_path / "run"
    knobs = FULL if kind == "merged" else LORA
    family.train(run, *knobs, "train.steps=20", "train.sample_every=20", zero=2)
    assert len(set(losses(run))) > 15  # it learns, and each step meets other pairs and noise

    stock = stock_pipeline(world.folder / "sd", run, kind)
    assert (type(stock), type(stock.scheduler)) == (family.pipeline, family.scheduler)
    assert_draws_what_the_trainer_drew(world.folder / "sd", run, kind, step=20)

    overrides = [f"run_dir={run}", f"data.path={world.shards}", *knobs]
    world.server.run("compare", world.recipe, overrides, ranks=2).succeeded()
    results = json.loads((run / "compare" / "results.json").read_text())
    for prompt_set in results["prompt_sets"]:
        for scorer in prompt_set["scorers"]:
            assert scorer["base_scores"] != scorer["tuned_scores"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "lcm"], indirect=True)
def test_one_curve_and_exact_resume_under_each_stage(family: Family, tmp_path: Path) -> None:
    """Stages 1 and 2 add the same numbers in the same order: they agree to the last bit."""
    short = (*FULL, "train.steps=3", "train.sample_every=0")
    whole = {zero: tmp_path / f"whole{zero}" for zero in (2, 3)}
    for zero, run in whole.items():
        family.train(run, *short, zero=zero)
    assert losses(whole[3]) == pytest.approx(losses(whole[2]), abs=1e-5)
    assert 0 < distance(unet(whole[3]), unet(whole[2])) < 1e-5

    for zero, run in {1: whole[2], 2: whole[2], 3: whole[3]}.items():
        killed = tmp_path / f"killed{zero}"
        codes = family.train(killed, *short, zero=zero, failpoint="train.loss@3:kill/rank1")
        assert KILLED in codes
        family.train(killed, *short, zero=zero)
        assert losses(killed) == losses(run)
        assert distance(unet(killed), unet(run)) == 0
