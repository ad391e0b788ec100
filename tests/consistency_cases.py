"""One Consistency-DPO step between its networks, and what it must give: a float64 oracle in NumPy.

The oracle is written from the method's text, pair by pair, and knows nothing of the kernels.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from cdpo.kernels import (
    ConsistencyOutputs,
    SchedulePoint,
    consistency_outputs,
    consistency_solver_step,
)
from torch import Tensor

ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)  # of SD 1.5
STRIDE = 20
PREDICTIONS = ("epsilon", "v_prediction", "sample")
NETWORKS = ("policy", "reference", "target")
LATENTS = (*NETWORKS, "noisy", "previous")


def schedule_point(timesteps: Tensor) -> SchedulePoint:
    abar = torch.from_numpy(ALPHAS_CUMPROD).to(timesteps.device)[timesteps]
    return SchedulePoint(timesteps, abar.sqrt().float(), (1 - abar).sqrt().float())


class Case(NamedTuple):
    """The tensors of one training step between the networks."""

    teacher: Tensor
    noisy: Tensor
    guidance: Tensor
    policy: Tensor
    reference: Tensor | None
    target: Tensor | None
    previous: Tensor | None
    now: SchedulePoint
    earlier: SchedulePoint | None
    prediction: str

    def solve(self, dtype: torch.dtype | None = None) -> Tensor:
        tensors = (self.teacher, self.noisy, self.guidance, self.now, self.earlier)
        return consistency_solver_step(*tensors, prediction=self.prediction, dtype=dtype)

    def outputs(self, **scalars: float) -> ConsistencyOutputs:
        return consistency_outputs(
            self.policy,
            self.reference,
            self.target,
            self.noisy,
            self.previous,
            self.now,
            self.earlier,
            prediction=self.prediction,
            **scalars,
        )

    def outputs_and_grad(self, grad_output: Tensor) -> tuple[ConsistencyOutputs, Tensor]:
        policy = self.policy.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        result = self._replace(policy=policy).outputs()
        (grad,) = torch.autograd.grad(result.policy, policy, grad_output)
        return result, grad

    def points(self, change: Any) -> "Case":
        """Both schedule points with each of their tensors changed."""
        now, earlier = (SchedulePoint(*map(change, x)) for x in (self.now, self.earlier))
        return self._replace(now=now, earlier=earlier)

    def map(self, change: Any, *names: str) -> "Case":
        """The case with these tensors changed."""
        return self._replace(**{name: change(getattr(self, name)) for name in names})


def make(
    pairs: int = 3,
    shape: tuple[int, ...] = (4, 5, 7),
    dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 6,
    *,
    prediction: str = "epsilon",
    timesteps: list[int] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Case:
    """dtypes: of teacher, noisy, policy, reference, target and previous."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n, i: torch.randn(n * pairs, *shape, generator=generator).to(dtypes[i])  # noqa: E731
    steps = torch.randint(50, (pairs,), generator=generator)
    t = torch.tensor(timesteps) if timesteps else STRIDE * steps + STRIDE - 1
    t = t.to(device)
    return Case(
        teacher=draw(4, 0).to(device),
        noisy=draw(2, 1).to(device),
        guidance=(5 + 10 * torch.rand(pairs, generator=generator)).to(device),
        policy=draw(2, 2).to(device),
        reference=draw(2, 3).to(device),
        target=draw(2, 4).to(device),
        previous=draw(2, 5).to(device),
        now=schedule_point(t),
        earlier=schedule_point((t - STRIDE).clamp(min=0)),
        prediction=prediction,
    )


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


def function_oracle(
    x: Tensor, output: Tensor, point: SchedulePoint, prediction: str, **scalars: float
) -> Truth:
    value, size = np.empty_like(numbers(x)), np.empty_like(numbers(x))
    for row, (x_row, p) in enumerate(zip(numbers(x), numbers(output), strict=True)):
        t, a, s = (v[row % len(point.alpha)].item() for v in point)
        c_skip, c_out = scalings(t, **scalars)
        value[row] = c_skip * x_row + c_out * clean_and_noise(x_row, p, a, s, prediction)[0]
        parts = clean_and_noise_sizes(np.abs(x_row), np.abs(p), a, s, prediction)
        size[row] = c_skip * np.abs(x_row) + c_out * parts[0]
    return Truth(value, size)


def outputs_oracle(case: Case, **scalars: float) -> dict[str, Truth]:
    now, later = (case.noisy, case.now), (case.previous, case.earlier)
    return {
        name: function_oracle(x, getattr(case, name), point, case.prediction, **scalars)
        for name, (x, point) in zip(NETWORKS, (now, now, later), strict=True)
    }


def gradient_oracle(case: Case, grad_output: Tensor) -> Truth:
    slopes = []
    for t, a, s in zip(*(x.tolist() for x in case.now), strict=True):
        by_type = {"epsilon": -s / a, "v_prediction": -s, "sample": 1.0}
        slopes.append(scalings(t)[1] * by_type[case.prediction])
    slope = np.array(slopes * 2).reshape(-1, *[1] * (case.policy.ndim - 1))
    value = numbers(grad_output) * slope
    return Truth(value, np.abs(value))
