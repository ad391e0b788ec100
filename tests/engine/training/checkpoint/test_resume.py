"""Kill, resume, equal: N steps are N/2 + SIGKILL + N/2, to the last bit of every loss."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from launching import CALM, KILLED, Outcome, World, losses, metrics
from part_changes import CHANGES
from safetensors.torch import load_file
from stock import drawn, levels_apart, picture, stock_pipeline


@pytest.fixture(scope="module")
def four(world: World) -> Path:
    """The run after four steps, with checkpoints of steps 2 and 4: to be copied."""
    train(world, world.folder / "four", "train.steps=4").succeeded()
    return world.folder / "four"


@pytest.fixture
def run(four: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(four, tmp_path / "run"))


def train(world: World, run: Path, *overrides: str, **options: Any) -> Outcome:
    return world.train(run, *overrides, **options)


def test_killed_before_steps(world: World, uninterrupted: list[float], tmp_path: Path) -> None:
    """One run, a checkpoint every second step, killed before steps 2, with none yet, 3 and 6."""
    run = tmp_path / "run"
    for passage in (2, 3, 4):  # counted from the last checkpoint
        assert train(world, run, failpoint=f"train.step@{passage}:kill").code == KILLED
    assert newest(run).name == "step-00000004"
    assert "resumed" in train(world, run).succeeded().text
    assert losses(run) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "place"),
    [
        (2, ""),
        (3, "checkpoint.hashed@2:kill/rank1"),
        pytest.param(1, "train.step@3:kill", marks=pytest.mark.long),
        pytest.param(2, "train.loss@3:kill/rank1", marks=pytest.mark.long),
    ],
)
def test_two_ranks_agree_with_one_and_whether_one_is_killed_or_not(
    world: World, plain: list[float], tmp_path: Path, zero: int, place: str
) -> None:
    base = world.folder / "sd/unet/diffusion_pytorch_model.safetensors"
    digest = hashlib.sha256(base.read_bytes()).hexdigest()
    whole, run = tmp_path / "whole", tmp_path / "run"
    knobs = (*CALM, "train.steps=3", "train.sample_every=3", "checkpoint.every=1")
    train(world, whole, *knobs, ranks=2, zero=zero).succeeded()
    assert losses(whole) == pytest.approx(plain[:3], abs=1e-5)
    exported = load_file(whole / "lora" / "pytorch_lora_weights.safetensors")
    ups = [value for name, value in exported.items() if "lora_B" in name or "lora.up" in name]
    assert ups and all(up.any() for up in ups)
    assert hashlib.sha256(base.read_bytes()).hexdigest() == digest
    shown = picture(stock_pipeline(world.folder / "sd", whole, "lora"))
    assert levels_apart(shown, drawn(whole, 3)) <= 1
    if place:
        killed = train(world, run, *knobs, ranks=2, zero=zero, failpoint=place)
        assert KILLED in killed.codes
        train(world, run, *knobs, ranks=2, zero=zero).succeeded()
        assert losses(run) == losses(whole)


def test_a_skip_survives_a_resume(world: World, tmp_path: Path) -> None:
    """The batch after a skipped one is drawn from further on, also when a resume lies between."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(world, whole, failpoint="train.loss@3:nan").succeeded()
    train(world, run, "train.steps=4", failpoint="train.loss@3:nan").succeeded()
    train(world, run).succeeded()
    assert losses(run) == losses(whole)
    assert all(map(math.isfinite, losses(run)))
    assert [row["skipped"] for row in metrics(run)] == [0, 1, 1, 1, 1, 1]
    assert [row["stage"] for row in metrics(run)] == [1, 1, 2, 2, 3, 3]  # the curriculum waits


