"""Knobs of memory and speed through the trainer: losses, loss scaling, offload to host and disk."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from cdpo.engine.basics.errors import RecipeError
from cdpo.engine.recipe import Recipe
from cdpo.engine.training.trainer import SCALE_SEARCH
from deepspeed.ops.op_builder import AsyncIOBuilder
from launching import CALM, ROOT, Outcome, World, losses, metrics

LOG_2 = math.log(2)
CAPTURED = ROOT / "tests" / "workers" / "train_captured.py"
WATCHED = ROOT / "tests" / "workers" / "train_and_watch_rounding.py"
KNOBS = (
    "speed.channels_last=on",
    "speed.fused_kernels=on",
    "speed.activation_checkpointing=true",
    "speed.encoders=offload",
)


def test_checkpointing_and_offloaded_encoders_change_no_loss(
    world: World, plain: list[float], tmp_path: Path
) -> None:
    outcome = world.train(
        tmp_path / "run",
        *CALM,
        "speed.activation_checkpointing=true",
        "speed.encoders=offload",
        "speed.cuda_graph=auto",
    ).succeeded()
    assert losses(tmp_path / "run") == plain
    assert "attention sdpa, activation checkpointing, encoders offloaded" in outcome.text
    assert "none: there is no CUDA device" in outcome.text


@pytest.mark.parametrize("zero", [*(pytest.param(n, marks=pytest.mark.long) for n in (1, 2)), 3])
def test_all_eager_knobs_at_once_under_each_stage(
    world: World, plain: list[float], tmp_path: Path, zero: int
) -> None:
    world.train(
        tmp_path, *CALM, *KNOBS, "train.steps=4", "train.micro_batch=8", zero=zero
    ).succeeded()
    assert losses(tmp_path)[0] == pytest.approx(LOG_2, abs=1e-6)
    assert losses(tmp_path) == pytest.approx(plain[:4], abs=1e-4)


def test_prepare_and_compare_take_the_knobs(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    mine = [f"run_dir={run}", "train.steps=2", *KNOBS]
    for verb in ("prepare", "train", "compare"):
        world.server.run(verb, world.recipe, mine).succeeded()
    assert (run / "compare" / "report.html").exists()


def test_a_missing_attention_package_is_one_line(world: World, tmp_path: Path) -> None:
    world.train(tmp_path / "run", "speed.attention=flash").refused(2, "speed.attention=flash")


def test_compilation_is_refused_under_zero_3_before_a_model_is_looked_for(
    world: World, tmp_path: Path
) -> None:
    knobs = ("speed.compile=regional", f"model.path={tmp_path}")
    outcome = world.train(tmp_path / "run", *knobs, zero=3)
    outcome.refused(2, "speed.compile=regional", "zero_optimization.stage is 3")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("mode", "most"), [("regional", 40), ("full", 2)])
def test_all_is_compiled_in_the_first_step(
    world: World, tmp_path: Path, mode: str, most: int
) -> None:
    """Tiers, ranks and blocks that open, pictures and evaluations need no graphs of their own."""
    prompts = tmp_path / "validation.txt"
    prompts.write_text("a rocket\na green book\n")
    growing = ("adapter.rank=4", "adapter.rank_schedule=[1,2,4]", "adapter.opening=inside_out")
    drawing = (
        "train.sample_every=2",
        f"prompts.validation={prompts}",
        "evaluate.every=2",
        "evaluate.images=1",
        "evaluate.prompts=1",
    )
    outcome = world.train(
        tmp_path / "run", f"speed.compile={mode}", *growing, *drawing, script=CAPTURED
    ).succeeded()
    captured = [int(line.split()[1]) for line in outcome.text.splitlines() if "captured " in line]
    assert len(captured) == 7 and 2 <= captured[0] <= most
    assert set(captured) == {captured[0]}


# --------------------------------------------------------------------------------------------------
# Rounding


def places(outcome: Outcome, chosen: str) -> set[str]:
    """Where libraries were left that choice, by tests/workers/train_and_watch_rounding.py."""
    return set(re.findall(rf"^rounding (\w+) {chosen}$", outcome.text, re.MULTILINE))


FREE, FIXED = "True True", "False False"


def test_rounding_is_free_within_steps_alone_and_a_resume_may_fix_it(
    world: World, plain: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    mine = (*CALM, "train.steps=2", "train.sample_every=1")
    outcome = world.train(run, *mine, "speed.rounding=free", script=WATCHED).succeeded()
    assert places(outcome, FREE) == {"loss", "gradient"}
    assert places(outcome, FIXED) == {"picture", "end"}
    assert "as ever: there is no CUDA device" in outcome.text
    [manifest] = run.glob("checkpoints/step-*/MANIFEST.json")
    assert "rounding free" in json.loads(manifest.read_text())["speed"]
    again = world.train(run, *CALM, "train.steps=3", script=WATCHED).succeeded()
    assert places(again, FREE) == set() and "gradient" in places(again, FIXED)
    assert losses(run) == plain[:3]  # on a CPU nothing is timed


def test_rounding_is_as_before_when_a_step_fails(world: World, tmp_path: Path) -> None:
    outcome = world.train(
        tmp_path / "run", "speed.rounding=free", script=WATCHED, failpoint="train.loss:enospc"
    )
    assert set(outcome.codes) != {0}
    assert (places(outcome, FREE), places(outcome, FIXED)) == ({"loss"}, {"end"})


@pytest.mark.parametrize(
    "other",
    [("speed.frozen_cache=2",), ("adapter.type=full", "export.formats=[merged]")],
    ids=["kept", "full"],
)
def test_rounding_that_would_part_policy_and_reference_is_refused(
    tiny_recipe: Callable[..., Recipe], other: tuple[str, ...]
) -> None:
    with pytest.raises(RecipeError, match=r"speed\.rounding=free") as told:
        tiny_recipe("speed.rounding=free", *other)
    assert other[0] in str(told.value) and "\n" not in str(told.value)
    if "adapter.type=full" in other:  # without a reference there is nothing to part
        tiny_recipe("speed.rounding=free", *other, "objective.type=sft")


# --------------------------------------------------------------------------------------------------
# fp16


def config(tmp_path: Path, **fp16: object) -> str:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "fp16": fp16}))
    return f"deepspeed={path}"


@pytest.mark.parametrize("zero", [2, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 3))])
def test_fp16_finds_its_loss_scale_starts_at_log_2_and_trains(
    world: World, tmp_path: Path, zero: int
) -> None:
    world.train(tmp_path / "run", "train.precision=fp16", zero=zero).succeeded()
    found = losses(tmp_path / "run")
    assert found[0] == pytest.approx(LOG_2, abs=1e-6)
    assert all(math.isfinite(loss) and loss != found[0] for loss in found[1:])
    # At beta = 5000 gradients overflow under the first scales, 2**16 and below.
    skipped = [row["skipped"] for row in metrics(tmp_path / "run")]
    assert 0 < skipped[0] <= skipped[-1] < SCALE_SEARCH


@pytest.mark.parametrize("zero", [3, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2))])
def test_bf16_starts_at_log_2(world: World, tmp_path: Path, zero: int) -> None:
    """DeepSpeed's linear layers under ZeRO-3 round by the shape of what they are given."""
    world.train(tmp_path / "run", "train.precision=bf16", "train.steps=1", zero=zero).succeeded()
    assert losses(tmp_path / "run")[0] == pytest.approx(LOG_2, abs=1e-6)


