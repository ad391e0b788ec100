"""What the fault tests share: an uninterrupted run of two ranks to compare with."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from launching import Outcome, World, losses

TWO_RANKS = ("train.micro_batch=2",)  # two a rank and step
SECONDS = 200.0  # after which a run counts as hung


@dataclass(frozen=True)
class Faults:
    """The world on two ranks, and the losses of a run that nothing happened to."""

    world: World
    uninterrupted: list[float]

    def train(self, run: object, *overrides: str, **options: object) -> Outcome:
        return self.world.train(run, *TWO_RANKS, *overrides, ranks=2, seconds=SECONDS, **options)  # type: ignore[arg-type]

    def prepare(self, run: object, *overrides: str, failpoint: str = "") -> Outcome:
        mine = [f"run_dir={run}", *overrides]
        env = {"CDPO_FAILPOINT": failpoint}
        return self.world.server.run(
            "prepare", self.world.recipe, mine, ranks=2, env=env, seconds=SECONDS
        )


@pytest.fixture(scope="session")
def faults(world: World) -> Faults:
    run = world.folder / "uninterrupted-2"
    world.train(run, *TWO_RANKS, ranks=2, seconds=SECONDS).succeeded()
    return Faults(world, losses(run))
