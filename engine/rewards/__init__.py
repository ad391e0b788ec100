"""Reward models, one file each, behind :mod:`cdpo.engine.rewards.protocol`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch

from ..recipe.reward import CombinedReward, NetworkReward, Reward
from .clip import ClipModel
from .combined import combined_identity, is_relative, score_together
from .identity import identified, reward_files
from .protocol import Identity, RewardModel
from .scored_call import ScoredCall, checked_scores

__all__ = [
    "ClipModel",
    "Identity",
    "RewardModel",
    "checked_scores",
    "clip_of",
    "is_relative",
    "known_identity",
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
    files = reward_files(spec)  # as they are before they are read
    scorer = kind(spec, device)
    return ScoredCall(
        scorer,
        spec.label,
        spec.images_per_call,
        cache=cache,
        precision=getattr(spec, "precision", None),
        identity=identified(spec, scorer, files),
    )


def known_identity(spec: Reward) -> Identity | None:
    """That of the reward a recipe names, without loading its weights; None if its files are not as
    they were when it was last loaded.
    """
    if isinstance(spec, CombinedReward):
        parts = [known_identity(part.reward) for part in spec.rewards]
        weights = [part.weight for part in spec.rewards]
        known = [part for part in parts if part is not None]
        return combined_identity(spec.type, known, weights) if len(known) == len(parts) else None
    if isinstance(spec, NetworkReward):
        return reward_files(spec).read()
    return load_reward(spec, torch.device("cpu")).identity


def clip_of(reward: RewardModel) -> ClipModel | None:
    """The CLIP that a reward works on; None for rewards of another kind, and combined ones."""
    found = getattr(getattr(reward, "scorer", None), "clip", None)
    return found if isinstance(found, ClipModel) else None
