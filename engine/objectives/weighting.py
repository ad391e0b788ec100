"""How much a timestep counts: 1 for all as published; min-SNR with a mean of 1; or, of a flow
model, as if another error than the velocity's were compared.

Min-SNR (Hang et al., arXiv 2303.09556) weights the squared error of x0 by min(SNR, gamma), which
for a network that predicts

====================  ======================================
``epsilon``           ``min(SNR, gamma) / SNR``
``v_prediction``      ``min(SNR, gamma) / (SNR + 1)``
``sample``            ``min(SNR, gamma)``
====================  ======================================

is its own error's weight, SNR = alpha^2 / sigma^2. It is divided by its mean over the timesteps, so
that beta and the learning rate keep their meaning. Where sigma or alpha is 0 the limits are taken.

A flow model's velocity u gives ``eps = x_t + (1 - sigma) u`` and ``x_0 = x_t - sigma u``, so that
the squared error of either is that of u times

====================  ======================================
``epsilon``           ``(1 - sigma)^2``
``x0``                ``sigma^2``
====================  ======================================

which is left as it is: beta is then that of a model of eps or x_0. Flow-DPO (arXiv 2501.13918)
derives the first, and recommends 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..models.protocol import NoiseProcess
from ..recipe import Objective as ObjectiveSpec

GAMMA = 5.0


def min_snr_weights(alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """Weights (T,) float32 of all timesteps from the factors (T,) of latents and noise."""
    signal, noise = alpha.double() ** 2, sigma.double() ** 2
    clipped = (signal / noise.clamp(min=1e-20)).clamp(max=GAMMA)
    if prediction_type == "epsilon":  # min(1, gamma / SNR), 1 where there is no signal
        weights = (GAMMA * noise / signal.clamp(min=1e-20)).clamp(max=1)
    elif prediction_type == "v_prediction":  # 1 / (SNR + 1) is the noise's share of the variance
        weights = clipped * noise / (signal + noise)
    else:
        weights = clipped
    return (weights / weights.mean()).float()


def timestep_weights(
    spec: ObjectiveSpec, noise: NoiseProcess, device: torch.device
) -> Callable[[Tensor], Tensor] | None:
    """What gives weights (N,) float32 for timesteps (N,) of draws; None if all are 1."""
    if spec.timestep_weighting == "min_snr":
        every = noise.at(torch.arange(noise.num_timesteps, device=device))
        table = min_snr_weights(every.alpha, every.sigma, noise.prediction_type)
        return lambda timesteps: table[timesteps]
    if spec.time_weight == "epsilon":
        return lambda timesteps: noise.at(timesteps).alpha ** 2
    if spec.time_weight == "x0":
        return lambda timesteps: noise.at(timesteps).sigma ** 2
    return None