def test_a_request_to_stop_leaves_a_checkpoint(
    world: World, uninterrupted: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    outcome = train(world, run, failpoint="train.step@3:term")
    assert outcome.code == 75 and "stopped on request after step 3" in outcome.text
    assert newest(run).name == "step-00000003"
    train(world, run).succeeded()
    assert losses(run) == uninterrupted


def test_a_full_disk_spares_the_previous_checkpoint(
    world: World, uninterrupted: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(world, run, failpoint="checkpoint.write@2:enospc").refused(5, "step-00000004")
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000002"]
    train(world, run).succeeded()
    assert losses(run) == uninterrupted


def test_the_last_save_is_finished_by_the_next_start(
    world: World, uninterrupted: list[float], tmp_path: Path
) -> None:
    """Killed when it was committed: nothing is left to train, the older ones are still there."""
    run = tmp_path / "run"
    assert train(world, run, failpoint="checkpoint.latest@3:kill").code == KILLED
    assert len([*run.glob("checkpoints/step-*")]) == 3
    train(world, run).succeeded()
    assert {path.name for path in run.glob("checkpoints/step-*")} == {
        "step-00000004",
        "step-00000006",
    }
    assert (run / "checkpoints" / "latest").read_text() == "step-00000006\n"
    assert losses(run) == uninterrupted


def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(world: World, run: Path) -> None:
    for folder in (run / "checkpoints").glob("step-*"):
        (folder / "MANIFEST.json").unlink()
    train(world, run).refused(5, str(run / "checkpoints"))


def test_a_checkpoint_of_another_recipe_is_refused_with_the_difference(
    world: World, run: Path
) -> None:
    outcome = train(world, run, "objective.beta=2000", "train.global_batch=4")
    outcome.refused(5, "objective.beta", "5000", "2000", "train.global_batch")


def test_a_checkpoint_of_other_shards_is_refused(world: World, run: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(world.shards, shards)
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["seed"] += 1
    (shards / "manifest.json").write_text(json.dumps(manifest))
    train(world, run, f"data.path={shards}").refused(5, str(run / "checkpoints"), "manifest")


def test_a_model_is_known_by_its_content(world: World, run: Path, tmp_path: Path) -> None:
    """One that has moved is the same; one that changes in place is another, and named."""
    moved = Path(shutil.copytree(world.folder / "sd", tmp_path / "sd"))
    resumed = train(world, run, f"model.path={moved}", "train.steps=4").succeeded()
    assert "nothing to do" in resumed.text
    CHANGES["unet"][1](moved)
    train(world, run, f"model.path={moved}").refused(5, "another denoiser", "run_dir")


def test_a_finished_run_can_be_extended(
    world: World, uninterrupted: list[float], run: Path
) -> None:
    assert losses(run) == uninterrupted[:4]
    train(world, run).succeeded()
    assert losses(run) == uninterrupted


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-????????"))


def test_too_many_bad_batches_stop_the_run_and_are_not_met_again(
    world: World, tmp_path: Path
) -> None:
    """It stops with its last good state, at a checkpointed step, and remembers what it skipped."""
    run = tmp_path / "run"
    outcome = train(world, run, "train.max_skipped=2", failpoint="train.loss@5+:nan")
    outcome.refused(4, "2 batches", "train.optimizer.lr")
    assert [row["step"] for row in metrics(run)] == [1, 2]
    assert newest(run).name == "step-00000002"
    train(world, run).succeeded()
    assert all(map(math.isfinite, losses(run)))
    assert [row["skipped"] for row in metrics(run)] == [0, 0, 2, 2, 2, 2]


def test_killed_while_a_checkpoint_replaces_one_of_the_same_step(
    world: World, uninterrupted: list[float], tmp_path: Path
) -> None:
    """The only checkpoint there is, moved aside and not yet replaced, is put back."""
    run = tmp_path / "run"
    once = ("train.max_skipped=2", "checkpoint.every=4", "checkpoint.keep=1")
    # Two bad batches after step 4 save its state again, which now knows of the skips.
    places = "train.loss@9+:nan,checkpoint.replacing:kill"
    assert train(world, run, *once, failpoint=places).code == KILLED
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"step-00000004.old", "step-00000004.tmp", "latest"}
    assert "resumed" in train(world, run, *once).succeeded().text
    assert losses(run) == uninterrupted
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000006", "latest"}
