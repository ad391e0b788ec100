"""A run that dies at one place again and again is not started a fourth time; others are."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cdpo.engine.basics.errors import DataError, NumericsError, StopRequested, StuckError
from cdpo.engine.ranks import Ranks
from cdpo.engine.recipe import Recipe
from cdpo.engine.training.starts import ORDERLY, Starts
from refusals import refused
from together import on_ranks


class KilledError(BaseException):
    """Whatever ends a process without a word."""


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Recipe]) -> Recipe:
    found = tiny_recipe()
    Path(found.run_dir).mkdir()
    return found


def start(
    ranks: Ranks,
    recipe: Recipe,
    *places: str,
    ends: BaseException | None = None,
    after: int = 4,
    commits: int = 0,
) -> None:
    """A start that comes to these places, and dies there."""
    starts = Starts(ranks, recipe)
    starts.refuse_if_stuck()
    error = KilledError() if ends is None else ends
    with pytest.raises(type(error)), starts.watched(after):
        for place in places:
            starts.reached(place)
        if commits:
            starts.committed(commits)
            starts.reached(f"step {commits + 1}")
        raise error


NUMERICS = NumericsError("5 batches in a row", "step 7", "non-finite")


@pytest.mark.parametrize("ends", [None, MemoryError(), NUMERICS])
def test_three_deaths_at_one_step_are_enough(ranks, recipe, ends) -> None:
    for _ in range(3):
        start(ranks, recipe, "step 5", "step 6", "step 7", ends=ends)
    for _ in range(2):
        with refused(StuckError, "stuck", wording="starts.stuck") as told:
            start(ranks, recipe)
    assert told.value.exit_code == 7
    Path(told.value.key).unlink()
    start(ranks, recipe)


def test_all_ranks_are_told(recipe) -> None:
    def work(each: Ranks) -> None:
        start(each, recipe, "step 7")

    for _ in range(3):
        assert on_ranks(2, work) == [None, None]
    assert {str(type(error)) for error in on_ranks(2, work)} == {str(StuckError)}


@pytest.mark.parametrize("last", ["step 6", "the checkpoint of step 7"])
def test_kills_at_other_places_are_bad_luck(ranks, recipe, last) -> None:
    for place in ("step 7", "step 7", last, "step 7", "step 7"):
        start(ranks, recipe, "step 5", place)
    start(ranks, recipe)


def test_whoever_came_nowhere_may_try_again(ranks, recipe) -> None:
    for _ in range(5):
        start(ranks, recipe)


def test_a_later_checkpoint_is_progress(ranks, recipe) -> None:
    """Killed three times at one step by count, but never without a checkpoint since."""
    for step in (4, 6, 8, 10):
        start(ranks, recipe, f"step {step + 1}", after=step, commits=step + 2)
    start(ranks, recipe, "step 11", after=10, commits=10)
    start(ranks, recipe, "step 11", after=10)
    assert Starts(ranks, recipe).path.read_text().count("start ") == 3  # since the last one


@pytest.mark.parametrize("ends", [StopRequested("x"), DataError("x"), OSError(28, "x")])
def test_an_orderly_end_is_no_death(ranks, recipe, ends) -> None:
    for _ in range(4):
        start(ranks, recipe, "step 7", ends=ends)
    for _ in range(2):
        start(ranks, recipe, "step 7")
    start(ranks, recipe, "step 7", ends=ends)  # nor does it make the others forgotten
    start(ranks, recipe, "step 7")
    with refused(StuckError, "stuck"):
        start(ranks, recipe)


def test_a_request_to_stop_that_came_too_late_is_no_death(ranks, recipe) -> None:
    """It is noted when it comes, by the thread that hears it, as the other ranks are told."""
    start(ranks, recipe, "step 7")
    start(ranks, recipe, "step 7")
    told: list[str] = []
    starts = Starts(ranks, recipe)
    with ranks.stop as stop, pytest.raises(KilledError):
        stop.announce_by(told.append)
        with starts.watched(4):
            starts.reached("step 7")
            stop.request("SIGTERM")
            deadline = time.monotonic() + 10
            while ORDERLY not in starts.path.read_text() and time.monotonic() < deadline:
                time.sleep(0.01)
            raise KilledError
    assert told == ["SIGTERM"]
    start(ranks, recipe, "step 7")
    with refused(StuckError, "stuck"):
        start(ranks, recipe)


@pytest.mark.parametrize("change", ["train.micro_batch=2", "train.optimizer.lr=1e-6"])
def test_whoever_changes_something_may_try(ranks, recipe, tiny_recipe, change) -> None:
    for _ in range(3):
        start(ranks, recipe, "step 7")
    other = tiny_recipe(change)
    for _ in range(3):
        start(ranks, other, "step 7")
    with refused(StuckError, "stuck"):
        start(ranks, other)
    start(ranks, recipe)


def test_a_run_that_comes_to_its_end_leaves_nothing(ranks, recipe) -> None:
    start(ranks, recipe, "step 7")
    starts = Starts(ranks, recipe)
    with starts.watched(4):
        starts.reached("step 7")
    starts._asked_to_stop("SIGTERM")
    assert not starts.path.exists()


def test_a_record_that_is_torn_or_cannot_be_written_stops_nobody(ranks, recipe) -> None:
    path = Starts(ranks, recipe).path
    path.write_bytes(b"step 7\nstart \nstart x\xff\nst")
    start(ranks, recipe, "step 7")
    path.unlink()
    path.mkdir()
    start(ranks, recipe, "step 7")
