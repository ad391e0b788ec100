"""Reward models, one file each, behind :mod:`cdpo.engine.rewards.protocol`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..recipe import CombinedReward, Reward
from .aesthetic import Aesthetic
from .caption_similarity import CaptionSimilarity
from .clip import ClipModel, ClipScore, PickScore
from .combined import COMBINATIONS, is_relative, score_together
from .hps import Hps
from .image_reward import ImageReward
from .pixels import Colorfulness, JpegSize
from .protocol import RewardModel, Scorer
from .python_function import PythonFunction
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

SCORERS: dict[str, Callable[[Any, torch.device], Scorer]] = {
    "clip_score": ClipScore,
    "pick_score": PickScore,
    "hps": Hps,
    "aesthetic": Aesthetic,
    "image_reward": ImageReward,
    "caption_similarity": CaptionSimilarity,
    "colorfulness": Colorfulness,
    "jpeg_compressibility": JpegSize,
    "jpeg_incompressibility": JpegSize,
    "python": PythonFunction,
}


def load_reward(spec: Reward, device: torch.device, cache: Path | None = None) -> RewardModel:
    """The reward a recipe names; ``cache`` is a folder in which scores outlive the process.

    Raises:
        OutsideError: weights or function cannot be had; one line says which and why.
    """
    if isinstance(spec, CombinedReward):
        parts = [load_reward(part.reward, device, cache) for part in spec.rewards]
        return COMBINATIONS[spec.type](parts, [part.weight for part in spec.rewards])
    scorer = SCORERS[spec.type](spec, device)
    return ScoredCall(scorer, spec.label, spec.images_per_call, spec.settings(), cache)


def clip_of(reward: RewardModel) -> ClipModel | None:
    """The CLIP that a reward works on; None for rewards of another kind, and combined ones."""
    found = getattr(getattr(reward, "scorer", None), "clip", None)
    return found if isinstance(found, ClipModel) else None
