"""Supervised fine-tuning on the winners alone: the baseline that preference losses are held to.

``loss = mean w * e_w^policy``: the training loss of the diffusion model itself on the images that
won, with a pair's timestep weight w. The loser and the reference are never looked at, so margin and
errors against the reference are not known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..basics.phases import phase
from ..recipe import Objective as ObjectiveSpec
from .protocol import Loss, Networks, TrainingBatch


class SupervisedFineTuning:
    """One policy call on B images."""

    trained_images, frozen_passes = 1, 0

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.spec = spec

    def __call__(self, networks: Networks, batch: TrainingBatch) -> Loss:
        pairs = len(batch.draw.timesteps)
        prediction = networks.policy(
            batch.noisy[:pairs], batch.draw.timesteps, batch.conditioning.first(pairs)
        )
        with phase("loss"):
            errors = mean_errors(prediction.float() - batch.target[:pairs].float(), self.spec)
            loss = (errors if batch.weights is None else errors * batch.weights).mean()
            unknown = torch.full_like(errors, float("nan")).detach()
        return Loss(loss, unknown, unknown, unknown)


build = SupervisedFineTuning


def mean_errors(x: Tensor, spec: ObjectiveSpec) -> Tensor:
    """(N,) mean distance of differences (N, C, h, w) from zero, as the recipe measures it."""
    if spec.distance == "pseudo_huber":
        c = spec.huber_c
        return (x * x / ((x * x + c * c).sqrt() + c)).flatten(1).mean(1)
    return (x * x).flatten(1).mean(1)
