"""The baseline of Consistency-DPO: METHOD's distance to the target, on the winners alone."""

import pytest
import torch
from cdpo.engine.recipe import Objective
from consistency_steps import PAIRS, make, recomputed

SPEC = Objective(type="consistency_sft", distance="pseudo_huber")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_mean_distance_of_the_winners_and_its_gradient(tmp_path, prediction):
    step = make(tmp_path, prediction)
    truth = recomputed(step, prediction, trained="winners")
    found = step.run(SPEC)
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


def test_three_calls_and_no_loser(tmp_path):
    step = make(tmp_path)
    found = step.run(SPEC)
    assert step.calls == [
        ("teacher", 2 * PAIRS, False),
        ("reference", PAIRS, False),
        ("policy", PAIRS, True),
    ]
    for unknown in (found.logits, found.winner_error, found.loser_error):
        assert unknown.isnan().all() and not unknown.requires_grad
