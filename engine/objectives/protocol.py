"""What an objective is given and gives: it knows no model class, only callables that predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from ..basics.transfer import send_numbers
from ..models.protocol import Conditioning, Draw
from .kept import Kept

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
    kept: Kept | None = None
    """What the frozen networks are known to say of these pairs; None where nothing is kept."""

    def select(self, pairs: Sequence[int]) -> TrainingBatch:
        """Some of the pairs, in that order, as a batch of their own."""
        count = len(self.draw.timesteps)
        if list(pairs) == list(range(count)):
            return self
        images = [*pairs, *(pair + count for pair in pairs)]
        rows, both = (send_numbers(each, self.noisy.device) for each in (pairs, images))
        return replace(
            self,
            noisy=self.noisy.index_select(0, both),
            target=self.target.index_select(0, rows if len(self.target) == count else both),
            draw=self.draw.select(rows),
            conditioning=self.conditioning.select(images),
            weights=None if self.weights is None else self.weights.index_select(0, rows),
            shares=None if self.shares is None else self.shares.index_select(0, rows),
            unconditional=self.unconditional and self.unconditional.select(images),
        )


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


class HeldAgainstFrozen(Objective, Protocol):
    """An objective whose frozen networks say what does not depend on what is trained."""

    def frozen(self, networks: Networks, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """What a preference is held against: the reference's predictions (2B, C, h, w), or its
        errors (2B,) where ``batch`` has some that are kept; and the target. What is missing of
        those is asked for, and kept.
        """
        ...
