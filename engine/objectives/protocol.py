"""What an objective is given and gives: it knows no model class, only callables that predict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..models.protocol import Conditioning, Draw

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(noisy (N, C, h, w), timesteps (N,), conditioning of N) -> prediction (N, C, h, w)."""


@dataclass(frozen=True)
class Networks:
    """The networks of a step; all but the policy are frozen."""

    policy: Predict
    """The network in training."""
    reference: Predict
    """What the policy was at the start, or a moving average of it."""
    teacher: Predict | None = None
    """The diffusion model a consistency model was distilled from."""


@dataclass(frozen=True)
class TrainingBatch:
    """B pairs, corrupted: everything a step needs that no trained network computes."""

    noisy: Tensor
    """(2B, C, h, w) in the dtype the networks compute in, winners first; float32 for consistency
    models, whose functions of it are float32."""
    target: Tensor
    """float32, (B, C, h, w) shared by winner and loser, or (2B, C, h, w): what predictions are held
    to; of a consistency model those whose consistency function is the clean latents."""
    draw: Draw
    """Timesteps, and whatever else was drawn for each pair."""
    conditioning: Conditioning
    """Of 2B images, winners first."""
    weights: Tensor | None = None
    """(B,) float32, factors of the pairs' logits: how much each pair's timestep counts, and how far
    beta has moved; None if all are 1."""
    unconditional: Conditioning | None = None
    """Of 2B images without their captions, for the guidance of a consistency model's teacher;
    None where no teacher is asked."""
    shares: Tensor | None = None
    """(B,) float32, factors of the pairs' losses: how much each pair counts; None if all are 1."""


@dataclass(frozen=True)
class Loss:
    """A loss and what explains it; all but ``loss`` detached float32.

    NaN stands for what an objective does not compute.
    """

    loss: Tensor
    """() differentiable in the policy."""
    logits: Tensor
    """(B,) the scaled margin of winner over loser, what the log-sigmoid of DPO is taken of."""
    winner_error: Tensor
    """(B,) policy error minus reference error of the winner; below 0 is what training wants."""
    loser_error: Tensor
    """(B,) the same of the loser."""
    loser_kept: Tensor | None = None
    """(B,) the share of the loser's gradient that is kept; None if nothing could hold it back."""


class Objective(Protocol):
    """A loss over a batch of pairs."""

    trained_images: int
    """Images of a pair that the policy is trained on, 1 or 2: what a dry run counts with."""
    frozen_passes: int
    """Forward passes of frozen networks for a pair, over one image each."""

    def __call__(self, networks: Networks, batch: TrainingBatch) -> Loss: ...
