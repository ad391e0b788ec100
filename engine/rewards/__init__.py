"""Reward models, one file each, behind :mod:`cdpo.engine.rewards.protocol`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch

from ..recipe.reward import CombinedReward, Reward
from .clip import ClipModel
from .combined import is_relative, score_together
from .protocol import RewardModel
from .scored_call import ScoredCall, checked_scores

__all__ = [
    "ClipModel",
    "RewardModel",
    "checked_scores",
    "clip_of",
    "is_relative",
    "load_reward",
    "score_together",
]


def load_reward(spec: Reward, device: torch.device, cache: Path | None = None) -> RewardModel:
    """The reward a recipe names; ``cache`` is a folder in which scores outlive the process.

    Raises:
        OutsideError: weights or function cannot be had; one line says which and why.
    """
    module, _, name = spec.made_by.partition(":")
    kind = getattr(import_module(f".{module}", __package__), name)
    if isinstance(spec, CombinedReward):
        parts = [load_reward(part.reward, device, cache) for part in spec.rewards]
        combined: RewardModel = kind(parts, [part.weight for part in spec.rewards])
        return combined
    scorer, precision = kind(spec, device), getattr(spec, "precision", None)
    return ScoredCall(
        scorer, spec.label, spec.images_per_call, spec.settings(), cache, precision=precision
    )


def clip_of(reward: RewardModel) -> ClipModel | None:
    """The CLIP that a reward works on; None for rewards of another kind, and combined ones."""
    found = getattr(getattr(reward, "scorer", None), "clip", None)
    return found if isinstance(found, ClipModel) else None
