"""The study of a single-launch loss gives the results of the kernel it is to be compared with.

It has no PyTorch path: an ordinary run starts a second pytest on this file in the interpreter.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cdpo.kernels import paired_dpo_loss, use
from cdpo.kernels.dispatch import HAS_TRITON, INTERPRETED
from single_launch_loss import launch, single_launch_loss

SCALE = 2500.0
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ON_GPU = HAS_TRITON and torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
runs = pytest.mark.skipif(not (INTERPRETED or ON_GPU), reason="runs interpreted, or on a GPU")


def make_pairs(dtype, pairs=3, sample=(4, 7, 9), shared=True):
    torch.manual_seed(0)
    target = torch.randn(pairs if shared else 2 * pairs, *sample)
    both = torch.cat([target, target]) if shared else target
    policy = both + torch.randn_like(both)
    reference = policy + 0.02 * torch.randn_like(both)
    return tuple(x.to(DEVICE) for x in (policy.to(dtype), reference.to(dtype), target))


def two_launches(policy, reference, target):
    """Loss, logits, errors and gradient of the kernel in use."""
    policy = policy.detach().requires_grad_()
    results = paired_dpo_loss(policy, reference, target, SCALE)
    (grad,) = torch.autograd.grad(results.loss, policy)
    return [result.detach() for result in results] + [grad]


def relative_error(found, truth):
    return ((found - truth).abs().max() / truth.abs().max()).item()


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("sample", [(4, 7, 9), (1,), (4, 32, 32)], ids=str)
def test_results_are_those_of_two_launches(dtype, shared, sample):
    """Off by at most twice what PyTorch is off from float64, and one rounding of the result."""
    inputs = make_pairs(dtype, sample=sample, shared=shared)
    found = launch(*inputs, SCALE)
    truth = two_launches(*(x.double() for x in inputs))
    with use("torch"):
        plain = two_launches(*inputs)
    for mine, theirs, true in zip(found, plain, truth, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        allowed = 2 * relative_error(theirs, true) + torch.finfo(mine.dtype).eps
        assert relative_error(mine, true) <= allowed


@runs
def test_identical_networks_give_log_two_exactly():
    policy, _, target = make_pairs(torch.bfloat16)
    loss, logits, *_ = launch(policy, policy, target, SCALE)
    assert logits.tolist() == [0, 0, 0]
    assert loss.item() == torch.tensor(2.0).log().item()


@runs
def test_upstream_gradient_known_and_unknown():
    """A power of two, so that both give the same bits."""
    policy, reference, target = make_pairs(torch.bfloat16)
    *_, once = launch(policy, reference, target, SCALE)
    for upstream, known in ((0.25, True), (1.0, False)):
        leaf = policy.detach().requires_grad_()
        loss = single_launch_loss(leaf, reference, target, SCALE, upstream, known)
        (0.25 * loss).backward()
        assert torch.equal(leaf.grad, 0.25 * once)


@runs
def test_a_bad_element_stays_in_its_pair():
    policy, reference, target = make_pairs(torch.float32)
    policy[1, 0, 0, 0] = float("nan")
    loss, logits, *_, grad = launch(policy, reference, target, SCALE)
    assert logits.isfinite().tolist() == [True, False, True]
    assert loss.isnan()
    assert grad.isfinite().flatten(1).all(1).tolist() == [True, False, True, True, False, True]


@runs
def test_repeated_launches_are_bitwise_alike():
    inputs = make_pairs(torch.float16, pairs=5)
    first, second = launch(*inputs, SCALE), launch(*inputs, SCALE)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.skipif(INTERPRETED or ON_GPU, reason="this process runs the tests above itself")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", Path(__file__)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 20
