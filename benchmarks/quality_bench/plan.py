"""What the quality benchmark runs: models, rewards, methods, ablations, as changes to recipes.

A *group* is everything that shares candidates, pairs and a comparison: one model, one reward, one
seed, one way of making pairs. Its *methods* train on the same shards for equally many steps of
equally many pairs, and are compared with the base and one another in one go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cdpo.engine.recipe.reading import load_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {
    "sd": ROOT / "recipes" / "emoji_cdpo.yaml",
    "lcm": ROOT / "recipes" / "emoji_lcm_cdpo.yaml",
    "flow": ROOT / "recipes" / "emoji_flow_cdpo.yaml",
    "turbo": ROOT / "recipes" / "emoji_turbo_cdpo.yaml",
}
REWARDS: dict[str, Mapping[str, Any] | None] = {
    "clip": None,  # that of the recipe: text alignment
    "colorfulness": {"type": "colorfulness"},  # weightless
}
Changes = dict[str, Any]  # dotted key -> value

# The published ranks double from 4 to 64 over five stages; a rank of 8 leaves room for three.
GROWTH: Changes = {"adapter.rank_schedule": [2, 4, 8], "adapter.opening": "inside_out"}
METHODS: dict[str, Changes] = {
    "SFT": {"curriculum.order": "random"},
    "DPO": {"curriculum.order": "random"},
    "hard to easy": {"curriculum.order": "hard_to_easy"},
    "Curriculum-DPO": {},
    "Curriculum-DPO++": GROWTH,
}
FINE_TUNING: dict[str, Changes] = {
    "sd": {"objective.type": "sft"},
    "lcm": {"objective.type": "consistency_sft", "objective.loser_safeguard": None},
}
DEFAULT = "Curriculum-DPO"
"""The method whose knobs the ablations turn, one at a time."""
PLAIN = "DPO"
"""What a curriculum is held against."""


@dataclass(frozen=True)
class Scale:
    """How much is run. The last of B = 5 stages takes what K steps a tier leave of the steps."""

    steps: int = 100
    steps_per_tier: int = 15
    candidates: int = 12
    images_per_prompt: int = 4
    prompts: int | None = None

    def changes(self) -> Changes:
        """The same, as changes to a recipe."""
        return {
            "train.steps": self.steps,
            "train.sample_every": 0,
            "train.threads": 1,
            "curriculum.steps_per_tier": self.steps_per_tier,
            "prepare.candidates_per_prompt": self.candidates,
            "compare.images_per_prompt": self.images_per_prompt,
            "compare.report_prompts": 6,
            "compare.divergence_draws": 1,
            "checkpoint.every": self.steps,
            "prompts.limit": self.prompts,
        }

    def defaults(self) -> dict[str, float]:
        """What the ablations vary, as it is in the table."""
        recipe = load_recipe(RECIPES["sd"])
        return {
            "B": recipe.curriculum.tiers,
            "K": self.steps_per_tier,
            "M": self.candidates,
            "beta": recipe.objective.beta,
            f"{PLAIN}-beta": recipe.objective.beta,
        }


@dataclass(frozen=True)
class Group:
    """One preparation, some trainings, one comparison."""

    model: str
    reward: str
    seed: int
    methods: Mapping[str, Changes]
    variant: str = ""
    """What makes the pairs others than the default's, such as ``M 24``; empty: nothing."""
    preparing: Changes = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A folder's name; groups of equal names are the same."""
        parts = [self.model, self.reward, f"seed{self.seed}"]
        return "-".join([*parts, self.variant] if self.variant else parts).replace(" ", "")

    def folder(self, work: Path) -> Path:
        """Where its runs lie."""
        return work / self.name

    def candidates(self, work: Path, scale: Scale) -> Path:
        """Where its candidates lie: shared by all groups that rank the same images."""
        count = self.preparing.get("prepare.candidates_per_prompt", scale.candidates)
        return work / "candidates" / f"{self.model}-seed{self.seed}-{count}"

    def base_images(self, work: Path) -> Path:
        """Where the base's images lie that everything is compared with."""
        return work / "base" / f"{self.model}-seed{self.seed}"


def main_groups(models: list[str], rewards: list[str], seeds: list[int]) -> Iterator[Group]:
    """The table; whole seeds first, so that what is there after a while can be reported."""
    for seed in seeds:
        for model in models:
            for reward in rewards:
                methods = {name: dict(changes) for name, changes in METHODS.items()}
                methods["SFT"] |= FINE_TUNING[model]
                yield Group(model, reward, seed, methods)


def ablation_groups(seeds: list[int], scale: Scale) -> Iterator[Group]:
    """B, K, M and beta, one at a time, with the diffusion model and the CLIP reward.

    K and beta leave the pairs as they are; B and M make others. Beta is varied for plain DPO too,
    so that the two can be compared at equal distance from the base.
    """
    share = scale.steps_per_tier
    pacing = {f"K {k}": {"curriculum.steps_per_tier": k} for k in (share // 3, 2 * share // 3)}
    betas = {f"beta {b}": {"objective.beta": float(b)} for b in (500, 2000, 20_000)}
    plain = {f"{PLAIN}-{name}": METHODS[PLAIN] | changes for name, changes in betas.items()}
    pairs = {f"B {b}": {"curriculum.tiers": b} for b in (3, 7)}
    images = {f"M {m}": {"prepare.candidates_per_prompt": m} for m in (6, 24)}
    for seed in seeds:
        yield Group("sd", "clip", seed, pacing | betas, variant="K-beta")
        yield Group("sd", "clip", seed, plain, variant=f"{PLAIN}-beta")
        for name, changes in (pairs | images).items():
            yield Group("sd", "clip", seed, {name: {}}, variant=name, preparing=changes)


def recipe_of(group: Group, scale: Scale, changes: Changes) -> dict[str, Any]:
    """A whole recipe as plain data: the shipped one with what is asked for here."""
    wanted = {"seed": group.seed} | scale.changes() | group.preparing | changes
    reward = REWARDS[group.reward]
    return shipped(group.model, wanted if reward is None else {"reward": dict(reward)} | wanted)


def shipped(model: str, changes: Changes) -> dict[str, Any]:
    """The recipe of a model as it ships, as plain data, but for these changes."""
    recipe: dict[str, Any] = load_recipe(RECIPES[model]).model_dump(mode="json")
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = recipe
        for part in sections:
            section = section[part]
        section[name] = value
    return recipe
