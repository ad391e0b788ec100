"""AdamW that keeps a moving average of what it trains, as one more optimiser state.

DeepSpeed hands an optimiser the float32 master weights of this rank's partition, and steps it only
when the step is taken. So the average is divided among the ranks under every ZeRO stage, is saved
and restored with Adam's moments, follows them in offloading, and needs no communication: it costs
four bytes a trained parameter and one read and write of them a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

STATE = "ema"
CHUNK = 1 << 24  # elements exchanged at once


class AveragingAdamW(torch.optim.AdamW):
    """AdamW; ``average = decay * average + (1 - decay) * weight`` after each step.

    The average starts at the weights before the first step.
    """

    def __init__(self, params: Any, *, decay: float, **options: Any) -> None:
        super().__init__(params, **options)
        self._decay = decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the weights that have a gradient, then their averages."""
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        # Not into the state yet: Adam takes a parameter without state for one it has not met.
        starts = {p: p.detach().clone() for p in weights if STATE not in self.state[p]}
        loss = super().step(closure)
        for parameter, start in starts.items():
            self.state[parameter][STATE] = start
        if weights:
            averages = [self.state[p][STATE] for p in weights]
            torch._foreach_lerp_(averages, weights, 1 - self._decay)
        return loss


@contextmanager
def averages_in_place(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within, the weights an optimiser holds are their averages; they come back bit for bit."""
    pairs = [(p.data, state[STATE]) for p, state in optimizer.state.items() if STATE in state]
    _exchange(pairs)
    try:
        yield
    finally:
        _exchange(pairs)


def _exchange(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Swap contents, not tensors: others hold views of these."""
    for one, other in pairs:
        for ours, theirs in zip(one.split(CHUNK), other.split(CHUNK), strict=True):
            kept = ours.clone()
            ours.copy_(theirs)
            theirs.copy_(kept)
