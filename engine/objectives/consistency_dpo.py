"""Consistency-DPO (Croitoru et al., arXiv 2405.13637): preferences for latent consistency models.

``loss = -mean logsigmoid( -beta * [(d(f_policy, y) - d(f_reference, y))_winner - (...)_loser] )``,
d the mean pseudo-Huber distance, f(x, t) = c_skip x + c_out x0(x, prediction), and y by ``target``

    teacher  f_reference(x_prev, t_next), x_prev one DDIM step of the teacher, guided by w, from the
             noisy latents at t to t_next: as published
    image    the latents that were corrupted: the winner's for the winner, the loser's for the loser
    mixed    the teacher's in the last quarter of the timesteps, where noisy latents hold next to
             nothing of their image, else the image

Timestep, w and noise are shared by winner and loser. No network call is repeated. With the teacher
there are four: reference on 2B images, teacher on 4B (with and without the caption), reference
again on 2B (the target), policy on 2B. With the image there are two, reference and policy on 2B.

f is affine in the prediction, so f_policy - y is a slope times policy minus the prediction whose f
is y (``kernels/consistency_step``): the loss is one launch each way over predictions. With the
teacher two more make its step and those predictions; with the image the corruption writes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import consistency_solver_step, consistency_targets
from ..basics.phases import phase
from ..models.protocol import Conditioning, SolverStep
from ..recipe import Objective as ObjectiveSpec
from .frozen import Asked, asked_or_kept, rounded
from .preference import PreferenceLoss
from .protocol import Loss, Networks, Predict, TrainingBatch


class ConsistencyDPO:
    """The published loss, over a teacher's solver step or over the pair's own latents."""

    trained_images = 2

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.spec = spec
        self.preference = PreferenceLoss(spec, scale=spec.beta)
        self.frozen_passes = 8 if spec.needs_teacher else 2

    def __call__(self, networks: Networks, batch: TrainingBatch) -> Loss:
        reference, target = self.frozen(networks, batch)
        policy = _predict(networks.policy, batch)
        with phase("loss"):
            slopes = _slopes(batch)
            return self.preference(policy, reference, target, batch.weights, slopes, batch.shares)

    def frozen(self, networks: Networks, batch: TrainingBatch) -> Asked:
        return asked_or_kept(
            batch,
            ask=lambda part: self._ask(networks, part),
            errors_of=lambda found, target, part: self.preference.errors(
                found, target, _slopes(part)
            ),
            leads=self.spec.needs_teacher,
            led=self._led,
        )

    def _ask(self, networks: Networks, batch: TrainingBatch) -> Asked:
        reference, target = _predict(networks.reference, batch), batch.target
        if self.spec.needs_teacher:
            taught = _one_step_nearer(networks, batch, _guided(batch))
            taught = taught if batch.kept is None else rounded(taught)
            target = held_to(self.spec, batch, taught)
        return reference, target

    def _led(self, batch: TrainingBatch) -> Tensor | None:
        """(B,) bool, which pairs' targets are the teacher's; None if all are."""
        return _solver(batch).is_high if self.spec.target == "mixed" else None


build = ConsistencyDPO


def held_to(spec: ObjectiveSpec, batch: TrainingBatch, taught: Tensor) -> Tensor:
    """What predictions (2B, ...) are held to, of what the teacher leads to and the batch's own."""
    if spec.target == "teacher":
        return taught
    return torch.where(_twice(_solver(batch).is_high)[:, None, None, None], taught, batch.target)


def _one_step_nearer(networks: Networks, batch: TrainingBatch, guided: Conditioning) -> Tensor:
    """The predictions (2B, ...) that say what the reference says where the teacher's step leads."""
    solver, unconditional = _solver(batch), batch.unconditional
    assert networks.teacher is not None
    assert unconditional is not None
    both = batch.conditioning.followed_by(unconditional)
    teacher = networks.teacher(_twice(batch.noisy), _twice(_twice(solver.now.timesteps)), both)
    with phase("solver"):
        previous = consistency_solver_step(
            teacher,
            batch.noisy,
            solver.guidance,
            solver.now,
            solver.earlier,
            prediction=solver.prediction,
        )
    answer = networks.reference(previous, _twice(solver.earlier.timesteps), guided)
    with phase("solver"):
        return consistency_targets(
            answer, previous, batch.noisy, solver.scales, solver.earlier_scales
        )


def _predict(network: Predict, batch: TrainingBatch) -> Tensor:
    timesteps = _twice(_solver(batch).now.timesteps)
    return network(batch.noisy, timesteps, _guided(batch))


def _guided(batch: TrainingBatch) -> Conditioning:
    return batch.conditioning.with_extras(guidance=_twice(_solver(batch).guidance))


def _slopes(batch: TrainingBatch) -> Tensor:
    return _solver(batch).scales.of_prediction


def _solver(batch: TrainingBatch) -> SolverStep:
    assert batch.draw.solver is not None
    return batch.draw.solver


def _twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor])
