"""The host runs ahead of the device: how often a step waits for it, and how much the optimiser
sends there, counted in a real step on a CPU that pretends to be a device with streams.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, ForkServer, World, make_world, once

WATCHED = ROOT / "tests" / "workers" / "train_and_watch_device.py"
MOST_OPERATIONS = 100  # of the optimiser, whatever the number of tensors


def watch(world: World, folder: Path, zero: int, ranks: int, *knobs: str) -> dict[str, Any]:
    """What rank 0 saw of one step, after those that make what later ones find: prompts among that,
    of which each rank meets its own when they come.
    """
    shipped = f"deepspeed=zero{zero}"  # with what overlaps
    knobs = ("train.steps=8", "train.log_every=9", "checkpoint.every=9", shipped, *knobs)
    env = {"WATCH_FOLDER": str(folder), "WATCH_FROM": "7"}
    world.train(folder, *knobs, ranks=ranks, script=WATCHED, env=env).succeeded()
    seen: dict[str, Any] = json.loads((folder / "device-0.json").read_text())
    return seen


def holds(seen: dict[str, Any]) -> None:
    """The one wait is the optimiser's for the norm; of others each is told with its stack."""
    waits: dict[str, int] = seen["waits"]
    mine = re.compile(r"Tensor\.cpu in optimizer: \S*training/optimizer_step\.py:")
    others = [f"{count} {place}" for place, count in waits.items() if not mine.match(place)]
    assert not others, "\n".join(others)
    assert list(waits.values()) == [1]
    assert 0 < seen["operations"]["optimizer"] <= MOST_OPERATIONS


@pytest.fixture(scope="module")
def world_of(of_all_processes: Path, server: ForkServer, world: World) -> Any:
    def find(backbone: str) -> World:
        if backbone == "sd":
            return world
        folder = once(
            of_all_processes / f"watched-{backbone}",
            lambda folder: make_world(folder, server, backbone=backbone),
        )
        return World(folder, folder / "recipe.yaml", server)

    return find


long = pytest.mark.long


@pytest.mark.parametrize(
    ("backbone", "zero", "ranks"),
    [
        ("sd", 2, 1),
        *(
            pytest.param(backbone, zero, ranks, marks=long)
            for backbone in ("sd", "sdxl", "lcm")
            for zero in (1, 2)
            for ranks in (1, 2)
            if (backbone, zero, ranks) != ("sd", 2, 1)
        ),
    ],
)
def test_a_step_waits_once_and_its_micro_batches_never(
    world_of: Any, tmp_path: Path, backbone: str, zero: int, ranks: int
) -> None:
    holds(watch(world_of(backbone), tmp_path, zero, ranks, "train.precision=bf16"))


@pytest.mark.long
def test_all_weights_take_no_more_operations_than_an_adapter(world: World, tmp_path: Path) -> None:
    whole = ("adapter.type=full", "export.formats=[merged]")
    holds(watch(world, tmp_path, 2, 1, "train.precision=bf16", *whole))
