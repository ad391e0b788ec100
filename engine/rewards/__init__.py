"""Reward models, one file each, behind :mod:`cdpo.engine.rewards.protocol`."""

from __future__ import annotations

import torch

from ..recipe import Reward
from .clip_score import ClipScore
from .protocol import RewardModel

__all__ = ["RewardModel", "load_reward"]


def load_reward(spec: Reward, device: torch.device) -> RewardModel:
    """The reward a recipe names."""
    return ClipScore(spec, device)
