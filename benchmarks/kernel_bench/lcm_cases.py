"""Kernels on latents between the networks of a latent consistency model's step."""

from collections.abc import Iterator
from math import prod

import torch
from cdpo.kernels import (
    ConsistencyScales,
    SchedulePoint,
    consistency_scales,
    consistency_solver_step,
    consistency_targets,
)
from kernel_bench import eager_baselines as eager
from kernel_bench.case import BF16, DTYPE, FP32, Case, name_of
from kernel_bench.unet_layers import NETWORKS
from torch import Tensor

Points = dict[str, Tensor]  # where pairs are on the schedule: now, and at the solver's earlier step


def _points(pairs: int, device: torch.device) -> Points:
    """One of the 50 steps of the solver for each pair, and the one before it."""
    alphas_cumprod = eager.SCHEDULER.alphas_cumprod.to(device, torch.float32)
    timesteps = 20 * torch.randint(1, 51, (pairs,), device=device) - 1
    points: Points = {}
    for prefix, at in (("", timesteps), ("earlier_", (timesteps - 20).clamp(min=0))):
        points[f"{prefix}timesteps"] = at
        points[f"{prefix}alpha"] = alphas_cumprod[at].sqrt()
        points[f"{prefix}sigma"] = (1 - alphas_cumprod[at]).sqrt()
    return points


def _solver_step(teacher: Tensor, noisy: Tensor, guidance: Tensor, **points: Tensor) -> Tensor:
    return consistency_solver_step(teacher, noisy, guidance, *_schedule_points(**points))


def _targets(
    answer: Tensor,
    previous: Tensor,
    noisy: Tensor,
    of_noisy: Tensor,
    of_prediction: Tensor,
    earlier_of_noisy: Tensor,
    earlier_of_prediction: Tensor,
) -> Tensor:
    now = ConsistencyScales(of_noisy, of_prediction)
    earlier = ConsistencyScales(earlier_of_noisy, earlier_of_prediction)
    return consistency_targets(answer, previous, noisy, now, earlier)


def _scales(pairs: int, device: torch.device) -> Points:
    now, earlier = _schedule_points(**_points(pairs, device))
    scales = [x.float() for point in (now, earlier) for x in consistency_scales(point)]
    names = ("of_noisy", "of_prediction", "earlier_of_noisy", "earlier_of_prediction")
    return dict(zip(names, scales, strict=True))


def _schedule_points(
    timesteps: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    earlier_timesteps: Tensor,
    earlier_alpha: Tensor,
    earlier_sigma: Tensor,
) -> tuple[SchedulePoint, SchedulePoint]:
    now = SchedulePoint(timesteps, alpha, sigma)
    return now, SchedulePoint(earlier_timesteps, earlier_alpha, earlier_sigma)


def consistency_cases(model: str, pairs: int) -> Iterator[Case]:
    latents = (2 * pairs, *NETWORKS[model].latents)
    elements = prod(latents)

    def networks(device: torch.device, *names: str) -> dict[str, Tensor]:
        return {name: torch.randn(latents, device=device).to(DTYPE) for name in names}

    def solver_inputs(device: torch.device) -> dict[str, Tensor]:
        teacher = networks(device, "conditional", "unconditional").values()
        guidance = 5 + 10 * torch.rand(pairs, device=device)
        more = {"teacher": torch.cat([*teacher]), "guidance": guidance}
        return networks(device, "noisy") | more | _points(pairs, device)

    def target_inputs(device: torch.device) -> dict[str, Tensor]:
        return networks(device, "answer", "previous", "noisy") | _scales(pairs, device)

    yield Case(
        kernel="consistency_solver_step",
        model=model,
        pairs=pairs,
        shape=name_of(latents),
        make_inputs=solver_inputs,
        ours=_solver_step,
        eager=eager.consistency_solver_step,
        # teacher twice, noisy and previous; guidance and two pairs of factors
        bytes_forward=4 * elements * BF16 + 5 * pairs * FP32,
    )
    yield Case(
        kernel="consistency_targets",
        model=model,
        pairs=pairs,
        shape=name_of(latents),
        make_inputs=target_inputs,
        ours=_targets,
        eager=eager.consistency_targets,
        # a prediction and two latents in, the targets out; four factors
        bytes_forward=3 * elements * BF16 + elements * FP32 + 4 * pairs * FP32,
    )
