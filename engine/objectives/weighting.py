"""How much a timestep counts: 1 for all as published, or min-SNR with a mean of 1.

Min-SNR (Hang et al., arXiv 2303.09556) weights the squared error of x0 by min(SNR, gamma), which
for a network that predicts

====================  ======================================
``epsilon``           ``min(SNR, gamma) / SNR``
``v_prediction``      ``min(SNR, gamma) / (SNR + 1)``
``sample``            ``min(SNR, gamma)``
====================  ======================================

is its own error's weight, SNR = alpha^2 / sigma^2. It is divided by its mean over the timesteps, so
that beta and the learning rate keep their meaning. Where sigma or alpha is 0 the limits are taken.
"""

from __future__ import annotations

from torch import Tensor

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
