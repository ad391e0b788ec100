"""A backward is one operation of ours: by default autograd makes zeros for outputs without one."""

from collections.abc import Callable

import pytest
import torch
from cdpo.kernels import geglu, group_norm_silu, paired_dpo_loss
from torch import Tensor

CASES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "paired_dpo_loss": (
        lambda x: paired_dpo_loss(x, torch.zeros_like(x), torch.zeros_like(x[:2]), 1.0).loss,
        (4, 3, 8),
    ),
    "group_norm_silu": (lambda x: group_norm_silu(x, 2), (2, 4, 6)),
    "geglu": (geglu, (3, 8)),
}


@pytest.mark.parametrize("kernel", CASES)
def test_backward_is_one_operation(backend, device, operations, kernel):
    function, shape = CASES[kernel]
    x = torch.randn(shape, device=device, requires_grad=True)
    out = function(x)
    grad = torch.randn(out.shape, device=device)
    with operations:
        torch.autograd.grad(out, x, grad)
    computing = [name for name in operations.names if name not in ("aten::detach", "aten::empty")]
    allocating = ("aten::new_empty", "aten::empty_like", "aten::empty.memory_format")
    assert [name for name in computing if name not in allocating] == [f"cdpo::{kernel}_backward"]


@pytest.mark.parametrize("kernel", ["paired_dpo_loss", "group_norm_silu"])
def test_second_derivatives_are_refused(backend, device, kernel):
    function, shape = CASES[kernel]
    x = torch.randn(shape, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(grad.sum(), x)


@pytest.mark.parametrize("kernel", ["group_norm_silu", "geglu"])
def test_what_is_not_differentiated_is_the_same(backend, device, kernel):
    function, shape = CASES[kernel]
    x = torch.randn(shape, device=device, requires_grad=True)
    recorded = function(x)
    with torch.no_grad():
        torch.testing.assert_close(function(x), recorded, rtol=0, atol=0)
    plain = function(x.detach())
    torch.testing.assert_close(plain, recorded, rtol=0, atol=0)
    assert recorded.requires_grad and not plain.requires_grad
