"""Consistency-DPO against METHOD: every tensor of a step again, with separate calls, in float64."""

import itertools
import math

import pytest
import torch
from consistency_steps import PAIRS, SPEC, make, recomputed
from torch import Tensor

IMAGE = SPEC.model_copy(update={"target": "image"})
MIXED = SPEC.model_copy(update={"target": "mixed"})


@pytest.mark.parametrize(
    ("prediction", "spec"),
    [*itertools.product(["epsilon", "v_prediction", "sample"], [SPEC, IMAGE]), ("epsilon", MIXED)],
    ids=lambda x: x if isinstance(x, str) else x.target,
)
def test_a_step_is_that_of_the_method_tensor_by_tensor(tmp_path, prediction, spec, monkeypatch):
    step = make(tmp_path, prediction, spec=spec)
    seen: dict[str, Tensor] = {}
    import cdpo.engine.objectives.consistency_dpo as module

    solve, targets = module.consistency_solver_step, module.consistency_targets

    def spy_solve(*args, **options):  # type: ignore[no-untyped-def]
        seen["x_prev"] = solve(*args, **options)
        return seen["x_prev"]

    def spy_targets(*args):  # type: ignore[no-untyped-def]
        seen["predicted"] = targets(*args)
        return seen["predicted"]

    monkeypatch.setattr(module, "consistency_solver_step", spy_solve)
    monkeypatch.setattr(module, "consistency_targets", spy_targets)
    found = step.run(spec)
    found.loss.backward()
    assert step.batch.draw.solver is not None
    a, b = (torch.cat([x, x])[:, None, None, None] for x in step.batch.draw.solver.scales)
    truth = recomputed(step, prediction, spec=spec)

    assert truth["logits"].abs().min() > 1e-3  # the example says something
    assert ("x_prev" in seen) is ("x_prev" in truth) is spec.needs_teacher
    predicted = seen.pop("predicted", step.batch.target)
    if spec.target == "mixed":
        high = torch.cat([step.batch.draw.timesteps >= 750] * 2)
        assert high.any() and not high.all()
        predicted = torch.where(high[:, None, None, None], predicted, step.batch.target)
        seen["x_prev"] = seen["x_prev"][high]
    # Both networks' answers are held to that of this prediction
    seen["target"] = a * step.batch.noisy + b * predicted
    for name in seen:
        largest = truth[name].abs().max().item()
        torch.testing.assert_close(seen[name].double(), truth[name], rtol=0, atol=2e-5 * largest)
    # The pseudo-Huber distance is nearly linear: errors of its inputs come through as they are.
    size = truth["target"].abs().max().item()
    gain = truth["d_policy"].detach() - truth["d_reference"]
    atol = 2e-5 * size
    torch.testing.assert_close(found.winner_error.double(), gain[:PAIRS], rtol=1e-3, atol=atol)
    torch.testing.assert_close(found.loser_error.double(), gain[PAIRS:], rtol=1e-3, atol=atol)
    logits = truth["logits"].detach()
    torch.testing.assert_close(found.logits.double(), logits, rtol=1e-3, atol=400 * atol)
    torch.testing.assert_close(
        found.loss.double(), truth["loss"].detach(), rtol=1e-3, atol=200 * atol
    )
    trained = {name: p.grad for name, p in step.policy.named_parameters() if p.requires_grad}
    assert trained
    largest = max(truth[f"grad {name}"].abs().max().item() for name in trained)
    assert largest > 0
    for name, gradient in trained.items():
        torch.testing.assert_close(
            gradient.double(), truth[f"grad {name}"], rtol=0, atol=5e-3 * largest
        )


def test_four_network_calls_none_repeated_and_four_launches_between_them(tmp_path, operations):
    step = make(tmp_path)
    with operations:
        step.run().loss.backward()
    ours = [name for name in operations.names if name.startswith("cdpo::")]
    arithmetic = ["consistency_solver_step", "consistency_targets"]
    loss = ["paired_dpo_loss", "paired_dpo_loss_backward"]
    assert ours == [f"cdpo::{name}" for name in (*arithmetic, *loss)]
    assert step.calls == [
        ("reference", 2 * PAIRS, False),
        ("teacher", 4 * PAIRS, False),
        ("reference", 2 * PAIRS, False),  # the target: at x_prev, not at the noisy latents
        ("policy", 2 * PAIRS, True),
    ]


def test_the_image_as_target_takes_two_calls_and_the_loss_one_launch_each_way(tmp_path, operations):
    step = make(tmp_path, spec=IMAGE)
    with operations:
        step.run(IMAGE).loss.backward()
    assert step.calls == [("reference", 2 * PAIRS, False), ("policy", 2 * PAIRS, True)]
    ours = [name for name in operations.names if name.startswith("cdpo::")]
    assert ours == ["cdpo::paired_dpo_loss", "cdpo::paired_dpo_loss_backward"]


@pytest.mark.parametrize(("precision", "spec"), [("fp32", SPEC), ("bf16", SPEC), ("bf16", IMAGE)])
def test_a_fresh_adapter_starts_at_log_2_exactly(tmp_path, precision, spec):
    step = make(tmp_path, perturb=0.0, precision=precision, spec=spec)
    found = step.run(spec)
    assert not found.logits.any()
    assert found.loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert found.winner_error.isfinite().all() and not found.winner_error.any()


def test_winner_and_loser_share_step_noise_and_guidance(tmp_path):
    step = make(tmp_path)
    solver = step.batch.draw.solver
    assert solver is not None
    alpha, sigma = (x[:, None, None, None] for x in solver.now[1:])
    winner, loser = (step.batch.noisy - torch.cat([alpha, alpha]) * step.latents).chunk(2)
    torch.testing.assert_close(winner, loser, rtol=1e-4, atol=1e-5)
    assert solver.guidance.shape == solver.now.timesteps.shape == (PAIRS,)
    torch.testing.assert_close(sigma**2 + alpha**2, torch.ones_like(sigma))