def test_each_overflow_halves_the_loss_scale(world: World, tmp_path: Path) -> None:
    """Three powers of two more at the start are three skipped batches more; from 2**8 none is."""
    skipped = {}
    for power in (8, 14, 17):
        run = tmp_path / str(power)
        start = config(tmp_path, initial_scale_power=power, hysteresis=1)
        world.train(run, start, "train.precision=fp16", "train.steps=1").succeeded()
        [row] = metrics(run)
        assert row["loss"] == pytest.approx(LOG_2, abs=1e-6) and math.isfinite(row["grad_norm"])
        skipped[power] = row["skipped"]
    assert skipped[8] == 0 < skipped[14]
    assert skipped[17] == skipped[14] + 3


# --------------------------------------------------------------------------------------------------
# Offload


def shipped(name: str, tmp_path: Path) -> str:
    """A file of ds_configs/, its disk being a folder of this test."""
    text = (ROOT / "ds_configs" / name).read_text()
    path = tmp_path / name
    path.write_text(text.replace("/local_nvme", str(tmp_path)))
    return f"deepspeed={path}"


def test_an_optimiser_in_host_memory_computes_the_same_and_resumes(
    world: World, plain: list[float], tmp_path: Path
) -> None:
    run, offload = tmp_path / "run", shipped("zero2_offload.json", tmp_path)
    world.train(run, *CALM, offload, failpoint="train.step@5:kill")
    assert len(metrics(run)) == 4
    world.train(run, *CALM, offload).succeeded()
    assert losses(run) == plain


@pytest.mark.slow
def test_weights_and_optimiser_in_host_memory_compute_the_same_on_two_ranks_and_resume(
    world: World, plain: list[float], tmp_path: Path
) -> None:
    run, offload = tmp_path / "run", shipped("zero3_offload.json", tmp_path)
    knobs = (*CALM, offload, "train.steps=3", "checkpoint.every=1")
    world.train(run, *knobs, ranks=2, failpoint="train.step@2:kill")
    assert len(metrics(run)) == 1
    world.train(run, *knobs, ranks=2).succeeded()
    assert losses(run) == pytest.approx(plain[:3], abs=1e-5)


needs_aio = pytest.mark.skipif(
    not AsyncIOBuilder().is_compatible(verbose=False), reason="needs libaio and its headers"
)


@pytest.mark.slow
@pytest.mark.timeout(900)  # DeepSpeed compiles its reader at first use
@needs_aio
def test_weights_on_a_disk_compute_the_same_and_resume(
    world: World, plain: list[float], tmp_path: Path
) -> None:
    run, offload = tmp_path / "run", shipped("zero3_nvme.json", tmp_path)
    world.train(run, *CALM, offload, failpoint="train.step@5:kill", seconds=800)
    assert len(metrics(run)) == 4
    world.train(run, *CALM, offload).succeeded()
    assert losses(run) == pytest.approx(plain, abs=1e-5)


@pytest.mark.skipif(AsyncIOBuilder().is_compatible(verbose=False), reason="libaio is here")
def test_a_disk_without_libaio_is_one_line(world: World, tmp_path: Path) -> None:
    outcome = world.train(tmp_path / "run", shipped("zero3_nvme.json", tmp_path))
    outcome.refused(2, "libaio")


def test_a_disk_that_is_not_there_is_named(world: World, tmp_path: Path) -> None:
    path = ROOT / "ds_configs" / "zero3_nvme.json"
    world.train(tmp_path / "run", f"deepspeed={path}").refused(2, "/local_nvme")
