"""One Consistency-DPO step between its networks, and what it must give: a float64 oracle in NumPy.

The oracle is written from the method's text, pair by pair, and knows nothing of the kernels.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from cdpo.kernels import (
    ConsistencyScales,
    SchedulePoint,
    consistency_scales,
    consistency_solver_step,
    consistency_targets,
)
from torch import Tensor

ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)  # of SD 1.5
STRIDE = 20
PREDICTIONS = ("epsilon", "v_prediction", "sample")
LATENTS = ("answer", "noisy", "previous")


def schedule_point(timesteps: Tensor) -> SchedulePoint:
    abar = torch.from_numpy(ALPHAS_CUMPROD).to(timesteps.device)[timesteps]
    return SchedulePoint(timesteps, abar.sqrt().float(), (1 - abar).sqrt().float())


class Case(NamedTuple):
    """The tensors of one training step between the networks."""

    teacher: Tensor
    noisy: Tensor
    guidance: Tensor
    answer: Tensor
    previous: Tensor
    now: SchedulePoint
    earlier: SchedulePoint
    scales: ConsistencyScales
    earlier_scales: ConsistencyScales
    prediction: str

    def solve(self, dtype: torch.dtype | None = None) -> Tensor:
        tensors = (self.teacher, self.noisy, self.guidance, self.now, self.earlier)
        return consistency_solver_step(*tensors, prediction=self.prediction, dtype=dtype)

    def targets(self) -> Tensor:
        latents = (self.answer, self.previous, self.noisy)
        return consistency_targets(*latents, self.scales, self.earlier_scales)

    def points(self, change: Any) -> "Case":
        """Both schedule points and both functions with each of their tensors changed."""
        now, earlier = (SchedulePoint(*map(change, x)) for x in (self.now, self.earlier))
        scales, earlier_scales = (
            ConsistencyScales(*map(change, x)) for x in (self.scales, self.earlier_scales)
        )
        return self._replace(now=now, earlier=earlier, scales=scales, earlier_scales=earlier_scales)

    def map(self, change: Any, *names: str) -> "Case":
        """The case with these tensors changed."""
        return self._replace(**{name: change(getattr(self, name)) for name in names})


def make(
    pairs: int = 3,
    shape: tuple[int, ...] = (4, 5, 7),
    dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 4,
    *,
    prediction: str = "epsilon",
    timesteps: list[int] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Case:
    """dtypes: of teacher, noisy, answer and previous."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n, i: torch.randn(n * pairs, *shape, generator=generator).to(dtypes[i])  # noqa: E731
    steps = torch.randint(50, (pairs,), generator=generator)
    t = torch.tensor(timesteps) if timesteps else STRIDE * steps + STRIDE - 1
    t = t.to(device)
    now, earlier = schedule_point(t), schedule_point((t - STRIDE).clamp(min=0))
    return Case(
        teacher=draw(4, 0).to(device),
        noisy=draw(2, 1).to(device),
        guidance=(5 + 10 * torch.rand(pairs, generator=generator)).to(device),
        answer=draw(2, 2).to(device),
        previous=draw(2, 3).to(device),
        now=now,
        earlier=earlier,
        scales=rounded_scales(now, prediction),
        earlier_scales=rounded_scales(earlier, prediction),
        prediction=prediction,
    )


def rounded_scales(point: SchedulePoint, prediction: str) -> ConsistencyScales:
    exact = consistency_scales(point, prediction=prediction)
    return ConsistencyScales(*(x.float() for x in exact))


class Truth(NamedTuple):
    """Results in float64 and, for each element, the sum of the sizes that it is added up from."""

    value: np.ndarray
    size: np.ndarray


def numbers(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def clean_and_noise(x: Any, p: Any, a: float, s: float, prediction: str) -> tuple[Any, Any]:
    """x0 and epsilon of a prediction; a and s are sqrt(abar) and sqrt(1 - abar)."""
    if prediction == "epsilon":
        return (x - s * p) / a, p
    if prediction == "v_prediction":
        return a * x - s * p, a * p + s * x
    return p, (x - a * p) / s


def clean_and_noise_sizes(x: Any, p: Any, a: float, s: float, prediction: str) -> tuple[Any, Any]:
    if prediction == "epsilon":
        return (x + s * p) / a, p
    if prediction == "v_prediction":
        return a * x + s * p, a * p + s * x
    return p, (x + a * p) / s


def solver_oracle(case: Case) -> Truth:
    """Guidance on x0 and on epsilon, as the method says it; then x' = alpha' x0 + sigma' eps."""
    teacher, noisy, pairs = numbers(case.teacher), numbers(case.noisy), len(case.guidance)
    value, size = np.empty_like(noisy), np.empty_like(noisy)
    for row, x in enumerate(noisy):
        pair = row % pairs
        w, a, s = (v[pair].item() for v in (case.guidance, case.now.alpha, case.now.sigma))
        next_a, next_s = case.earlier.alpha[pair].item(), case.earlier.sigma[pair].item()
        cond, uncond = teacher[row], teacher[2 * pairs + row]
        x0_c, eps_c = clean_and_noise(x, cond, a, s, case.prediction)
        x0_u, eps_u = clean_and_noise(x, uncond, a, s, case.prediction)
        value[row] = next_a * (x0_c + w * (x0_c - x0_u)) + next_s * (eps_c + w * (eps_c - eps_u))
        guided = np.abs(cond) + w * (np.abs(cond) + np.abs(uncond))
        x0, eps = clean_and_noise_sizes(np.abs(x), guided, a, s, case.prediction)
        size[row] = next_a * x0 + next_s * eps
    return Truth(value, size)


def scalings(t: int, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[Any, Any]:
    s, d = t * timestep_scaling, sigma_data
    return d**2 / (s**2 + d**2), s / math.sqrt(s**2 + d**2)


def function_oracle(x: Any, p: Any, point: list[Any], prediction: str, **scalars: float) -> Truth:
    """f(x, t) of a network's prediction p at a timestep with its alpha and sigma."""
    c_skip, c_out = scalings(point[0], **scalars)
    parts = clean_and_noise_sizes(np.abs(x), np.abs(p), *point[1:], prediction)
    value = c_skip * x + c_out * clean_and_noise(x, p, *point[1:], prediction)[0]
    return Truth(value, c_skip * np.abs(x) + c_out * parts[0])


def targets_oracle(case: Case) -> Truth:
    """The predictions at noisy whose f is that of the answers at previous: f is affine in them."""
    answer, previous, noisy = (numbers(x) for x in (case.answer, case.previous, case.noisy))
    value, size = np.zeros_like(noisy), np.zeros_like(noisy)
    for row, x in enumerate(noisy):
        now, earlier = (
            [v[row % len(case.guidance)].item() for v in point]
            for point in (case.now, case.earlier)
        )
        y = function_oracle(previous[row], answer[row], earlier, case.prediction)
        at_0, at_1 = (function_oracle(x, p + 0 * x, now, case.prediction) for p in (0.0, 1.0))
        if slope := slope_of(now, case.prediction):
            np.testing.assert_allclose(at_1.value - at_0.value, slope, rtol=1e-9)
            value[row] = (y.value - at_0.value) / slope
            size[row] = (y.size + at_0.size) / abs(slope)
    return Truth(value, size)


def slope_of(point: list[Any], prediction: str) -> float:
    """The derivative of f by the prediction."""
    t, a, s = point
    return scalings(t)[1] * {"epsilon": -s / a, "v_prediction": -s, "sample": 1.0}[prediction]
