"""Every model family through the three verbs, and what only some of them are told."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
from cdpo.engine.recipe.family import FAMILIES
from cdpo.engine.shards.manifest import load_manifest, save_manifest
from cdpo.engine.shards.reader import ShardReaders
from cdpo.engine.shards.sample import PairMeta
from cdpo.engine.shards.writer import write_shard
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    Flux2Pipeline,
    FluxPipeline,
    LCMScheduler,
    QwenImage21Pipeline,
    QwenImagePipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
)
from launching import KILLED, ForkServer, Outcome, World, losses, zero_config
from stock import assert_draws, denoiser_weights, distance, exported_unet, stock_pipeline

LOG_2 = math.log(2)
FLOW = {
    "sd3": StableDiffusion3Pipeline,
    "flux": FluxPipeline,
    "flux2": Flux2Pipeline,
    "sana": SanaPipeline,
    "qwen_image": QwenImagePipeline,
    "qwen_image21": QwenImage21Pipeline,
    "z_image": ZImagePipeline,
}
# Learning rates at which ten steps of a tiny model show in its images.
KNOBS = {
    "merged": ("adapter.type=full", "export.formats=[merged]", "train.optimizer.lr=1e-3"),
    "lora": ("adapter.targets=lcm", "train.optimizer.lr=2e-2"),
}


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

    @property
    def base(self) -> Path:
        """The folder of the model that is trained, as a pipeline's."""
        return next(p for p in map(self.world.folder.joinpath, tiny.PIPELINES) if p.is_dir())

    @property
    def changes(self) -> dict[str, Any]:
        """Of the base's pipeline: an LCM is a denoiser for another model's."""
        denoiser = self.world.folder / "lcm_unet"
        return {"unet": UNet2DConditionModel.from_pretrained(denoiser)} if denoiser.exists() else {}

    def train(self, run: Path, *more: str, ranks: int = 2, **options: Any) -> Outcome:
        return self.world.train(run, *self.objective, *more, ranks=ranks, **options)


def make_family(folder: Path, server: ForkServer, name: str) -> Family:
    recipe = tiny.build(folder, name.removesuffix("_v"))
    if name == "sd_v":  # as Stable Diffusion 2 with zero terminal SNR
        DDIMScheduler(
            beta_schedule="scaled_linear",
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        ).save_pretrained(folder / "sd" / "scheduler")
    path = tiny.write_recipe(folder / "recipe.yaml", recipe)
    server.run("prepare", path, ranks=2).succeeded()
    world = World(folder, path, server)
    if name == "lcm":
        gentle = ("objective.beta=20", "objective.huber_c=0.1")
        return Family(world, gentle, StableDiffusionPipeline, LCMScheduler)
    if name in FLOW:
        scheduler = getattr(diffusers, FAMILIES[name].schedulers[0])
        return Family(world, ("objective.beta=100",), FLOW[name], scheduler)
    pipeline = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
    return Family(world, ("objective.beta=500",), pipeline)


@pytest.fixture(scope="module")
def family_of(
    tmp_path_factory: pytest.TempPathFactory, server: ForkServer
) -> Callable[[str], Family]:
    """A family by name; its shards are made by two ranks when it is first asked for."""
    return functools.cache(
        lambda name: make_family(tmp_path_factory.mktemp(name), server, name)  # type: ignore[arg-type]
    )


