"""What of a loss moves with training: the reference, as an average of the policy, and beta.

Both are changed when a step is taken, and never by one that is skipped. Every rank holds the same
numbers, so they are one small file of a checkpoint, whatever ranks and ZeRO stage read it.

**The reference** has adapters of its own, over the weights that it shares with the policy, with

    average = decay * average + (1 - decay) * policy

of the weights that the policy computes with, which under ZeRO-1 and 2 are whole on every rank: no
communication. The average is float32; the adapters are it, rounded to the networks' precision.

**Beta** follows the margins. With m = w * (d_loser - d_winner), so that a logit is scale * m, and M
a moving average over steps of the mean of |m| over a step's pairs,

    scale = target_logit / M,    at most a factor of 30 from the recipe's own,

scale being beta / 2 of diffusion models and beta of consistency models. So the mean size of logits
is about `target_logit`: ln 4 is SimpleTuner's -2 logit(0.2) / M for beta. Until a margin is known,
as in the first step, beta is the recipe's. Nothing waits for the device: M lives there, is reduced
there once a step, and reaches the loss as a factor of the pairs' weights.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from ..objectives import Loss, TrainingBatch
from ..recipe import Objective
from .tensor_files import save_tensors

FILE = "objective.safetensors"
MOST = 30.0  # between beta and the recipe's
DECAY = 0.99  # a step, of the mean size of a margin


class Moving:
    """The moving parts of a run's loss; most recipes have none."""

    def __init__(
        self,
        spec: Objective,
        policy: nn.Module,
        reference: nn.Module,
        device: torch.device,
        world_size: int = 1,
    ) -> None:
        """To be called when the networks are where they stay, before the first step."""
        self._decay = spec.reference_ema
        self._averages: dict[str, Tensor] = {}
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        if self._decay:
            theirs = dict(reference.named_parameters())
            for name, own in policy.named_parameters():
                if own.requires_grad:
                    self._pairs[name] = own, theirs[name]
                    self._averages[name] = own.detach().float().clone()
        self._beta = Beta(spec, device, world_size) if spec.target_logit is not None else None

    def weighted(self, batch: TrainingBatch) -> TrainingBatch:
        """The batch, with logits of the present beta."""
        return batch if self._beta is None else self._beta.weighted(batch)

    def add(self, loss: Loss) -> None:
        """Take note of a micro-batch."""
        if self._beta is not None:
            self._beta.add(loss)

    def skip(self) -> None:
        """Forget the step in progress."""
        if self._beta is not None:
            self._beta.skip()

    @torch.no_grad()
    def step(self) -> dict[str, Tensor]:
        """A step was taken, by all ranks; returns what to log of it, on the device."""
        averages = list(self._averages.values())
        if averages:
            now = [own.detach().float() for own, _ in self._pairs.values()]
            torch._foreach_lerp_(averages, now, 1 - self._decay)
            self._put()
        return {} if self._beta is None else self._beta.step()

    def write(self, folder: Path) -> None:
        """Put the state into a checkpoint, on the rank that writes it; OSError if it cannot be."""
        state = {f"reference.{name}": average for name, average in self._averages.items()}
        if self._beta is not None:
            state["margin"] = self._beta.margin
        if state:
            save_tensors({name: value.cpu() for name, value in state.items()}, folder / FILE)

    def read(self, folder: Path) -> None:
        """Go on from a checkpoint. OSError, ValueError or KeyError if its state does not fit.

        Of one that was written without a beta that follows, that starts here: it was allowed.
        """
        path = folder / FILE
        if not self._averages and (self._beta is None or not path.exists()):
            return
        state = load_file(path)
        for name, average in self._averages.items():
            average.copy_(state[f"reference.{name}"])
        if self._averages:
            self._put()
        if self._beta is not None and "margin" in state:
            self._beta.margin.copy_(state["margin"])

    @torch.no_grad()
    def _put(self) -> None:
        """Give the reference the averages."""
        for (_, theirs), average in zip(self._pairs.values(), self._averages.values(), strict=True):
            theirs.copy_(average)


class Beta:
    """A beta that follows the margins."""

    def __init__(self, spec: Objective, device: torch.device, world_size: int) -> None:
        assert spec.target_logit is not None
        self._start = spec.beta
        self._scale = spec.beta if spec.is_consistency else spec.beta / 2
        self._target = spec.target_logit
        self._world_size = world_size
        self.margin = torch.zeros((), dtype=torch.float64, device=device)
        """() float64, the average size of a margin; 0 while it is not known."""
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    @property
    def _factor(self) -> Tensor:
        """() float64, of the recipe's beta."""
        known = (self._target / (self._scale * self.margin)).clamp(1 / MOST, MOST)
        return known.where(self.margin > 0, torch.ones_like(known))

    def weighted(self, batch: TrainingBatch) -> TrainingBatch:
        """The batch, with logits of the present beta."""
        factor = self._factor.float()
        pairs = len(batch.draw.timesteps)
        weights = factor.expand(pairs) if batch.weights is None else factor * batch.weights
        return replace(batch, weights=weights)

    def add(self, loss: Loss) -> None:
        """Take note of the logits (B,) of a micro-batch."""
        logits = loss.logits.double().abs()
        self._sums += torch.stack([logits.sum(), torch.ones_like(logits).sum()])

    def skip(self) -> None:
        """Forget the step in progress."""
        self._sums.zero_()

    def step(self) -> dict[str, Tensor]:
        """Move beta; returns that of the step that was taken."""
        if self._world_size > 1:
            dist.all_reduce(self._sums)
        factor = self._factor
        mean = self._sums[0] / self._sums[1] / (self._scale * factor)
        moved = torch.where(self.margin > 0, torch.lerp(mean, self.margin, DECAY), mean)
        self.margin.copy_(moved)
        self._sums.zero_()
        return {"beta": self._start * factor}
