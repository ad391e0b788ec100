"""The baseline of Consistency-DPO: METHOD's distance to the target, on the winners alone."""

import pytest
import torch
from cdpo.engine.recipe import Objective
from consistency_steps import PAIRS, make, recomputed

SPEC = Objective(type="consistency_sft", distance="pseudo_huber")
MIXED = SPEC.model_copy(update={"target": "mixed"})
IMAGE = SPEC.model_copy(update={"target": "image"})


@pytest.mark.parametrize(
    ("prediction", "spec"),
    [
        ("epsilon", SPEC),
        ("v_prediction", SPEC),
        ("sample", SPEC),
        ("epsilon", IMAGE),
        ("epsilon", MIXED),
    ],
    ids=str,
)
def test_mean_distance_of_the_winners_and_its_gradient(tmp_path, prediction, spec):
    step = make(tmp_path, prediction, spec=spec)
    truth = recomputed(step, prediction, trained="winners", spec=spec)
    found = step.run(spec)
    found.loss.backward()
    size = truth["target"].abs().max().item()
    torch.testing.assert_close(
        found.loss.double(), truth["winners"].detach(), rtol=1e-3, atol=2e-5 * size
    )
    trained = {name: p.grad for name, p in step.policy.named_parameters() if p.requires_grad}
    largest = max(truth[f"grad {name}"].abs().max().item() for name in trained)
    assert largest > 0
    for name, gradient in trained.items():
        torch.testing.assert_close(
            gradient.double(), truth[f"grad {name}"], rtol=0, atol=5e-3 * largest
        )


@pytest.mark.parametrize("spec", [SPEC, IMAGE], ids=["teacher", "image"])
def test_three_calls_or_one_and_no_loser(tmp_path, spec):
    step = make(tmp_path, spec=spec)
    found = step.run(spec)
    frozen = [("teacher", 2 * PAIRS, False), ("reference", PAIRS, False)]
    assert step.calls == [*(frozen if spec.needs_teacher else []), ("policy", PAIRS, True)]
    for unknown in (found.logits, found.winner_error, found.loser_error):
        assert unknown.isnan().all() and not unknown.requires_grad
