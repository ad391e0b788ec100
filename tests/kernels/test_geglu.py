"""geglu against a float64 oracle that is written from the formulas in NumPy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cdpo.kernels import geglu
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import DTYPES, assert_loses_at_most_twice, drawn_cases
from torch import Tensor


def make(
    shape: tuple[int, ...] = (3, 5, 14),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """A projection (..., 2D) and a gradient of the output (..., D)."""
    generator = torch.Generator().manual_seed(seed)
    projected = 3 * torch.randn(shape, generator=generator)
    grad = torch.randn((*shape[:-1], shape[-1] // 2), generator=generator)
    return projected.to(dtype).to(device), grad.to(dtype).to(device)


def run(projected: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = projected.detach().requires_grad_()
    out = geglu(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


def oracle(projected: Tensor, grad: Tensor) -> tuple[np.ndarray, np.ndarray]:
    hidden, gate = np.split(projected.double().cpu().numpy(), 2, -1)
    d_out = grad.double().cpu().numpy()
    distribution = 0.5 * np.vectorize(math.erfc)(-gate / math.sqrt(2))
    density = np.exp(-(gate**2) / 2) / math.sqrt(2 * math.pi)
    d_gate = d_out * hidden * (distribution + gate * density)
    return hidden * gate * distribution, np.concatenate([d_out * gate * distribution, d_gate], -1)


def plain(projected: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """What a user types into PyTorch, in float32."""
    leaf = projected.detach().float().cpu().requires_grad_()
    hidden, gate = leaf.chunk(2, -1)
    out = hidden * F.gelu(gate)
    return out.detach(), torch.autograd.grad(out, leaf, grad.float().cpu())[0]


def check(projected: Tensor, grad: Tensor) -> None:
    for found, true, typed in zip(
        run(projected, grad), oracle(projected, grad), plain(projected, grad), strict=True
    ):
        assert_loses_at_most_twice(found, true, typed)
        assert found.dtype == projected.dtype


@drawn_cases
@given(
    space=st.lists(st.integers(1, 6), max_size=3),
    width=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_agrees_with_oracle(backend, device, space, width, dtype, seed):
    check(*make((*space, 2 * width), dtype, device, seed))


@pytest.mark.parametrize("width", [1, 127, 128, 1023, 1024, 1025, 5120])
def test_widths_around_blocks(backend, device, width):
    check(*make((2, 2 * width), torch.bfloat16, device))


def test_extreme_gates(backend, device):
    gate = torch.tensor([-1e30, -200.0, -40.0, -6.0, -0.0, 0.0, 6.0, 40.0, 1e30], device=device)
    projected = torch.cat([torch.full_like(gate, 0.5), gate]).view(1, -1)
    grad = torch.ones_like(gate).view(1, -1)
    out, grad_projected = run(projected, grad)
    assert out.isfinite().all()
    assert grad_projected.isfinite().all()
    check(projected, grad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [2, 9])
def test_non_finite_input_stays_in_its_element(backend, device, bad, where):
    projected, grad = make((3, 14), device=device)
    projected[1, where] = bad
    out, grad_projected = run(projected, grad)
    healthy = torch.ones_like(out, dtype=torch.bool)
    healthy[1, 2] = False
    assert (out.isfinite() | ~healthy).all()
    assert not out[1, 2].isfinite()
    assert (grad_projected.isfinite() | ~torch.cat([healthy, healthy], -1)).all()


def test_gradcheck():
    assert torch.autograd.gradcheck(geglu, make((3, 8), torch.float64)[0].requires_grad_())


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded grad"])
def test_any_strides(backend, device, layout):
    projected, grad = make((6, 4, 10), device=device)
    if layout == "expanded grad":
        grad = torch.ones((), device=device).expand(6, 4, 5)
    expected = run(projected, grad.contiguous())
    if layout == "transposed":
        projected = projected.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "sliced":
        projected = torch.cat([projected, projected], -1)[..., :10]
    for found, right in zip(run(projected, grad), expected, strict=True):
        assert torch.equal(found, right)


def test_every_element_is_written(backend, device, poison):
    check(*make((7, 3, 46), torch.float16, device))


def test_reads_and_writes_nothing_outside(backend, device, fences, monkeypatch):
    projected, grad = make((3, 5, 22), device=device)
    expected = run(projected, grad)
    projected, grad = fences.around(projected), fences.around(grad)
    fences.watch(monkeypatch)
    found = run(projected, grad)
    monkeypatch.undo()
    assert fences.intact()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradient_leaves_grad_output_alone(backend, device):
    projected, grad = make(device=device)
    before = grad.clone()
    run(projected, grad)
    assert torch.equal(grad, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, device, dtype):
    projected, grad = make(dtype=dtype, device=device)
    torch.library.opcheck(torch.ops.cdpo.geglu, (projected.clone().requires_grad_(),))
    torch.library.opcheck(torch.ops.cdpo.geglu_backward, (grad, projected))


@pytest.mark.parametrize("layout", [(1, 0, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0)], ids=str)
def test_opcheck_of_permuted_inputs(backend, device, layout):
    back = sorted(range(4), key=layout.__getitem__)
    shape = (3, 2, 4, 6)
    projected = torch.randn([shape[axis] for axis in layout], device=device).permute(back)
    grad = torch.randn(3, 2, 4, 3, device=device)
    torch.library.opcheck(torch.ops.cdpo.geglu, (projected.detach().requires_grad_(),))
    torch.library.opcheck(torch.ops.cdpo.geglu_backward, (grad, projected))


def test_compiles_without_graph_breaks(backend, device):
    def step(projected: Tensor) -> Tensor:
        return geglu(projected * 2).tanh()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 5, 8), (3, 4, 10)):
        projected, grad = make(shape, device=device)
        projected.requires_grad_()
        expected, found = step(projected), compiled(projected)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        grads = [torch.autograd.grad(out, projected, grad) for out in (found, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("error", "message", "projected"),
    [
        (ValueError, r"projected is \(2, 5\); it must be \(..., 2D\)", torch.zeros(2, 5)),
        (ValueError, r"projected is \(0, 4\)", torch.zeros(0, 4)),
        (ValueError, r"projected is \(\)", torch.zeros(())),
        (TypeError, r"projected is torch.int64", torch.zeros(2, 4).long()),
        (TypeError, r"projected is torch.complex64", torch.zeros(2, 4).cfloat()),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_input(error, message, projected):
    with pytest.raises(error, match=message):
        geglu(projected)
