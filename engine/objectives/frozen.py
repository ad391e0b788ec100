"""Asking the frozen networks of a preference loss, about no more than is not kept (`kept.py`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .protocol import TrainingBatch

Asked = tuple[Tensor, Tensor]
"""What a preference is held against: the reference's predictions (2B, C, h, w), or its errors (2B,)
float32 where those are kept; and the target."""


def asked_or_kept(
    batch: TrainingBatch,
    ask: Callable[[TrainingBatch], Asked],
    errors_of: Callable[[Tensor, Tensor, TrainingBatch], Tensor],
    *,
    leads: bool = False,
    led: Callable[[TrainingBatch], Tensor | None] = lambda batch: None,
) -> Asked:
    """What the frozen networks say of a batch, who are asked about what is not known alone.

    Args:
        batch: of B pairs.
        ask: the reference's predictions and the target of some pairs.
        errors_of: the errors of predictions, to the bit those that the loss finds of a policy's.
        leads: whether the target is a teacher's, and so to be kept.
        led: (M,) bool, which pairs' targets are; None for all.
    """
    kept = batch.kept
    with torch.no_grad():
        if kept is None:
            return ask(batch)
        if not kept.missing:
            return kept.complete(batch.target, None)
        part = batch.select(kept.missing)
        predictions, target = ask(part)
        errors = errors_of(predictions, target, part)
        kept.keep(errors, target.half() if leads else None, led(part))
        return kept.complete(batch.target, (errors, target))


def rounded(target: Tensor) -> Tensor:
    """A target as it is when it has been kept.

    It is a prediction, of which fp16 keeps three bits more than the bfloat16 in which networks
    give theirs, at every timestep; the latents it stands for would lose seven times as much of it
    where there is next to no noise.
    """
    return target.half().float()
