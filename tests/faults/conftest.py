"""What the fault tests share: an uninterrupted run of two ranks to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from launching import Outcome, World, losses

# Two micro-batches a rank and step, and no pictures, which cost more than all else.
TWO_RANKS = ("train.micro_batch=2", "train.sample_every=0")
SECONDS = 200.0  # after which a run counts as hung
KILLED = -9


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


@pytest.fixture(scope="session")
def refused() -> Callable[..., str]:
    """All ranks leave with one code, the first with one clear line that holds all the texts."""

    def check(outcome: Outcome, code: int, *texts: str) -> str:
        assert outcome.codes == [code] * len(outcome.codes), outcome.text
        assert "Traceback" not in outcome.text
        errors = [line for line in outcome.output[0].splitlines() if line.startswith("error:")]
        assert len(errors) == 1, outcome.text
        assert [text for text in texts if text not in errors[0]] == [], errors[0]
        return errors[0]

    return check
