"""Consistency distillation on the winners alone: the baseline of Consistency-DPO.

``loss = mean w * d(f_policy(x_t, t), y)`` over winners, with the targets y, the distance d and the
teacher's step of ``consistency_dpo.py``, and a pair's timestep weight w. With ``target=teacher`` it
is what the model was distilled with (Luo et al., arXiv 2310.04378), on the images that won. Losers
are never looked at and the frozen reference makes the target alone, so margin and errors against
the reference are not known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import consistency_solver_step, consistency_targets
from ..basics.phases import phase
from ..models.protocol import Conditioning
from ..recipe import Objective as ObjectiveSpec
from .consistency_dpo import held_to
from .protocol import Loss, Networks, TrainingBatch
from .sft import mean_errors


class ConsistencyFineTuning:
    """Three network calls: the teacher on 2B images, reference and policy on B; or the last."""

    trained_images = 1

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.spec = spec
        self.frozen_passes = 3 if spec.needs_teacher else 0

    def __call__(self, networks: Networks, batch: TrainingBatch) -> Loss:
        solver = batch.draw.solver
        assert solver is not None
        pairs = len(solver.guidance)
        prompts = batch.conditioning.first(pairs)
        guided = prompts.with_extras(guidance=solver.guidance)
        target = batch.target
        if self.spec.needs_teacher:
            with torch.no_grad():
                taught = _one_step_nearer(networks, batch, prompts, guided)
                target = held_to(self.spec, batch, taught)
        policy = networks.policy(batch.noisy[:pairs], solver.now.timesteps, guided)
        with phase("loss"):
            slopes = solver.scales.of_prediction[:, None, None, None]
            errors = mean_errors(slopes * (policy.float() - target[:pairs]), self.spec)
            loss = (errors if batch.weights is None else errors * batch.weights).mean()
            unknown = torch.full_like(errors, float("nan")).detach()
        return Loss(loss, unknown, unknown, unknown)


build = ConsistencyFineTuning


def _one_step_nearer(
    networks: Networks, batch: TrainingBatch, prompts: Conditioning, guided: Conditioning
) -> Tensor:
    """The predictions that say what the reference says where the teacher's step leads.

    The kernels take pairs: a winner is its own loser here, so these are (2B, ...). Arithmetic
    between two network calls is cheap, the calls themselves are not.
    """
    solver, unconditional = batch.draw.solver, batch.unconditional
    assert networks.teacher is not None
    assert solver is not None
    assert unconditional is not None
    pairs, now, earlier = len(solver.guidance), solver.now, solver.earlier
    doubled = torch.cat([batch.noisy[:pairs]] * 2)
    both = prompts.followed_by(unconditional.first(pairs))
    conditional, empty = networks.teacher(
        doubled, torch.cat([now.timesteps, now.timesteps]), both
    ).chunk(2)
    with phase("solver"):
        previous = consistency_solver_step(
            torch.cat([conditional, conditional, empty, empty]),
            doubled,
            solver.guidance,
            now,
            earlier,
            prediction=solver.prediction,
        )
    answer = networks.reference(previous[:pairs], earlier.timesteps, guided)
    with phase("solver"):
        return consistency_targets(
            torch.cat([answer, answer]), previous, doubled, solver.scales, solver.earlier_scales
        )
