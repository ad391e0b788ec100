"""group_norm_silu against a float64 oracle that is written from the formulas in NumPy."""

import importlib
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cdpo.kernels import group_norm_silu
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import DTYPES, assert_loses_at_most_twice, drawn_cases
from torch import Tensor

module = importlib.import_module("cdpo.kernels.group_norm_silu.op")

Device = torch.device | str


class Case(NamedTuple):
    x: Tensor
    groups: int
    weight: Tensor | None
    bias: Tensor | None
    grad: Tensor
    silu: bool = True

    def run(self) -> tuple[Tensor, list[Tensor]]:
        """Output and the gradients of x and, where given, weight and bias."""
        leaves = [
            t.detach().requires_grad_() for t in (self.x, self.weight, self.bias) if t is not None
        ]
        out = group_norm_silu(leaves[0], self.groups, *leaves[1:], silu=self.silu)
        return out, list(torch.autograd.grad(out, leaves, self.grad))


def make(
    shape: tuple[int, ...] = (2, 12, 5, 7),
    groups: int = 3,
    dtype: torch.dtype = torch.float32,
    *,
    affine: torch.dtype | None = torch.float32,
    silu: bool = True,
    mean: float = 0.0,
    spread: float = 1.0,
    channels_last: bool = True,
    seed: int = 0,
    device: Device = "cpu",
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731

    def big() -> Tensor:
        rows = draw(shape[0], *shape[2:], shape[1])
        return rows.movedim(-1, 1) if channels_last else rows.movedim(-1, 1).contiguous()

    x, grad = (big() * spread + mean).to(dtype), big().to(dtype)
    weight = bias = None
    if affine is not None:
        weight, bias = (1 + draw(shape[1])).to(affine), draw(shape[1]).to(affine)
    moved = [None if t is None else t.to(device) for t in (x, weight, bias, grad)]
    return Case(moved[0], groups, moved[1], moved[2], moved[3], silu)


def oracle(case: Case, eps: float = 1e-5) -> tuple[np.ndarray, list[np.ndarray]]:
    """Sample by sample and group by group, in float64."""
    x, grad = (t.detach().cpu().double().numpy() for t in (case.x, case.grad))
    samples, channels = x.shape[:2]
    x, grad = x.reshape(samples, channels, -1), grad.reshape(samples, channels, -1)
    ones, zeros = np.ones(channels), np.zeros(channels)
    weight = ones if case.weight is None else case.weight.cpu().double().numpy()
    bias = zeros if case.bias is None else case.bias.cpu().double().numpy()
    out, grad_x = np.empty_like(x), np.empty_like(x)
    grad_weight, grad_bias = np.zeros(channels), np.zeros(channels)
    width = channels // case.groups
    for n in range(samples):
        for first in range(0, channels, width):
            own = slice(first, first + width)
            values, w = x[n, own], weight[own, None]
            deviation = values - values.mean()
            rstd = 1 / np.sqrt((deviation**2).mean() + eps)
            normal = deviation * rstd
            z = normal * w + bias[own, None]
            dz = grad[n, own]
            sigmoid = np.exp(-np.logaddexp(0, -z))
            out[n, own] = z * sigmoid if case.silu else z
            if case.silu:
                dz = dz * (sigmoid + z * sigmoid * (1 - sigmoid))
            grad_weight[own] += (dz * normal).sum(1)
            grad_bias[own] += dz.sum(1)
            inner = dz * w
            grad_x[n, own] = rstd * (inner - inner.mean() - normal * (inner * normal).mean())
    shape = tuple(case.x.shape)
    grads = [grad_x.reshape(shape)]
    return out.reshape(shape), grads + ([grad_weight, grad_bias] if case.weight is not None else [])


def plain(case: Case) -> tuple[Tensor, list[Tensor]]:
    """What a user types into PyTorch, in float32."""
    given = [t for t in (case.x, case.weight, case.bias) if t is not None]
    leaves = [t.detach().float().cpu().contiguous().requires_grad_() for t in given]
    out = F.group_norm(leaves[0], case.groups, *leaves[1:])
    out = F.silu(out) if case.silu else out
    return out, list(torch.autograd.grad(out, leaves, case.grad.float().cpu().contiguous()))


def check(case: Case) -> None:
    out, grads = case.run()
    truth, true_grads = oracle(case)
    plain_out, plain_grads = plain(case)
    results = zip((out, *grads), (truth, *true_grads), (plain_out, *plain_grads), strict=True)
    for found, true, typed in results:
        summed = case.x.numel() / true.size if true.ndim == 1 else 0  # terms of order 1 cancel
        assert_loses_at_most_twice(found, true, typed, size=math.sqrt(summed))
    assert out.dtype == grads[0].dtype == case.x.dtype


@drawn_cases
@given(
    samples=st.integers(1, 4),
    groups=st.integers(1, 5),
    width=st.integers(1, 13),
    space=st.lists(st.integers(1, 9), max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    affine=st.sampled_from([None, *DTYPES]),
    silu=st.booleans(),
    mean=st.sampled_from([0.0, 3.0]),
    channels_last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_agrees_with_oracle(backend, device, samples, groups, width, space, **choices):  # type: ignore[no-untyped-def]
    # PyTorch, the yardstick, refuses a single element; a group of few elements divides by √eps
    space = space if width * math.prod(space) > 3 else (2, 3)
    check(make((samples, groups * width, *space), groups, device=device, **choices))


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 320, 24, 17), 32), ((2, 130, 9, 9), 13), ((1, 8, 4099), 2), ((1, 64, 64, 65), 64)],
    ids=str,
)
def test_sizes_around_tiles_and_chunks(backend, device, shape, groups):
    check(make(shape, groups, torch.bfloat16, device=device))


