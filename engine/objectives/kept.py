"""What the frozen networks have said of pairs before, in place of asking them again.

A preference loss is held against the reference's error of winner and loser and, where a teacher
leads, against its target. With `speed.frozen_cache` a pair repeats its draws, so these are asked
for once a draw: two float32, and a target in half precision. A first visit takes its own results
through the same rounding as they will have when they are read again, the error of a prediction in
place of the prediction and the target through fp16: so both visits give one loss, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..basics.transfer import send_numbers


@dataclass(frozen=True)
class Kept:
    """Of the B pairs of a batch: what is known, who is to be asked about, and who keeps that."""

    missing: Sequence[int]
    """Numbers of the M pairs that the frozen networks are to be asked about, none of them twice."""
    places: Sequence[int]
    """(B,) of each pair: its place among the H known ones followed by the M missing ones."""
    errors: Tensor
    """(2, H) float32 on the device: the reference's errors of the known pairs, winners first."""
    targets: Tensor | None
    """(2, T, C, h, w) float16 on the device: the targets of those known that a teacher led to."""
    led: Sequence[int]
    """(T,) numbers of these pairs in the batch."""
    keep: Callable[[Tensor, Tensor | None, Tensor | None], None]
    """Takes the results for the missing pairs: errors (2M,), targets (2M, C, h, w) float16 or None,
    and which of them a teacher led to, (M,) bool or None for all."""

    def complete(
        self, target: Tensor, asked: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Errors (2B,) and target of the whole batch, of those of the missing pairs, None if there
        are none. ``target`` is the batch's own, which stays where no teacher leads.
        """
        count, device = len(self.places), target.device
        in_order = list(self.places) == list(range(count))
        if asked is not None and in_order and len(self.missing) == count:
            return asked
        errors = self.errors
        if asked is not None:
            errors = torch.cat([errors, asked[0].unflatten(0, (2, -1))], dim=1)
        if not in_order:
            errors = errors.index_select(1, send_numbers(self.places, device))
        if self.targets is not None:
            target = target.clone()
            by_image = target.unflatten(0, (2, count))
            if self.led:
                by_image.index_copy_(1, send_numbers(self.led, device), self.targets.float())
            if asked is not None:
                known = self.errors.shape[1]
                new = [pair for pair, place in enumerate(self.places) if place >= known]
                found = asked[1].unflatten(0, (2, -1))
                found = found.index_select(
                    1, send_numbers([self.places[pair] - known for pair in new], device)
                )
                by_image.index_copy_(1, send_numbers(new, device), found)
        return errors.flatten(), target
