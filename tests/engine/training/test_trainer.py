"""Training on the tiny world: the first loss, parity, curriculum, skipping, refusals."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from launching import CALM, PAIRS_REPEAT, World, losses, metrics, told_of_repeats
from tiny import PICTURES

LOG_2 = math.log(2)


def test_first_loss_is_log_2_and_training_moves_away_from_it(plain: list[float]) -> None:
    assert len(plain) == 6
    assert plain[0] == pytest.approx(LOG_2, abs=1e-6)
    assert all(abs(loss - LOG_2) > 1e-4 for loss in plain[1:])


def test_first_loss_is_log_2_in_bfloat16(world: World, tmp_path: Path) -> None:
    world.train(tmp_path / "run", "train.precision=bf16", "train.steps=2").succeeded()
    assert losses(tmp_path / "run")[0] == pytest.approx(LOG_2, abs=1e-6)


def test_micro_batches_do_not_change_the_curve(
    world: World, plain: list[float], tmp_path: Path
) -> None:
    """`auto` takes the whole of a step."""
    outcome = world.train(tmp_path / "run", "train.micro_batch=auto", *CALM).succeeded()
    assert "8 pairs on each rank, 1 a step" in outcome.text
    assert "micro_batch: 8" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert losses(tmp_path / "run") == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_reference_never_moves(world: World, tmp_path: Path, zero: int) -> None:
    """Without an update of the policy the errors of both are equal, always."""
    knobs = ("train.optimizer.lr=1e-30", "train.steps=3", "train.micro_batch=8")
    world.train(tmp_path, *knobs, zero=zero).succeeded()
    assert [row["margin"] for row in metrics(tmp_path)] == [0] * 3


def test_tiers_open_at_their_step(world: World, calm: Path, tmp_path: Path) -> None:
    """Every order and what it opens is in curriculum/test_pacing.py. The head of the run tells of
    stages that are smaller than a batch, and of those that never open.
    """
    tiers = [row["tiers"] for row in metrics(calm)]
    assert tiers == [[1], [1], [1, 2], [1, 2], [1, 2, 3], [1, 2, 3]]
    other = ("curriculum.order=hard_to_easy", "curriculum.cumulative=false", *PAIRS_REPEAT)
    told_of_repeats(world.train(tmp_path, *other).succeeded())
    assert [row["tiers"] for row in metrics(tmp_path)] == [[3], [3], [2], [2]]


def test_metrics_hold_what_a_user_asks_for(world: World, tmp_path: Path) -> None:
    world.train(tmp_path / "run", "train.warmup_steps=4", "monitor.csv=true", PICTURES).succeeded()
    rows = metrics(tmp_path / "run")
    assert [row["lr"] for row in rows] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])
    wanted = {"margin", "accuracy", "winner_error", "loser_error", "grad_norm", "pairs_per_second"}
    wanted |= {f"winner_error_q{quartile}" for quartile in (1, 2, 3, 4)}
    assert wanted <= set(rows[0])
    assert (tmp_path / "run" / "csv" / "train_margin.csv").exists()
    samples = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert samples == ["step-00000000.png", "step-00000003.png", "step-00000006.png"]


@pytest.mark.slow
def test_one_rank_with_a_bad_loss_makes_all_ranks_skip(world: World, tmp_path: Path) -> None:
    # Both ranks pass the fail-point, so let only the second rank know of it.
    run = tmp_path / "run"
    outcome = world.train(run, ranks=2, failpoint="train.loss@2:nan/rank1")
    outcome.succeeded()
    assert [row["skipped"] for row in metrics(run)] == [0, 1, 1, 1, 1, 1]


def test_shards_of_another_vae_are_refused(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(world.shards, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["vae"]["fingerprint"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    world.train(tmp_path / "run", f"data.path={folder}").refused(3, "model.vae")


@pytest.mark.slow
def test_a_world_that_does_not_divide_the_lanes_is_refused(world: World, tmp_path: Path) -> None:
    world.train(tmp_path / "run", ranks=3).refused(2, "data.lanes")


def test_a_finished_run_says_so_and_does_nothing(world: World, calm: Path) -> None:
    before = (calm / "metrics.jsonl").stat().st_mtime_ns
    assert "nothing to do" in world.train(calm, *CALM).succeeded().text
    assert (calm / "metrics.jsonl").stat().st_mtime_ns == before


def test_dropout_of_the_adapter_repeats_on_a_resume(world: World, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    knobs = ("adapter.dropout=0.3", "train.steps=4")
    world.train(whole, *knobs).succeeded()
    world.train(run, *knobs, failpoint="train.step@3:kill")
    world.train(run, *knobs).succeeded()
    assert losses(run) == losses(whole)


def test_triton_cannot_be_forced_without_a_gpu(world: World, tmp_path: Path) -> None:
    world.train(tmp_path / "run", "train.kernels=triton").refused(2, "train.kernels=triton")


def test_a_policy_that_overflows_costs_the_picture_not_the_run(
    world: World, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    hot = ("train.steps=1", "train.optimizer.lr=1e37", PICTURES)
    outcome = world.train(run, *hot).succeeded()
    assert "no sample picture of step 1" in outcome.text
    assert [path.name for path in (run / "samples").iterdir()] == ["step-00000000.png"]
    assert (run / "lora" / "pytorch_lora_weights.safetensors").exists()
