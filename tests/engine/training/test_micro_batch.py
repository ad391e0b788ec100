"""`train.micro_batch: auto`: the largest divisor that the plan says fits, kept by resumes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cdpo.engine.basics import memory as basics
from cdpo.engine.basics.errors import RecipeError
from cdpo.engine.ranks import Ranks
from cdpo.engine.recipe import Recipe
from cdpo.engine.recipe.copies import recipe_names
from cdpo.engine.recipe.reading import load_recipe
from cdpo.engine.training import micro_batch
from cdpo.engine.training.deepspeed_config import plan_batches
from cdpo.engine.training.dry_run.memory import PLANNED_SHARE, Footprint, Sizes, Zero
from cdpo.engine.training.micro_batch import settle_micro_batch
from launching import World, losses
from refusals import refused

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
SIZES = Sizes(policy=100, trained=0, frozen={}, bytes_per_weight=2, text_encoders=30, vae=20,
              activations=50)  # fmt: skip
ZERO = Zero(stage=2, world_size=1, bucket=10, num_buckets=1)


def footprint(encoders: str = "device") -> Footprint:
    """200 bytes of weights, 50 of text encoder and VAE, and 50 a pair."""
    return Footprint(SIZES, ZERO, streamed_reference=False, encoders=encoders)


@pytest.mark.parametrize(
    ("needed", "pairs"), [(650, 8), (649, 4), (450, 4), (449, 2), (350, 2), (300, 1), (299, 0)]
)
def test_the_largest_divisor_that_four_fifths_of_the_memory_take(needed: int, pairs: int) -> None:
    memory = math.ceil(needed / PLANNED_SHARE)
    assert PLANNED_SHARE == 0.8
    assert footprint().most_pairs(8, memory, "cuda") == pairs


def test_what_waits_in_host_memory_counts_on_a_cpu_alone() -> None:
    moved = footprint(encoders="host")
    assert moved.needed(1, "cuda") == 250
    assert moved.needed(1, "cpu") == footprint().needed(1, "cpu") == 300


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has every recipe take 250 bytes and 50 a pair, on a device of so many bytes."""
    monkeypatch.setattr(micro_batch, "read_footprint", lambda *_: footprint())

    def of(num_bytes: int) -> None:
        monkeypatch.setattr(micro_batch, "device_memory", lambda *_: num_bytes)

    return of


def settle(
    recipe: Recipe, ranks: Ranks, before: tuple[int, int] | None = None, trains: bool = True
) -> tuple[int, bool]:
    """The number, and whether there is something to say of it."""
    settled, note = settle_micro_batch(recipe, ranks, before, trains=trains)
    number = settled.train.micro_batch
    assert isinstance(number, int) and plan_batches(settled, ranks.world_size).micro_batch == number
    return number, note is not None


@pytest.mark.parametrize(
    ("before", "num_bytes", "expected"),
    [
        (None, 10_000, (8, False)),
        ((1, 2), 10_000, (2, False)),  # as before, though more would fit
        ((1, 32), 10_000, (8, False)),  # a number of a recipe, of which the share was taken
        ((2, 4), 10_000, (8, True)),  # other ranks
        ((1, 8), 600, (4, True)),  # another device
        ((1, 3), 10_000, (8, True)),  # another global batch
    ],
)
def test_a_resume_keeps_it_on_as_many_ranks_and_says_where_it_cannot(
    tiny_recipe, ranks: Ranks, plan, before, num_bytes: int, expected
) -> None:
    plan(num_bytes)
    assert settle(tiny_recipe("train.micro_batch=auto"), ranks, before) == expected


def test_a_number_of_the_recipe_stays_and_a_finished_run_needs_none(
    tiny_recipe, ranks: Ranks, plan
) -> None:
    plan(1)
    assert settle(tiny_recipe("train.micro_batch=2"), ranks, (1, 8)) == (2, False)
    assert settle(tiny_recipe("train.micro_batch=auto"), ranks, (1, 4), trains=False)[0] == 4
    assert settle(tiny_recipe("train.micro_batch=auto"), ranks, None, trains=False)[0] == 1


def test_where_not_one_pair_fits_what_would_be_needed_is_said(
    tiny_recipe, ranks: Ranks, plan
) -> None:
    plan(370)
    with refused(RecipeError, "too-large", "train.micro_batch") as told:
        settle(tiny_recipe("train.micro_batch=auto"), ranks)
    assert "one pair" in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("text", ["many", "0", "-1", "2.5", "null", "[1]", "true"])
def test_what_is_neither_auto_nor_a_number_is_one_line(tiny_recipe, text: str) -> None:
    kind = "out-of-range" if text in ("0", "-1") else "wrong-type"
    with refused(RecipeError, kind, "train.micro_batch") as told:
        tiny_recipe(f"train.micro_batch={text}")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shipped_recipes_leave_it_to_the_plan_on_any_ranks(name: str, ranks: int) -> None:
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", [])
    assert recipe.train.micro_batch == "auto"
    assert plan_batches(recipe, ranks).pairs_per_rank == 32 // ranks


def test_a_cpus_memory_is_what_bounds_it_most_divided_by_its_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(basics, "CGROUPS", tmp_path)
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "job" / "memory.max").write_text("4096\n")
    (tmp_path / "job" / "step" / "memory.max").write_text("max\n")
    own = tmp_path / "cgroup"
    own.write_text("4:memory:/nowhere\n1:cpu:/\n0::/job/step\n")
    bounds = basics._bounds
    assert bounds(own) == [4096] and bounds(tmp_path / "none") == []
    physical = basics.device_memory(CPU, 1)
    assert physical > 1 << 28 and basics.device_memory(CPU, 4) == physical // 4
    monkeypatch.setattr(basics, "_bounds", lambda: bounds(own))
    assert basics.device_memory(CPU, 2) == 2048


def test_a_resume_under_auto_keeps_the_number_that_the_run_began_with(
    world: World, tmp_path: Path, uninterrupted: list[float]
) -> None:
    """4 pairs, where 8 would fit; in test_trainer.py a run takes those."""
    world.train(tmp_path, "train.steps=2").succeeded()
    world.train(tmp_path, "train.micro_batch=auto").succeeded()
    assert losses(tmp_path) == uninterrupted
    assert "micro_batch: 4" in (tmp_path / "recipe.yaml").read_text()
    newest = max((tmp_path / "checkpoints").glob("step-*/MANIFEST.json"))
    assert json.loads(newest.read_text())["speed"] == "attention sdpa"
    assert "micro_batch: 4" in (newest.parent / "recipe.yaml").read_text()
