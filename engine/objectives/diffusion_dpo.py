"""Diffusion-DPO (Wallace et al., arXiv 2311.12908, eq. 14; the beta / 2 is that of their code).

``loss = -mean logsigmoid( -beta/2 * [(e_w^policy - e_w^ref) - (e_l^policy - e_l^ref)] )`` with e
the mean squared error of a prediction over channels, height and width. Winner and loser
share timestep, noise and caption.
"""

from __future__ import annotations

import torch

from ...kernels import paired_dpo_loss
from ..phases import phase
from ..recipe import Objective as ObjectiveSpec
from .protocol import Loss, Predict, TrainingBatch


class DiffusionDPO:
    """The published loss; one policy call and one reference call on 2B images."""

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.scale = spec.beta / 2
        self.distance = spec.distance
        self.huber_c = spec.huber_c

    def __call__(self, policy: Predict, reference: Predict, batch: TrainingBatch) -> Loss:
        timesteps = torch.cat([batch.draw.timesteps, batch.draw.timesteps])
        # The reference goes first, so that its activations are gone before the policy's graph is.
        with torch.no_grad():
            reference_prediction = reference(batch.noisy, timesteps, batch.conditioning)
        prediction = policy(batch.noisy, timesteps, batch.conditioning)
        with phase("loss"):
            paired = paired_dpo_loss(
                prediction,
                reference_prediction,
                batch.target,
                self.scale,
                distance=self.distance,
                huber_c=self.huber_c,
            )
            winner_error, loser_error = (paired.policy_error - paired.reference_error).chunk(2)
        return Loss(paired.loss, paired.logits, winner_error, loser_error)
