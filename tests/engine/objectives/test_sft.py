"""SFT on winners: the diffusion model's own loss, and nothing else looked at."""

import pytest
import torch
from batches import bare
from cdpo.engine.models.protocol import Conditioning
from cdpo.engine.objectives import Networks, build_objective
from cdpo.engine.recipe import Objective
from torch import Tensor


def never(noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    raise AssertionError("SFT has no use for a reference")


@pytest.mark.parametrize("distance", ["mse", "pseudo_huber"])
def test_mean_error_of_the_winners(distance):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(3, 2, 4, 4, generator=generator)
    prediction = torch.randn(3, 2, 4, 4, generator=generator, requires_grad=True)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def policy(noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        seen.append((noisy, timesteps, conditioning.text))
        return prediction

    batch = bare(target)
    spec = Objective(type="sft", distance=distance, huber_c=0.1)
    found = build_objective(spec)(Networks(policy, never), batch)
    x = (prediction - target).double()
    terms = x**2 if distance == "mse" else (x**2 + 0.1**2).sqrt() - 0.1
    torch.testing.assert_close(found.loss.double(), terms.mean())
    (noisy, timesteps, text), *more = seen
    assert not more
    assert torch.equal(noisy, batch.noisy[:3])
    assert torch.equal(timesteps, batch.draw.timesteps)
    assert len(text) == 3
    found.loss.backward()
    assert prediction.grad is not None and prediction.grad.any()
    for unknown in (found.logits, found.winner_error, found.loser_error):
        assert unknown.isnan().all() and not unknown.requires_grad


def test_targets_of_winners_where_each_image_has_its_own():
    target = torch.arange(4.0).view(4, 1, 1, 1)
    batch = bare(torch.zeros(2, 1, 1, 1))
    batch = type(batch)(batch.noisy, target, batch.draw, batch.conditioning)
    policy = lambda *_: torch.zeros(2, 1, 1, 1)  # noqa: E731
    found = build_objective(Objective(type="sft"))(Networks(policy, never), batch)
    assert found.loss.item() == pytest.approx((0 + 1) / 2)


def test_weights():
    batch = bare(torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
    batch = type(batch)(
        batch.noisy, batch.target, batch.draw, batch.conditioning, torch.tensor([1.5, 0.5])
    )
    policy = lambda *_: torch.zeros(2, 1, 1, 1)  # noqa: E731
    found = build_objective(Objective(type="sft"))(Networks(policy, never), batch)
    assert found.loss.item() == pytest.approx((1.5 * 1 + 0.5 * 4) / 2)
