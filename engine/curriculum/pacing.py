"""Which tiers are trained when: a function of the optimiser step, and of nothing else.

A public implementation changes the tier of its data set and goes on reading from an iterator made
before, so that the change waits for the next epoch and whole tiers are never used. Here the stage
is looked up anew for every batch, by the step that will use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..recipe import Curriculum


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of training on fixed tiers: steps first_step <= step < first_step + num_steps.

    ``num_steps`` is 0 for a stage that a short run never reaches.
    """

    index: int
    tiers: tuple[int, ...]
    first_step: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class Position:
    """Where the data path stands: global batch number ``batch`` of ``stage``.

    ``visit_base`` counts the passes begun over the data in earlier stages, so that visit_base +
    pass numbers every traversal of a pair differently and a pair met again gets new noise.
    """

    stage: Stage
    batch: int
    visit_base: int


class Pacing:
    """The stages of a run of ``total_steps`` optimiser steps; the last stage takes the rest."""

    def __init__(self, curriculum: Curriculum, total_steps: int) -> None:
        if total_steps < 1:
            raise ValueError(f"a run needs at least one step, got total_steps={total_steps}")
        self.total_steps = total_steps
        self.steps_per_tier = curriculum.steps_per_tier
        self.stages = self._plan(stage_tiers(curriculum))

    def _plan(self, tiers_of_stages: list[tuple[int, ...]]) -> tuple[Stage, ...]:
        last = len(tiers_of_stages) - 1
        stages = []
        for index, tiers in enumerate(tiers_of_stages):
            first = index * self.steps_per_tier
            end = self.total_steps if index == last else first + self.steps_per_tier
            num_steps = max(0, min(end, self.total_steps) - first)
            stages.append(Stage(index, tiers, first, num_steps))
        return tuple(stages)

    @property
    def unreached(self) -> tuple[Stage, ...]:
        """Stages that ``total_steps`` is too small for: worth a warning before the run starts."""
        return tuple(stage for stage in self.stages if stage.num_steps == 0)

    def crowded(self, pairs_by_tier: Mapping[int, int], batch: int) -> dict[Stage, int]:
        """The stages that a run comes to whose pairs are fewer than a ``batch``, so that some come
        up in it twice; with the number of their pairs.
        """
        pairs = {s: sum(pairs_by_tier.get(t, 0) for t in s.tiers) for s in self.stages}
        return {s: count for s, count in pairs.items() if s.num_steps and count < batch}

    def stage_at(self, step: int) -> Stage:
        """The stage that optimiser step ``step`` (from 0) trains on."""
        if step < 0:
            raise ValueError(f"optimiser steps count from 0, got step={step}")
        return self.stages[min(step // self.steps_per_tier, len(self.stages) - 1)]

    def position(
        self, step: int, skips: Sequence[int], passes_begun: Callable[[Stage, int], int]
    ) -> Position:
        """The position of ``step`` when ``skips[k]`` batches of stage k were skipped so far.

        A skipped (non-finite) step advances neither schedule nor curriculum, but its batch is not
        offered again: the next one is drawn from further on in the same stage.
        ``passes_begun(stage, num_batches)`` says how many passes over a stage's pairs its first
        batches have begun.
        """
        self._check_skips(skips)
        stage = self.stage_at(step)
        visit_base = sum(
            passes_begun(earlier, earlier.num_steps + skips[earlier.index])
            for earlier in self.stages[: stage.index]
        )
        return Position(stage, step - stage.first_step + skips[stage.index], visit_base)

    def _check_skips(self, skips: Sequence[int]) -> None:
        if len(skips) != len(self.stages) or any(count < 0 for count in skips):
            raise ValueError(
                f"skips must be one count a stage ({len(self.stages)} stages), got {list(skips)}"
            )


@dataclass(frozen=True, slots=True)
class Cursor:
    """The whole state of the data path: optimiser steps done, and batches skipped in each stage."""

    step: int
    skips: tuple[int, ...]

    @classmethod
    def start(cls, pacing: Pacing) -> Cursor:
        """The beginning of a run."""
        return cls(0, (0,) * len(pacing.stages))

    def advanced(self) -> Cursor:
        """After a step that was taken."""
        return Cursor(self.step + 1, self.skips)

    def skipped(self, pacing: Pacing) -> Cursor:
        """After a step that was skipped because it was not finite."""
        stage = pacing.stage_at(self.step).index
        skips = list(self.skips)
        skips[stage] += 1
        return Cursor(self.step, tuple(skips))


def stage_tiers(curriculum: Curriculum) -> list[tuple[int, ...]]:
    """The tiers of every stage, in ascending order within a stage."""
    tiers = list(range(1, curriculum.tiers + 1))
    if curriculum.order == "random":
        return [tuple(tiers)]
    opening = tiers if curriculum.order == "easy_to_hard" else tiers[::-1]
    if not curriculum.cumulative:
        return [(tier,) for tier in opening]
    return [tuple(sorted(opening[: count + 1])) for count in range(len(opening))]