def long(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sd_v", "merged"),
        ("sdxl", "lora"),
        ("lcm", "merged"),
        long("sd3", "lora"),
        long("sd3", "merged"),
        long("flux", "lora"),
        long("flux", "merged"),
        long("flux2", "lora"),
        long("flux2", "merged"),
        long("sana", "lora"),
        long("sana", "merged"),
        long("qwen_image", "lora"),
        long("qwen_image", "merged"),
        long("qwen_image21", "lora"),
        long("qwen_image21", "merged"),
        long("z_image", "lora"),
        long("z_image", "merged"),
        long("lcm", "lora"),
        long("sd_v", "lora"),
        long("sdxl", "merged"),
    ],
)
def test_from_prompts_to_a_report_and_a_stock_pipeline(
    family_of: Callable[[str], Family], tmp_path: Path, name: str, kind: str
) -> None:
    family, run = family_of(name), tmp_path / "run"
    world, knobs = family.world, KNOBS[kind]
    more = ("train.steps=10", "train.sample_every=10", "train.caption_dropout=0.2")
    family.train(run, *knobs, *more, ranks=1).succeeded()  # on two: below
    found = losses(run)
    assert found[0] == pytest.approx(LOG_2, abs=1e-6)
    assert all(map(math.isfinite, found))
    assert len(set(found)) > 8  # it learns, and each step meets other pairs and noise

    if kind == "merged":
        own = family.changes.get("unet")
        base = denoiser_weights(family.base) if own is None else own.state_dict()
        assert exported_unet(run).keys() == base.keys()
    stock = stock_pipeline(family.base, run, kind, **family.changes)
    if (name, kind) != ("lcm", "merged"):  # it alone brings its sampler; of others users choose it
        stock.scheduler = family.scheduler.from_config(stock.scheduler.config)
    assert (type(stock), type(stock.scheduler)) == (family.pipeline, family.scheduler)
    assert_draws(stock, run, step=10)

    overrides = [f"run_dir={run}", f"data.path={world.shards}", *knobs]
    world.server.run("compare", world.recipe, overrides).succeeded()
    results = json.loads((run / "compare" / "results.json").read_text())
    assert len(results["prompt_sets"]) == 2  # training and held-out prompts
    for prompt_set in results["prompt_sets"]:
        for scorer in prompt_set["scorers"]:
            assert scorer["base_scores"] != scorer["tuned_scores"]
    report = (run / "compare" / "report.html").read_text()
    assert len(report) > 10_000
    assert "http://" not in report.replace("http://www.w3.org", "")  # nothing is fetched


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "zero"),
    [
        ("sdxl", 3),
        ("lcm", 1),
        long("sdxl", 1),
        long("lcm", 3),
        long("sd3", 1),
        long("sd3", 2),
        long("sd3", 3),
        long("flux", 2),
        long("flux", 3),
        long("flux2", 1),
        long("flux2", 3),
        long("sana", 1),
        long("sana", 3),
        long("qwen_image", 3),
        long("qwen_image21", 2),
        long("qwen_image21", 3),
        long("z_image", 2),
    ],
)
def test_killed_on_two_ranks_the_curve_is_that_of_one(
    family_of: Callable[[str], Family], tmp_path: Path, name: str, zero: int
) -> None:
    family = family_of(name)
    # As CALM in launching.py: rounding enters the loss multiplied by beta.
    calm = ("train.optimizer.eps=1e-6", "train.steps=3", "objective.huber_c=0.001")
    alone, run = tmp_path / "alone", tmp_path / "run"
    family.train(alone, *calm, ranks=1).succeeded()
    killed = family.train(run, *calm, zero=zero, failpoint="train.loss@3:kill/rank1")
    assert KILLED in killed.codes
    family.train(run, *calm, zero=zero).succeeded()
    assert losses(run) == pytest.approx(losses(alone), abs=1e-5)
    assert max(abs(loss - LOG_2) for loss in losses(run)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [
        (),
        long(("objective.target=image", "objective.loser_safeguard=0.5")),
    ],
    ids=["teacher", "image"],
)
def test_a_killed_consistency_run_goes_on_to_the_last_bit(
    family_of: Callable[[str], Family], tmp_path: Path, knobs: tuple[str, ...]
) -> None:
    world, run = family_of("lcm").world, tmp_path / "killed"
    knobs = ("train.steps=3", *knobs)
    world.train(tmp_path / "whole", *knobs).succeeded()
    assert world.train(run, *knobs, failpoint="train.step@3:kill").code == KILLED
    world.train(run, *knobs).succeeded()
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    ["sdxl", "lcm", "sd3", "flux", "flux2", "sana", "qwen_image", "qwen_image21", "z_image"],
)
def test_all_of_the_denoiser_under_each_stage(
    family_of: Callable[[str], Family], tmp_path: Path, name: str
) -> None:
    """Stages 1 and 2 add the same numbers in the same order: they agree to the last bit."""
    family = family_of(name)
    # Divides all but the smallest parameters for good.
    divided = zero_config(tmp_path / "3.json", 3, stage3_param_persistence_threshold=1000)

    def train(run: Path, zero: int, **options: Any) -> Outcome:
        full = ("adapter.type=full", "export.formats=[merged]", "train.optimizer.lr=3e-4")
        knobs = (*full, "train.optimizer.eps=1e-5", "train.steps=3")
        of_three = [f"deepspeed={divided}"] if zero == 3 else []
        return family.train(run, *knobs, *of_three, zero=zero, **options)

    whole = {zero: tmp_path / f"whole{zero}" for zero in (2, 3)}
    for zero, run in whole.items():
        train(run, zero).succeeded()
    assert losses(whole[3]) == pytest.approx(losses(whole[2]), abs=1e-5)
    assert distance(exported_unet(whole[3]), exported_unet(whole[2])) < 1e-5

    for zero, run in {1: whole[2], 2: whole[2], 3: whole[3]}.items():
        killed = tmp_path / f"killed{zero}"
        assert KILLED in train(killed, zero, failpoint="train.loss@3:kill/rank1").codes
        train(killed, zero).succeeded()
        assert losses(killed) == losses(run)
        assert distance(exported_unet(killed), exported_unet(run)) == 0


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
    family_of: Callable[[str], Family], world: World, tmp_path: Path
) -> None:
    """The shards say how large each image was: another size is another loss, from the second step
    on (the first is log 2 whatever is drawn)."""

    def curve(of: World, name: str, shards: Path) -> list[float]:
        run = tmp_path / name
        of.train(run, f"data.path={shards}", "train.steps=3").succeeded()
        return losses(run)

    xl_world = family_of("sdxl").world
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
