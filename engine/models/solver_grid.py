"""The noise process of a latent consistency model: steps of the teacher's DDIM solver.

Timesteps lie on the grid that the model was distilled on, t = T/S - 1, 2T/S - 1, ..., T - 1 for S
solver steps; each step ends at t_next = max(t - T/S, 0). The guidance weight w of a pair is uniform
in a range: the published one is U[5, 15] over S = 50 (arXiv 2405.13637, after Luo et al., arXiv
2310.04378), with guided = conditional + w (conditional - unconditional), so w is diffusers'
``guidance_scale`` minus 1.
"""

from __future__ import annotations

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ...kernels import ConsistencyScales, SchedulePoint, consistency_scales, paired_add_noise
from ..basics import keyed
from ..basics.errors import RecipeError
from ..basics.keyed import Stream
from ..basics.transfer import send
from .ddpm import DiscreteDDPM
from .protocol import Draw, SolverStep


class SolverGrid:
    """Draws solver steps and guidance weights; corrupts as the underlying diffusion does."""

    resolution: tuple[int, int] | None = None

    def __init__(
        self,
        scheduler: SchedulerMixin,
        device: torch.device,
        *,
        solver_steps: int,
        guidance: tuple[float, float],
    ) -> None:
        self._diffusion = DiscreteDDPM(scheduler, device)
        self.prediction_type = self._diffusion.prediction_type
        self.num_timesteps = self._diffusion.num_timesteps
        if self.num_timesteps % solver_steps:
            raise RecipeError(
                f"model.solver_steps={solver_steps} does not divide the {self.num_timesteps} "
                "timesteps of the model's scheduler; the published value is 50",
                "model.solver_steps",
                "mismatch",
            )
        self._stride = self.num_timesteps // solver_steps
        self._solver_steps = solver_steps
        every = self.at(torch.arange(self.num_timesteps, device=device))
        a, b = consistency_scales(every, prediction=self.prediction_type)
        self._scales = (a.float(), b.float())
        # x0 = a (alpha x0 + sigma noise) + b q, solved for q; 0 where no prediction counts
        image = ((1 - a * every.alpha) / b, -a * every.sigma / b)
        self._image = tuple(torch.where(b == 0, 0, factor).float() for factor in image)
        self._guidance = guidance
        self._device = device

    def at(self, timesteps: Tensor) -> SchedulePoint:
        return self._diffusion.at(timesteps)

    def draw(self, seed: int, pair_ids: Tensor, visits: Tensor) -> Draw:
        keys = {
            stream: keyed.make_keys(seed, stream, pair_ids, visits)
            for stream in (Stream.TIMESTEP, Stream.GUIDANCE, Stream.NOISE)
        }
        step = keyed.integers(keys[Stream.TIMESTEP], self._solver_steps)
        timesteps = send((step + 1) * self._stride - 1, self._device)
        earlier = (timesteps - self._stride).clamp(min=0)
        low, high = self._guidance
        guidance = low + (high - low) * keyed.uniform(keys[Stream.GUIDANCE])
        return Draw(
            timesteps=timesteps,
            noise_keys=send(keys[Stream.NOISE], self._device),
            solver=SolverStep(
                now=self.at(timesteps),
                earlier=self.at(earlier),
                scales=ConsistencyScales(*(scale[timesteps] for scale in self._scales)),
                earlier_scales=ConsistencyScales(*(scale[earlier] for scale in self._scales)),
                is_high=timesteps >= 3 * self.num_timesteps // 4,
                guidance=send(guidance, self._device),
                prediction=self.prediction_type,
            ),
        )

    def corrupt(
        self, latents: Tensor, draw: Draw, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Noisy latents, and the predictions whose consistency function is the clean ones.

        Both are (2B, C, h, w), and float32 whatever the networks compute in: the functions are.
        """
        point = self.at(draw.timesteps)
        of_latents, of_noise = (factor[draw.timesteps] for factor in self._image)
        return paired_add_noise(
            latents,
            draw.noise_keys,
            point.alpha,
            point.sigma,
            target="affine",
            factors=(of_latents, of_noise),
            dtype=torch.float32,
        )
