"""Metrics against plain numpy over all pairs of a step, however they were split and summed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cdpo.engine.basics.errors import DataError
from cdpo.engine.comparing.runs import ComparedRun
from cdpo.engine.objectives import Loss
from cdpo.engine.recipe import Recipe
from cdpo.engine.training.log import MetricRing, MetricsFile, RunLog, both_errors_rise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refused

NUM_TIMESTEPS = 1000
NAMES = ("winner_error", "loser_error", "margin", "accuracy")


def micro_batch(seed: int, timesteps: list[int], scale: float = 1.0) -> tuple[Loss, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits, winner, loser = (
        scale * torch.randn(len(timesteps), generator=generator) for _ in range(3)
    )
    loss = -torch.nn.functional.logsigmoid(logits).mean()
    return Loss(loss, logits, winner, loser), torch.tensor(timesteps)


def test_what_only_some_losses_tell_is_in_the_rows_of_those() -> None:
    metrics = MetricRing(2, NUM_TIMESTEPS, torch.device("cpu"), guarded=True)
    for step, beta in enumerate((2.0, 3.0)):
        for kept in ([0.5, 1.0], [0.0, 0.5]):
            loss, timesteps = micro_batch(step, [5, 999])
            metrics.add(replace(loss, loser_kept=torch.tensor(kept)), timesteps)
        metrics.close_row({"step": step}, 1.0, {"beta": torch.tensor(beta)})
    rows = metrics.flush(1)
    assert [row["beta"] for row in rows] == [2, 3]
    assert [row["grad_norm"] for row in rows] == [1, 1]
    found = [(r["loser_kept"], r["loser_kept_q1"], r["loser_kept_q4"]) for r in rows]
    assert found == [(0.5, 0.25, 0.75)] * 2
    assert rows[0]["margin"] == pytest.approx(micro_batch(0, [5, 999])[0].logits.mean().item())


def ring(capacity: int = 4) -> MetricRing:
    return MetricRing(capacity, NUM_TIMESTEPS, torch.device("cpu"))


def oracle(parts: list[tuple[Loss, torch.Tensor]]) -> dict[str, float | None]:
    """Means over all pairs of a step, and over those with t in each quarter of 0..999."""
    logits = np.concatenate([loss.logits.numpy() for loss, _ in parts]).astype(float)
    columns = {
        "winner_error": np.concatenate([loss.winner_error.numpy() for loss, _ in parts]),
        "loser_error": np.concatenate([loss.loser_error.numpy() for loss, _ in parts]),
        "margin": logits,
        "accuracy": np.where(logits > 0, 1.0, np.where(logits < 0, 0.0, 0.5)),
    }
    times = np.concatenate([timesteps.numpy() for _, timesteps in parts])
    expected: dict[str, float | None] = {"loss": float(np.log1p(np.exp(-logits)).mean())}
    for name, values in columns.items():
        expected[name] = float(values.astype(float).mean())
        for quartile in range(4):
            inside = (times >= 250 * quartile) & (times < 250 * (quartile + 1))
            mean = float(values[inside].astype(float).mean()) if inside.any() else None
            expected[f"{name}_q{quartile + 1}"] = mean
    return expected


def assert_row(row: dict[str, object], expected: dict[str, float | None]) -> None:
    for name, value in expected.items():
        assert row[name] == (None if value is None else pytest.approx(value, abs=1e-6)), name


def test_a_row_is_the_mean_over_the_pairs_of_its_step():
    metrics = ring()
    part = micro_batch(0, [0, 249, 250, 499, 500, 749, 750, 999])
    metrics.add(*part)
    metrics.close_row({"step": 7, "lr": 0.1}, 2.5)
    [row] = metrics.flush(world_size=1)
    assert (row["step"], row["lr"], row["grad_norm"]) == (7, 0.1, 2.5)
    assert_row(row, oracle([part]))


def test_micro_batches_add_up_whatever_their_size():
    parts = [micro_batch(1, [10, 600]), micro_batch(2, [300, 999, 5, 5, 700]), micro_batch(3, [0])]
    metrics = ring()
    for part in parts:
        metrics.add(*part)
    metrics.close_row({}, torch.tensor(1.5))
    [row] = metrics.flush(world_size=1)
    assert row["grad_norm"] == 1.5
    assert_row(row, oracle(parts))


def test_a_quartile_without_pairs_has_no_mean():
    metrics = ring()
    metrics.add(*micro_batch(0, [0, 100, 800]))
    metrics.close_row({}, 1.0)
    [row] = metrics.flush(world_size=1)
    for name in NAMES:
        assert row[f"{name}_q1"] is not None and row[f"{name}_q4"] is not None
        assert row[f"{name}_q2"] is None and row[f"{name}_q3"] is None


def test_a_tie_is_neither_right_nor_wrong():
    metrics = ring()
    metrics.add(*micro_batch(0, [1, 2, 3], scale=0.0))
    metrics.close_row({}, 1.0)
    [row] = metrics.flush(world_size=1)
    assert row["accuracy"] == 0.5 and row["margin"] == 0.0


def test_small_numbers_do_not_drown_in_large_sums():
    """Sums are float64: 1e-9 beside 1 is there after a thousand micro-batches."""
    metrics = ring()
    zero = torch.zeros(1)
    for _ in range(1000):
        tiny, one = torch.full((1,), 1e-9), torch.ones(1)
        metrics.add(Loss(torch.tensor(0.0), zero, one, zero), torch.tensor([5]))
        metrics.add(Loss(torch.tensor(0.0), zero, tiny, zero), torch.tensor([5]))
    metrics.close_row({}, 1.0)
    [row] = metrics.flush(world_size=1)
    assert row["winner_error"] - 0.5 == pytest.approx(0.5e-9, rel=1e-3)


def test_rows_are_flushed_in_order_and_the_ring_starts_again():
    metrics = ring(capacity=2)
    assert metrics.flush(world_size=1) == []
    for first in (0, 2):
        parts = [micro_batch(first + index, [index, 900]) for index in range(2)]
        for index, part in enumerate(parts):
            assert not metrics.is_full
            metrics.add(*part)
            metrics.close_row({"step": first + index}, 0.0)
        assert metrics.is_full
        rows = metrics.flush(world_size=1)
        assert [row["step"] for row in rows] == [first, first + 1]
        for row, part in zip(rows, parts, strict=True):
            assert_row(row, oracle([part]))
    assert metrics.flush(world_size=1) == []


def test_a_discarded_step_leaves_nothing_even_if_it_was_nan():
    metrics = ring()
    kept, bad, after = micro_batch(0, [5, 900]), micro_batch(1, [400, 1]), micro_batch(2, [3])
    metrics.add(*kept)
    metrics.close_row({"step": 1}, 1.0)
    nan = torch.tensor(float("nan"))
    metrics.add(
        Loss(nan, bad[0].logits * nan, bad[0].winner_error * nan, nan * torch.ones(2)), bad[1]
    )
    metrics.discard_row()
    metrics.add(*after)
    metrics.close_row({"step": 2}, 1.0)
    rows = metrics.flush(world_size=1)
    assert [row["step"] for row in rows] == [1, 2]
    assert_row(rows[0], oracle([kept]))
    assert_row(rows[1], oracle([after]))


def test_rows_survive_as_strict_json():
    """A gradient norm that is not known is null: NaN is no JSON, and other readers refuse it."""
    metrics = ring()
    metrics.add(*micro_batch(0, [5]))
    metrics.close_row({"step": 1}, None)
    [row] = metrics.flush(world_size=1)
    assert row["grad_norm"] is None
    assert json.loads(json.dumps(row, allow_nan=False)) == row


# The file


def rows(*steps: int) -> list[dict[str, object]]:
    return [{"step": step, "loss": 0.5 * step} for step in steps]


def test_rows_are_appended(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.read() == []
    file.append(rows(1, 2))
    file.append(rows(3))
    assert file.read() == rows(1, 2, 3)
    assert [json.loads(line) for line in file.path.read_text().splitlines()] == rows(1, 2, 3)


def test_rewind_drops_what_came_after_the_checkpoint(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.rewind(5)
    assert not file.path.exists()
    file.append(rows(1, 2, 3, 4))
    file.rewind(2)
    assert file.read() == rows(1, 2)
    file.append(rows(3))
    assert file.read() == rows(1, 2, 3)
    file.rewind(0)
    assert file.read() == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 1.5}', "\0\0\0\0"])
def test_rewind_drops_a_torn_last_line(tmp_path: Path, torn: str):
    """A line may end anywhere; whole but for its line end, the next row must not join it."""
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(rows(1, 2))
    with file.path.open("a") as stream:
        stream.write(torn)
    assert file.read()[:2] == rows(1, 2)
    file.rewind(3)
    file.append(rows(4))
    assert [row["step"] for row in file.read()] in ([1, 2, 4], [1, 2, 3, 4])
    file.rewind(2)
    file.append(rows(3))
    assert file.read() == rows(1, 2, 3)


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b"\xff\xfe", b"[2]", b'{"loss": 1.5}', b""])
def test_a_line_in_the_middle_that_is_no_row_is_named(tmp_path: Path, torn: bytes, tiny_recipe):
    """By whoever reads it; but what a resume drops in any case may be as it likes."""
    file = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    file.path.parent.mkdir()
    file.append(rows(1, 2, 3))
    lines = file.path.read_bytes().split(b"\n")
    file.path.write_bytes(b"\n".join([lines[0], torn, *lines[2:]]))
    run = ComparedRun("tuned", tiny_recipe(), "")
    for read in (file.read, run.facts, lambda: file.rewind(3)):
        with refused(DataError, "damaged", str(file.path)) as told:
            read()
        assert "line 2 of 3" in str(told.value)
    file.rewind(1)
    assert file.read() == rows(1)


# Winner and loser both rise


def errors(*pairs: tuple[float | None, float | None]) -> list[dict[str, float | None]]:
    return [{"winner_error": winner, "loser_error": loser} for winner, loser in pairs]


@pytest.mark.parametrize(
    ("pairs", "rises"),
    [
        ([(0.2, 0.3)] * 6, True),
        ([(0.2, 0.3)] * 5, False),  # too few to tell
        ([(0.01, 0.1)] * 6, False),  # the winner's rise is noise beside the loser's
        ([(-0.2, 0.3)] * 6, False),
        ([(0.2, -0.3)] * 6, False),
        ([(-9.0, -9.0)] + [(0.2, 0.3)] * 6, True),  # before the last three windows
        ([(0.2, 0.3)] * 2 + [(-0.2, 0.3)] * 2 + [(0.2, 0.3)] * 2, False),  # not in a row
        ([(0.5, 0.3), (-0.1, 0.3)] * 3, True),  # by the means of windows
        ([(None, None)] * 6, False),
        ([], False),
    ],
)
def test_both_errors_rise(pairs: list[tuple[float | None, float | None]], rises: bool) -> None:
    assert both_errors_rise(errors(*pairs), window=2) is rises


ERRORS = st.sampled_from([-0.1, 0.01, 0.1, 0.15, 0.2])


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    window=st.integers(1, 3),
    steps=st.lists(st.tuples(ERRORS, ERRORS, st.sampled_from(["", "", "flush", "resume"]))),
)
def test_a_report_finds_what_the_trainer_warned_of_last(
    tiny_recipe: Callable[..., Recipe], window: int, steps: list[tuple[float, float, str]]
) -> None:
    """Whatever the errors, flushes for checkpoints and restarts of the run."""
    recipe = tiny_recipe(f"train.log_every={window}")
    warned: list[str] = []

    def log_after(step: int) -> RunLog:
        log = RunLog(
            Path(recipe.run_dir),
            window=window,
            global_batch=1,
            num_timesteps=NUM_TIMESTEPS,
            world_size=1,
            device=torch.device("cpu"),
            terminal=SimpleNamespace(enabled=True, warn=warned.append),
            write_events=None,
        )
        log.start_after(step)
        return log

    Path(recipe.run_dir).mkdir(exist_ok=True)
    log = log_after(0)
    for step, (winner, loser, then) in enumerate([*steps, (0.1, 0.1, "flush")], start=1):
        warned.clear()
        logits, *values = (torch.tensor([value]) for value in (0.0, winner, loser))
        log.add(Loss(logits.mean(), logits, *values), torch.tensor([5]))
        log.close_step({"step": step}, 1.0)
        if then:
            log.flush()
        if then == "resume":
            log = log_after(step)
    assert bool(warned) is ComparedRun("a run", recipe, "").facts().both_errors_rose
