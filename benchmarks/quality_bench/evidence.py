"""What the evidence benchmark runs: methods as curves of gain against distance from the base.

An *arm* is a method that trains through *marks*: its run is kept as it is after so many steps, and
goes on. So a method is a curve, not a point, and two methods can be held against one another at
equal distance as well as at equal steps. All arms of a model and seed see the same pairs, but those
that draw their own: rounds, and pairs without a reward.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quality_bench.plan import FINE_TUNING, GROWTH, Changes, Group, Scale, recipe_of
from quality_bench.runs import results_path, run_name, share, verb

PROMPTS = Path(__file__).parent / "prompts"
RANDOM: Changes = {"curriculum.order": "random"}
MASKED: Changes = {"prepare.source": {"type": "masked"}}
PUBLISHED: Changes = {
    "objective.target": "teacher",
    "objective.loser_safeguard": None,
    "objective.loser_gradient": 0.5,  # with all of it the small world's LCM unlearns
}
VARIANTS: dict[str, Changes] = {
    "rank weights": {"objective.pair_weighting": "rank"},
    "linear utility": {"objective.loss": "linear", "objective.reference_ema": 0.995},
    "auto beta": {"objective.target_logit": 1.386},  # logit(0.8)
    "loser safeguard": {"objective.loser_safeguard": 0.9},
}
"""Curriculum-DPO with another loss."""
VALIDATED: Changes = {
    "prompts.validation": str(PROMPTS / "validation.txt"),
    "evaluate.prompts": 120,
    "evaluate.images": 2,
    "evaluate.sampler": {"steps": 15, "guidance": 2.0},
}
TOO_FAR: Changes = {
    "objective.beta": 20,
    "evaluate.every": 25,
    "evaluate.stop": 2,
    "export.of": "best",
}
"""A run that is ended before it has fallen for good, and exports its best step."""

SCALES = {
    "sd": Scale(steps=300, steps_per_tier=40, candidates=8, images_per_prompt=2),
    "lcm": Scale(steps=100, steps_per_tier=20, candidates=16, images_per_prompt=4),
    "turbo": Scale(steps=100, steps_per_tier=20, candidates=16, images_per_prompt=4),
}


@dataclass(frozen=True)
class Arm:
    """A method and where it is looked at."""

    name: str
    changes: Changes
    marks: tuple[int, ...]
    """Steps after which it is compared; of rounds, the steps of a round."""
    preparing: Changes = field(default_factory=dict)
    """What makes its pairs others than everybody's."""
    rounds: int = 1

    def runs(self) -> Iterator[tuple[str, int]]:
        """Names of what is compared, and their steps."""
        yield from ((f"{self.name} {steps * self.rounds}", steps) for steps in self.marks)


SETTINGS: Changes = {
    "prompts.train": str(PROMPTS / "train.txt"),
    "prompts.heldout": str(PROMPTS / "heldout.txt"),
    "prepare.batch_size": 96,
    "compare.batch_size": 96,
    "prepare.precision": "bf16",  # half the time on a processor that has it in hardware
    "checkpoint.every": 150,
    "checkpoint.keep": 1,
}
"""What all recipes of this benchmark have, beside their scale."""


def run_arms(model: str, seed: int, arms: list[Arm], work: Path) -> Path:
    """Prepare, train every arm through its marks, compare; the comparison's results.json."""
    group, scale = Group(model, "clip", seed, {}, preparing=SETTINGS), SCALES[model]
    folder = group.folder(work)
    share(group.candidates(work, scale), folder / "prepared" / "candidates")
    verb("prepare", folder / "prepared", recipe_of(group, scale, {}))
    runs: dict[str, str] = {}
    for arm in arms:
        _run_arm(group, arm, work)
        for name, _ in arm.runs():
            run = folder / run_name(name)
            if (run / "recipe.yaml").exists():
                runs[name] = str(run)
            else:
                print(f"{run} has nothing to compare: no round was kept", flush=True)
    share(group.base_images(work), folder / "comparison" / "compare" / "base")
    compared: Changes = {
        "compare.runs": runs,
        "prompts.train": str(PROMPTS / "train_compared.txt"),
    }
    verb("compare", folder / "comparison", recipe_of(group, scale, compared))
    return results_path(group, work)