def test_many_groups_chunks_and_tiles(backend, device, monkeypatch):
    """The loops over tiles of a chunk, and over groups and chunks, run several times."""
    monkeypatch.setattr(module, "BLOCK_CHANNELS", 16)
    monkeypatch.setattr(module, "SUMS_TILES", 1)
    monkeypatch.setattr(module, "CHUNKS", 9)
    monkeypatch.setattr(module, "COMBINED", 1)
    module._cut.cache_clear()
    check(make((2, 70, 79), 35, device=device))
    module._cut.cache_clear()


def test_variance_far_from_zero(backend, device):
    """E[x²] − E[x]² would lose the variance of 1e-4 in the square of a mean of 1000."""
    case = make((2, 32, 16, 16), 4, mean=1000.0, spread=0.01, silu=False, device=device)
    out, _ = case.run()
    truth, _ = oracle(case)
    assert np.abs(out.detach().cpu().numpy() - truth).max() < 1e-2
    values = case.x.double().cpu().unflatten(1, (4, 8)).flatten(2)
    rstd = 1 / (values.var(2, correction=0) + 1e-5).sqrt()
    _, _, found = torch.ops.cdpo.group_norm_silu(case.x, None, None, 4, 1e-5, False)
    torch.testing.assert_close(found.cpu().double(), rstd, rtol=1e-4, atol=0)


def test_constant_input_gives_the_bias(backend, device):
    case = make((2, 6, 4, 4), 2, silu=False, device=device)
    out = group_norm_silu(torch.full_like(case.x, 7.0), 2, case.weight, case.bias, silu=False)
    assert torch.equal(out, case.bias.view(-1, 1, 1).expand_as(out))  # type: ignore[union-attr]


@pytest.mark.parametrize("z", [-200.0, -90.0, 90.0, 200.0])
def test_silu_in_its_tails(backend, device, z):
    x = torch.tensor([[-1.0, 1.0]], device=device).repeat(1, 3).view(1, 1, 6)
    weight, bias = torch.tensor([1e-3], device=device), torch.tensor([z], device=device)
    out = group_norm_silu(x, 1, weight, bias)
    assert out.isfinite().all()
    torch.testing.assert_close(out, torch.full_like(out, max(z, 0.0)), rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_input_stays_in_its_group(backend, device, bad):
    case = make((2, 12, 5, 7), 3, device=device)
    case.x[1, 5, 2, 3] = bad  # sample 1, group 1
    out, (grad_x, *_) = case.run()
    for result in (out, grad_x):
        finite = result.isfinite().unflatten(1, (3, 4)).flatten(2)
        expected = torch.ones_like(finite)
        expected[1, 1] = False
        assert torch.equal(finite.all(2), expected.all(2))
    assert out[1, 4:8].isnan().all()


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_gradcheck(silu, affine):
    case = make((2, 6, 2, 3), 2, torch.float64, affine=torch.float64 if affine else None)
    leaves = [t.clone().requires_grad_() for t in (case.x, case.weight, case.bias) if t is not None]
    assert torch.autograd.gradcheck(
        lambda x, *more: group_norm_silu(x, 2, *more, silu=silu), leaves
    )


def test_frozen_weights_get_no_gradient(backend, device):
    case = make(device=device)
    x = case.x.clone().requires_grad_()
    out = group_norm_silu(x, case.groups, case.weight, case.bias)
    (grad,) = torch.autograd.grad(out, x, case.grad)
    torch.testing.assert_close(grad, case.run()[1][0], rtol=0, atol=0)


def test_gradient_leaves_grad_output_alone_and_takes_any_layout(backend, device):
    case = make(device=device)
    before = case.grad.clone()
    _, expected = case.run()
    assert torch.equal(case.grad, before)
    for grad in (case.grad.contiguous(), case.grad.double()):
        _, found = case._replace(grad=grad).run()
        torch.testing.assert_close(found, expected)
    ones = torch.ones((), device=device).expand(case.x.shape)
    check(case._replace(grad=ones))


# -------------------------------------------------------------------------------- memory and layout


def test_channels_last_is_read_as_it_lies(backend, device):
    case = make((2, 12, 5, 7), device=device)
    assert case.x.is_contiguous(memory_format=torch.channels_last)
    out, (grad_x, *_) = case.run()
    for result in (out, grad_x):
        assert result.is_contiguous(memory_format=torch.channels_last)
    assert module._to_rows(case.x).data_ptr() == case.x.data_ptr()
    tokens = torch.randn(2, 35, 12, device=device).transpose(1, 2)  # as diffusers' attention does
    assert module._to_rows(tokens).data_ptr() == tokens.data_ptr()


@pytest.mark.parametrize("layout", ["NCHW", "sliced", "transposed"])
def test_any_strides(backend, device, layout):
    case = make(device=device)
    x = {
        "NCHW": lambda t: t.contiguous(),
        "sliced": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    }[layout](case.x)
    found, expected = case._replace(x=x).run(), case.run()
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


def test_every_element_is_written(backend, device, poison):
    check(make((3, 20, 7, 9), 4, device=device))


@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (1, 70, 11)], ids=str)
def test_reads_and_writes_nothing_outside(backend, device, shape, fences, monkeypatch):
    case = make(shape, 2, device=device)
    expected = case.run()
    around = [t if not isinstance(t, Tensor) else fences.around(t) for t in case]
    fences.watch(monkeypatch)
    out, grads = Case(*around).run()
    monkeypatch.undo()
    assert fences.intact()
    assert torch.equal(out, expected[0])
    assert all(torch.equal(a, b) for a, b in zip(grads, expected[1], strict=True))


