"""What the fault tests share: an uninterrupted run of two ranks to compare with."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from launching import Outcome, World, losses, once

TWO_RANKS = ("train.micro_batch=2",)  # two a rank and step
SECONDS = 200.0  # after which a run counts as hung


@dataclass(frozen=True)
class Faults:
    """The world on two ranks."""

    world: World
    finished: Path
    """The folder of a run that nothing happened to, with checkpoints of steps 2, 4 and 6."""
    uninterrupted: list[float]
    """Its losses."""

    def up_to_step_4(self, run: Path) -> Path:
        """A copy of that run as if it had just come so far."""
        shutil.copytree(self.finished, run, symlinks=True)
        shutil.rmtree(run / "checkpoints" / "step-00000006")
        return run

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
    knobs = (*TWO_RANKS, "checkpoint.keep=3")
    run = once(
        world.folder / "uninterrupted-2",
        lambda run: world.train(run, *knobs, ranks=2, seconds=SECONDS).succeeded(),
    )
    return Faults(world, run, losses(run))
