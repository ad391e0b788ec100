"""The discrete DDPM noise process: epsilon, v and sample prediction.

``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps`` (Ho et al., arXiv 2006.11239) with targets
``eps``, ``v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0`` (Salimans and Ho, arXiv 2202.00512) or
``x_0``, as the scheduler's own config says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from .. import keyed
from ..errors import OutsideError
from ..keyed import Stream
from .protocol import Draw

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class DiscreteDDPM:
    """Corruption and targets on the scheduler's own grid of timesteps, in float32."""

    def __init__(self, scheduler: DDIMScheduler, device: torch.device) -> None:
        self.prediction_type = scheduler.config["prediction_type"]
        if self.prediction_type not in PREDICTION_TYPES:
            raise OutsideError(
                f"the scheduler predicts {self.prediction_type!r}; known are "
                f"{', '.join(PREDICTION_TYPES)}"
            )
        alphas_cumprod = scheduler.alphas_cumprod.to(device, torch.float64)
        self.num_timesteps = len(alphas_cumprod)
        self._alpha = alphas_cumprod.sqrt().float()
        self._sigma = (1 - alphas_cumprod).sqrt().float()

    def draw(self, seed: int, pair_ids: Tensor, visits: Tensor, shape: Sequence[int]) -> Draw:
        timestep_keys = keyed.make_keys(seed, Stream.TIMESTEP, pair_ids, visits)
        noise_keys = keyed.make_keys(seed, Stream.NOISE, pair_ids, visits)
        return Draw(
            timesteps=keyed.integers(timestep_keys, self.num_timesteps),
            noise=keyed.normal(noise_keys, shape),
        )

    def corrupt(self, latents: Tensor, draw: Draw) -> Tensor:
        alpha, sigma = self._coefficients(draw)
        winners, losers = latents.float().chunk(2)
        noise = sigma * draw.noise
        return torch.cat([alpha * winners + noise, alpha * losers + noise])

    def target(self, latents: Tensor, draw: Draw) -> Tensor:
        if self.prediction_type == "epsilon":
            return draw.noise
        if self.prediction_type == "sample":
            return latents.float()
        alpha, sigma = self._coefficients(draw)
        winners, losers = latents.float().chunk(2)
        noise = alpha * draw.noise
        return torch.cat([noise - sigma * winners, noise - sigma * losers])

    def _coefficients(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """Factors alpha and sigma of each pair, (B, 1, 1, 1)."""
        return self._alpha[draw.timesteps, None, None, None], self._sigma[
            draw.timesteps, None, None, None
        ]
