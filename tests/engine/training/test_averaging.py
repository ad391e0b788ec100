"""The moving average of the weights, against its recursion written out."""

import copy

import pytest
import torch
from cdpo.engine.training.deepspeed_engine import STATE, AveragingAdamW, averages_in_place
from torch import Tensor

DECAY = 0.75


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).requires_grad_() for size in (5, 1000)]


def train(optimizer: torch.optim.Optimizer, steps: int, seed: int) -> list[list[Tensor]]:
    """The weights after each step of pseudo-random gradients."""
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for _ in range(steps):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        seen.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])
    return seen


def test_averages_follow_the_recursion_and_the_weights_are_adams() -> None:
    start, plain, ours = weights(), weights(), weights()
    options = {"lr": 0.01, "weight_decay": 0.1}
    expected = train(torch.optim.AdamW(plain, **options), 4, seed=1)
    optimizer = AveragingAdamW(ours, decay=DECAY, **options)
    seen = train(optimizer, 4, seed=1)
    for index, parameter in enumerate(ours):
        average = start[index].detach()
        for step in range(4):
            assert torch.equal(seen[step][index], expected[step][index])
            average = DECAY * average + (1 - DECAY) * seen[step][index]
        torch.testing.assert_close(optimizer.state[parameter][STATE], average)


def test_weights_without_a_gradient_have_no_average_yet() -> None:
    first, second = weights()
    optimizer = AveragingAdamW([first, second], decay=DECAY, lr=0.01)
    first.grad = torch.ones_like(first)
    optimizer.step()
    assert STATE in optimizer.state[first] and STATE not in optimizer.state[second]


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    whole, half = weights(), weights()
    optimizer = AveragingAdamW(whole, decay=DECAY, lr=0.01)
    train(optimizer, 2, seed=1)
    for ours, theirs in zip(half, whole, strict=True):
        ours.data.copy_(theirs.data)
    resumed = AveragingAdamW(half, decay=DECAY, lr=0.01)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, 2, seed=2)
    train(resumed, 2, seed=2)
    for ours, theirs in zip(half, whole, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(resumed.state[ours][STATE], optimizer.state[theirs][STATE])


def test_averages_take_the_place_of_the_weights_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "cdpo.engine.training.deepspeed_engine.CHUNK", 300
    )  # the last of four chunks is shorter
    ours = weights()
    optimizer = AveragingAdamW(ours, decay=DECAY, lr=0.01)
    train(optimizer, 3, seed=1)
    view = ours[1].detach()[10:20]  # DeepSpeed holds views of its partitions
    before = [p.detach().clone() for p in ours]
    averages = [optimizer.state[p][STATE].clone() for p in ours]
    with averages_in_place(optimizer):
        assert all(torch.equal(p, average) for p, average in zip(ours, averages, strict=True))
        assert torch.equal(view, averages[1][10:20])
    for parameter, value, average in zip(ours, before, averages, strict=True):
        assert torch.equal(parameter, value)
        assert torch.equal(optimizer.state[parameter][STATE], average)