def _run_arm(group: Group, arm: Arm, work: Path) -> None:
    folder, scale = group.folder(work), SCALES[group.model]
    prepared = folder / "prepared"
    if arm.preparing:
        prepared = folder / run_name(f"prepared {arm.name}")
        verb("prepare", prepared, recipe_of(group, scale, arm.preparing))
    before: Path | None = None
    for name, steps in arm.runs():
        run = folder / run_name(name)
        changes = arm.changes | {"train.steps": steps}
        if arm.rounds > 1:
            share(group.candidates(work, scale), run / "round-1" / "candidates")
            verb("rounds", run, recipe_of(group, scale, of_rounds(arm, changes)))
            continue
        if before is not None and not run.exists():
            part = run.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(before, part)
            part.rename(run)
        changes |= {"data.path": str(prepared / "shards")}
        verb("train", run, recipe_of(group, scale, changes))
        before = run


def of_rounds(arm: Arm, changes: Mapping[str, object]) -> Changes:
    """A round is kept by what it gains on prompts of its own; the verb's comparison, which nobody
    reads here, is made as small as it gets.
    """
    return {
        **changes,
        **VALIDATED,
        "rounds.count": arm.rounds,
        "compare.images_per_prompt": 1,
        "compare.sampler.steps": 1,
        "compare.divergence_draws": 0,
    }


_SD = (150, 300)
_LCM = _TURBO = (50, 100)
_SLOW: Changes = {"model.unet": None, "prepare.sampler": {"steps": 10, "guidance": 2.0}}
ARMS: dict[str, tuple[tuple[Arm, tuple[int, ...] | None], ...]] = {
    "sd": (
        (Arm("SFT", RANDOM | {"objective.type": "sft", "train.optimizer.lr": 1e-4}, _SD), None),
        (Arm("DPO", RANDOM, (*_SD, 600)), None),
        (Arm("Curriculum-DPO", {}, _SD), None),
        (Arm("rounds", {}, (150,), rounds=2), None),
        (Arm("hard to easy", {"curriculum.order": "hard_to_easy"}, _SD), (0,)),
        (Arm("Curriculum-DPO++", GROWTH, _SD), (0,)),
        (Arm("reward-free ++", GROWTH, _SD, preparing=MASKED), (0,)),
        *((Arm(name, changes, _SD), (0,)) for name, changes in VARIANTS.items()),
        (Arm("best at beta 20", RANDOM | VALIDATED | TOO_FAR, (300,)), (0,)),
    ),
    "lcm": (
        (Arm("published target", PUBLISHED, _LCM), None),
        (Arm("mixed target", {}, (*_LCM, 200, 400)), None),
        (Arm("mixed target SFT", RANDOM | FINE_TUNING["lcm"], _LCM), (0,)),
        (Arm("mixed target no order", RANDOM, _LCM), (0,)),
    ),
    "turbo": (
        (Arm("own images", {}, (*_TURBO, 200)), None),
        (Arm("slow model images", {}, _TURBO, preparing=_SLOW), None),
        (Arm("loser safeguard", {"objective.loser_safeguard": 0.5}, _TURBO), None),
        (Arm("SFT", {"objective.type": "sft"}, _TURBO), None),
    ),
}
"""By model: each arm, and the seeds it is run on, None for all."""


def arms_of(model: str, seed: int, names: list[str] | None = None) -> list[Arm]:
    """The arms of a seed, all of them or those of ``names``."""
    return [
        arm
        for arm, seeds in ARMS[model]
        if (seeds is None or seed in seeds) and (names is None or arm.name in names)
    ]
