"""Diffusion-DPO (Wallace et al., arXiv 2311.12908, eq. 14; the beta / 2 is that of their code).

``loss = -mean logsigmoid( -beta/2 * [(e_w^policy - e_w^ref) - (e_l^policy - e_l^ref)] )`` with e
the mean squared error of a prediction over channels, height and width. Winner and loser
share timestep, noise and caption. Other losses over the same margin: see ``preference.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..basics.phases import phase
from ..recipe import Objective as ObjectiveSpec
from .frozen import Asked, asked_or_kept
from .preference import PreferenceLoss
from .protocol import Loss, Networks, Predict, TrainingBatch


class DiffusionDPO:
    """The published loss; one policy call and one reference call on 2B images."""

    trained_images, frozen_passes = 2, 2

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.preference = PreferenceLoss(spec, scale=spec.beta / 2)

    def __call__(self, networks: Networks, batch: TrainingBatch) -> Loss:
        # The reference goes first, so that its activations are gone before the policy's graph is.
        reference, target = self.frozen(networks, batch)
        policy = _predict(networks.policy, batch)
        with phase("loss"):
            return self.preference(policy, reference, target, batch.weights, shares=batch.shares)

    def frozen(self, networks: Networks, batch: TrainingBatch) -> Asked:
        return asked_or_kept(
            batch,
            ask=lambda part: (_predict(networks.reference, part), part.target),
            errors_of=lambda found, target, _: self.preference.errors(found, target),
        )


build = DiffusionDPO


def _predict(network: Predict, batch: TrainingBatch) -> Tensor:
    timesteps = torch.cat([batch.draw.timesteps, batch.draw.timesteps])
    return network(batch.noisy, timesteps, batch.conditioning)