def test_deterministic_and_independent_of_the_batch(backend, device):
    case = make((3, 24, 40, 41), 4, torch.bfloat16, device=device)
    out, (grad, *_) = case.run()
    again, (grad_again, *_) = case.run()
    assert torch.equal(out, again)
    assert torch.equal(grad, grad_again)
    alone, (grad_alone, *_) = case._replace(x=case.x[1:2], grad=case.grad[1:2]).run()
    assert torch.equal(out[1:2], alone)
    assert torch.equal(grad[1:2], grad_alone)


# ------------------------------------------------------------------------------------ torch.library


@pytest.mark.parametrize(
    ("dtype", "channels_last", "affine"),
    [
        (torch.float32, True, True),
        (torch.bfloat16, False, True),
        (torch.bfloat16, True, False),
        (torch.float32, False, False),
    ],
    ids=str,
)
def test_opcheck(backend, device, dtype, channels_last, affine):
    affine_dtype = torch.float32 if affine else None
    case = make(dtype=dtype, channels_last=channels_last, affine=affine_dtype, device=device)
    leaves = [t if t is None else t.requires_grad_() for t in (case.x, case.weight, case.bias)]
    torch.library.opcheck(torch.ops.cdpo.group_norm_silu, (*leaves, 3, 1e-5, True))
    plain = [t if t is None else t.detach() for t in leaves]
    _, mean, rstd = torch.ops.cdpo.group_norm_silu(*plain, 3, 1e-5, True)
    torch.library.opcheck(
        torch.ops.cdpo.group_norm_silu_backward, (case.grad, *plain, mean, rstd, True, affine)
    )


def test_compiles_without_graph_breaks(backend, device):
    def step(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm_silu(x * 2, 3, weight, bias).tanh()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 12, 5, 7), (3, 12, 4, 8)):
        case = make(shape, device=device)
        leaves = [t.requires_grad_() for t in (case.x, case.weight, case.bias) if t is not None]
        expected, found = step(*leaves), compiled(*leaves)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        grads = [torch.autograd.grad(out, leaves, case.grad) for out in (found, expected)]
        torch.testing.assert_close(*grads)


# -------------------------------------------------------------------------------------- bad input

X, W = torch.zeros(2, 6, 3), torch.zeros(6)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"x is \(6,\); it must be \(N, C", {"x": torch.zeros(6)}),
        (ValueError, r"x is \(0, 6, 3\)", {"x": torch.zeros(0, 6, 3)}),
        (ValueError, r"x is \(2, 6, 0\)", {"x": torch.zeros(2, 6, 0)}),
        (TypeError, r"x is torch.int64", {"x": X.long()}),
        (TypeError, r"weight is torch.complex64", {"weight": W.cfloat()}),
        (ValueError, r"num_groups is 4 for 6 channels", {"num_groups": 4}),
        (ValueError, r"num_groups is 12 for 6 channels", {"num_groups": 12}),
        (ValueError, r"num_groups is 0", {"num_groups": 0}),
        (ValueError, r"weight and bias come together", {"bias": None}),
        (ValueError, r"bias is \(5,\); it must be \(6,\)", {"bias": torch.zeros(5)}),
        (ValueError, r"one device; given x on cpu.*bias on meta", {"bias": W.to("meta")}),
        (ValueError, r"eps is -1.0", {"eps": -1.0}),
        (ValueError, r"eps is nan", {"eps": math.nan}),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_input(error, message, arguments):
    good = {"x": X, "num_groups": 3, "weight": W, "bias": W}
    with pytest.raises(error, match=message):
        group_norm_silu(**(good | arguments))
