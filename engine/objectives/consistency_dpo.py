"""Consistency-DPO (Croitoru et al., arXiv 2405.13637): preferences for latent consistency models.

``loss = -mean logsigmoid( -beta * [(d(f_policy, y) - d(f_reference, y))_winner - (...)_loser] )``,
d the mean pseudo-Huber distance, f(x, t) = c_skip x + c_out x0(x, prediction), and

    x_prev   one DDIM step of the teacher, guided by w, from the noisy latents at t to t_next
    y        f_reference(x_prev, t_next)

Timestep, w and noise are shared by winner and loser. Four network calls, none repeated: reference
on 2B images, teacher on 4B (with and without the caption), reference again on 2B (the target),
policy on 2B. All that is elementwise between them is two launches (``kernels/consistency_step``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import consistency_outputs, consistency_solver_step
from ..basics.phases import phase
from ..recipe import Objective as ObjectiveSpec
from .preference import PreferenceLoss
from .protocol import Loss, Networks, TrainingBatch


class ConsistencyDPO:
    """The published loss over a teacher's solver step."""

    trained_images, frozen_passes = 2, 8

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.preference = PreferenceLoss(spec, scale=spec.beta)

    def __call__(self, networks: Networks, batch: TrainingBatch) -> Loss:
        solver, unconditional = batch.draw.solver, batch.unconditional
        assert networks.teacher is not None
        assert solver is not None
        assert unconditional is not None
        noisy, timesteps = batch.noisy, _twice(solver.now.timesteps)
        guided = batch.conditioning.with_extras(guidance=_twice(solver.guidance))
        with torch.no_grad():
            reference = networks.reference(noisy, timesteps, guided)
            both = batch.conditioning.followed_by(unconditional)
            teacher = networks.teacher(_twice(noisy), _twice(timesteps), both)
            with phase("solver"):
                previous = consistency_solver_step(
                    teacher,
                    noisy,
                    solver.guidance,
                    solver.now,
                    solver.earlier,
                    prediction=solver.prediction,
                )
            target = networks.reference(previous, _twice(solver.earlier.timesteps), guided)
        policy = networks.policy(noisy, timesteps, guided)
        with phase("loss"):
            outputs = consistency_outputs(
                policy,
                reference,
                target,
                noisy,
                previous,
                solver.now,
                solver.earlier,
                prediction=solver.prediction,
            )
            assert outputs.reference is not None
            assert outputs.target is not None
            return self.preference(outputs.policy, outputs.reference, outputs.target, None)


build = ConsistencyDPO


def _twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor])
