"""The discrete DDPM noise process: epsilon, v and sample prediction.

``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps`` (Ho et al., arXiv 2006.11239) with targets
``eps``, ``v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0`` (Salimans and Ho, arXiv 2202.00512) or
``x_0``, as the scheduler's own config says. The arithmetic is that of
:func:`cdpo.kernels.paired_add_noise`.
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ...kernels import SchedulePoint, paired_add_noise
from ..basics import keyed
from ..basics.errors import OutsideError
from ..basics.keyed import Stream
from ..basics.transfer import send
from .protocol import Draw

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class DiscreteDDPM:
    """Corruption and targets on the scheduler's own grid of timesteps, in float32."""

    resolution: tuple[int, int] | None = None

    def __init__(self, scheduler: DDIMScheduler, device: torch.device) -> None:
        self.prediction_type = scheduler.config["prediction_type"]
        if self.prediction_type not in PREDICTION_TYPES:
            raise OutsideError(
                f"the scheduler predicts {self.prediction_type!r}; known are "
                f"{', '.join(PREDICTION_TYPES)}",
                "prediction_type",
                "unknown",
            )
        alphas_cumprod = scheduler.alphas_cumprod.to(device, torch.float64)
        self.num_timesteps = len(alphas_cumprod)
        self._alpha = alphas_cumprod.sqrt().float()
        self._sigma = (1 - alphas_cumprod).sqrt().float()

    def draw(self, seed: int, pair_ids: Tensor, visits: Tensor) -> Draw:
        # Made on the host: a hundred operations on a handful of integers would be as many launches.
        device = self._alpha.device
        timestep_keys = keyed.make_keys(seed, Stream.TIMESTEP, pair_ids, visits)
        timesteps = keyed.integers(timestep_keys, self.num_timesteps)
        noise_keys = keyed.make_keys(seed, Stream.NOISE, pair_ids, visits)
        return Draw(
            timesteps=send(timesteps, device),
            noise_keys=send(noise_keys, device),
        )

    def corrupt(
        self, latents: Tensor, draw: Draw, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        point = self.at(draw.timesteps)
        return paired_add_noise(
            latents,
            draw.noise_keys,
            point.alpha,
            point.sigma,
            target=self.prediction_type,
            dtype=dtype,
        )

    def at(self, timesteps: Tensor) -> SchedulePoint:
        return SchedulePoint(timesteps, self._alpha[timesteps], self._sigma[timesteps])
