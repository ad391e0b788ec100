"""What an objective is given and gives: it knows no model class, only callables that predict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..backbones.protocol import Conditioning, Draw

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(noisy (N, C, h, w), timesteps (N,), conditioning of N) -> prediction (N, C, h, w)."""


@dataclass(frozen=True)
class TrainingBatch:
    """B pairs, corrupted: everything a step needs that no trained network computes."""

    noisy: Tensor
    """(2B, C, h, w) in the dtype the networks compute in, winners first."""
    target: Tensor
    """float32, (B, C, h, w) shared by winner and loser, or (2B, C, h, w)."""
    draw: Draw
    """Timesteps, and whatever else was drawn for each pair."""
    conditioning: Conditioning
    """Of 2B images, winners first."""


@dataclass(frozen=True)
class Loss:
    """A loss and what explains it; all but ``loss`` detached float32."""

    loss: Tensor
    """() differentiable in the policy."""
    logits: Tensor
    """(B,) argument of the log-sigmoid: the scaled margin of winner over loser."""
    winner_error: Tensor
    """(B,) policy error minus reference error of the winner; below 0 is what training wants."""
    loser_error: Tensor
    """(B,) the same of the loser."""


class Objective(Protocol):
    """A preference loss over a batch of pairs."""

    def __call__(self, policy: Predict, reference: Predict, batch: TrainingBatch) -> Loss: ...
