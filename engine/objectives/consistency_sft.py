"""Consistency distillation on the winners alone: the baseline of Consistency-DPO.

``loss = mean d(f_policy(x_t, t), y)`` over winners, with the target y, the distance d and the
teacher's step of ``consistency_dpo.py``: what the model was distilled with (Luo et al., arXiv
2310.04378), on the images that won. Losers are never looked at and the frozen reference makes the
target alone, so margin and errors against the reference are not known.
"""

from __future__ import annotations

import torch

from ...kernels import consistency_outputs, consistency_solver_step
from ..basics.phases import phase
from ..recipe import Objective as ObjectiveSpec
from .protocol import Loss, Networks, TrainingBatch
from .sft import mean_errors


class ConsistencyFineTuning:
    """Three network calls: the teacher on 2B images, reference and policy on B."""

    trained_images, frozen_passes = 1, 3

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.spec = spec

    def __call__(self, networks: Networks, batch: TrainingBatch) -> Loss:
        solver, unconditional = batch.draw.solver, batch.unconditional
        assert networks.teacher is not None
        assert solver is not None
        assert unconditional is not None
        pairs = len(solver.guidance)
        noisy, now, earlier = batch.noisy[:pairs], solver.now, solver.earlier
        prompts = batch.conditioning.select(range(pairs))
        guided = prompts.with_extras(guidance=solver.guidance)
        with torch.no_grad():
            both = prompts.followed_by(unconditional.select(range(pairs)))
            conditional, empty = networks.teacher(
                torch.cat([noisy, noisy]), torch.cat([now.timesteps, now.timesteps]), both
            ).chunk(2)
            # The kernels take pairs. A winner is its own loser here: arithmetic between two network
            # calls is cheap, the calls themselves are not.
            doubled = torch.cat([noisy, noisy])
            with phase("solver"):
                previous = consistency_solver_step(
                    torch.cat([conditional, conditional, empty, empty]),
                    doubled,
                    solver.guidance,
                    now,
                    earlier,
                    prediction=solver.prediction,
                )
            target = networks.reference(previous[:pairs], earlier.timesteps, guided)
        policy = networks.policy(noisy, now.timesteps, guided)
        with phase("loss"):
            outputs = consistency_outputs(
                torch.cat([policy, policy]),
                None,
                torch.cat([target, target]),
                doubled,
                previous,
                now,
                earlier,
                prediction=solver.prediction,
            )
            assert outputs.target is not None
            errors = mean_errors((outputs.policy - outputs.target)[:pairs], self.spec)
            unknown = torch.full_like(errors, float("nan")).detach()
        return Loss(errors.mean(), unknown, unknown, unknown)


build = ConsistencyFineTuning
