"""The noise process of flow-matching transformers (rectified flow): one velocity for all families.

``x_t = (1 - sigma) x_0 + sigma eps`` with the target ``u = eps - x_0`` (Liu et al., arXiv
2209.03003; Lipman et al., arXiv 2210.02747), whatever sign and clock a family's transformer has:
that is turned where it is asked (a family's file). Timesteps are ``1000 sigma``, float32, as the
scheduler says them.

Training draws sigma from the scheduler's own grid of 1000, so that its shift applies as it does to
sampling, static (``s sigma / (1 + (s - 1) sigma)``) or by the number of tokens of an image. Where
on the grid, from noise 0 to 1, a quantile x decides, of one uniform number a pair:

================  ===================================================  =====================
``logit_normal``  x = sigmoid(z), z standard normal                    Esser et al., eq. 19
``uniform``       x uniform                                            rectified flow
``mode``          x = 1 - u - s (cos^2(pi u / 2) - 1 + u), s = 1.29    Esser et al., eq. 20
================  ===================================================  =====================

Source: Esser et al., arXiv 2403.03206 (Stable Diffusion 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ...kernels import SchedulePoint, paired_add_noise
from ..basics import keyed
from ..basics.keyed import Stream
from ..basics.transfer import send
from .protocol import Draw

MODE_SCALE = 1.29  # published, and diffusers' own


class FlowMatching:
    """Corruption and velocities, in float32, at noise levels of a scheduler's grid."""

    prediction_type = "flow"

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler | DPMSolverMultistepScheduler,
        device: torch.device,
        resolution: tuple[int, int],
        token_side: int,
        sigmas: str,
    ) -> None:
        """``resolution`` and the side of a token are in pixels; ``sigmas`` is one of the table."""
        height, width = resolution
        tokens = (height // token_side) * (width // token_side)
        self.num_timesteps = int(scheduler.config["num_train_timesteps"])
        self.resolution = resolution if scheduler.config["use_dynamic_shifting"] else None
        self._grid = sigma_grid(scheduler, tokens) * self.num_timesteps
        self._quantile = QUANTILES[sigmas]
        self._device = device

    def draw(self, seed: int, pair_ids: Tensor, visits: Tensor) -> Draw:
        # On the host in float64: a draw is the same on every machine.
        levels = keyed.make_keys(seed, Stream.TIMESTEP, pair_ids, visits)
        u = keyed.uniform(levels).double() + 2.0**-25  # the middle of what 24 bits tell apart
        places = (self._quantile(u) * len(self._grid)).long().clamp(0, len(self._grid) - 1)
        noise_keys = keyed.make_keys(seed, Stream.NOISE, pair_ids, visits)
        return Draw(
            timesteps=send(self._grid[places], self._device),
            noise_keys=send(noise_keys, self._device),
        )

    def corrupt(
        self, latents: Tensor, draw: Draw, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        point = self.at(draw.timesteps)
        return paired_add_noise(
            latents, draw.noise_keys, point.alpha, point.sigma, target="flow", dtype=dtype
        )

    def at(self, timesteps: Tensor) -> SchedulePoint:
        sigma = timesteps.float() / self.num_timesteps
        return SchedulePoint(timesteps, 1 - sigma, sigma)


def _logit_normal(u: Tensor) -> Tensor:
    return torch.special.expit(torch.special.ndtri(u))


def _uniform(u: Tensor) -> Tensor:
    return u


def _mode(u: Tensor) -> Tensor:
    return 1 - u - MODE_SCALE * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


QUANTILES: dict[str, Callable[[Tensor], Tensor]] = {
    "logit_normal": _logit_normal,
    "uniform": _uniform,
    "mode": _mode,
}


def sigma_grid(
    scheduler: FlowMatchEulerDiscreteScheduler | DPMSolverMultistepScheduler, tokens: int
) -> Tensor:
    """(T,) float32 on the host: the noise levels that the scheduler knows, the last 1 or next to
    it, shifted as for images of so many tokens.
    """
    own = type(scheduler).from_config(scheduler.config)  # sampling moves a scheduler's sigmas
    sigmas, config = own.sigmas, own.config
    if "flow_shift" in config:  # a solver, which has the noise levels of a flow when it is told to
        own.set_timesteps(config["num_train_timesteps"])
        return own.sigmas[:-1].flip(0)
    if config["use_dynamic_shifting"]:
        sigmas = own.time_shift(shift_exponent(scheduler, tokens), 1.0, sigmas)
    if config["shift_terminal"]:
        sigmas = own.stretch_shift_to_terminal(sigmas)
    return sigmas.flip(0)


def shift_exponent(scheduler: FlowMatchEulerDiscreteScheduler, tokens: int) -> float:
    """The exponent mu of a shift by the number of tokens: on a line through two given points."""
    config = scheduler.config
    first, last = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (last - first)
    return float(config["base_shift"] + slope * (tokens - first))
