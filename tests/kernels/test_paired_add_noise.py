"""paired_add_noise against the formulas in float64, and bit for bit against PyTorch."""

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from cdpo.kernels import paired_add_noise, philox_normal
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import DTYPES, drawn_cases
from torch import Tensor

module = importlib.import_module("cdpo.kernels.paired_add_noise")
TARGETS = ("epsilon", "v_prediction", "flow", "sample", "affine")
Case = tuple[Tensor, Tensor, Tensor, Tensor]


def make(
    pairs: int = 3,
    shape: tuple[int, ...] = (4, 5, 7),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2 * pairs, *shape, generator=generator).to(dtype)
    keys = torch.tensor([[seed, 5, 2**40 + pair, 1] for pair in range(pairs)])
    angle = torch.rand(pairs, generator=generator)
    return tuple(x.to(device) for x in (latents, keys, angle.cos(), angle.sin()))


def asked(case: Case, target: str) -> dict[str, Any]:
    """The target, and what it needs: here a = 1 - sigma and b = -alpha."""
    _, _, alpha, sigma = case
    return {"target": target, "factors": (1 - sigma, -alpha) if target == "affine" else None}


def oracle(latents: Tensor, keys: Tensor, alpha: Tensor, sigma: Tensor, target: str) -> Case:
    """(noisy, target) in float64 NumPy, pair by pair, from the normals of philox_normal."""
    noise = philox_normal(keys.cpu(), latents.shape[1:]).double().numpy()
    x, pairs = latents.double().cpu().numpy(), len(keys)
    noisy, wanted = np.empty_like(x), np.empty_like(x)
    for row in range(2 * pairs):
        a, s, n = alpha[row % pairs].item(), sigma[row % pairs].item(), noise[row % pairs]
        noisy[row] = a * x[row] + s * n
        wanted[row] = {
            "epsilon": n,
            "v_prediction": a * n - s * x[row],
            "flow": n - x[row],
            "sample": x[row],
            "affine": np.float32(1 - np.float32(s)) * x[row] - a * n,
        }[target]
    return noisy, wanted[:pairs] if target == "epsilon" else wanted


@drawn_cases
@given(
    pairs=st.integers(1, 4),
    shape=st.lists(st.integers(1, 11), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    out=st.sampled_from([None, *DTYPES]),
    target=st.sampled_from(TARGETS),
    seed=st.integers(0, 1000),
)
def test_agrees_with_oracle(backend, device, pairs, shape, dtype, out, target, seed):
    case = make(pairs, shape, dtype, device, seed)
    noisy, wanted = paired_add_noise(*case, **asked(case, target), dtype=out)
    assert noisy.dtype == (out or dtype)
    assert wanted.dtype == torch.float32
    for found, truth in zip((noisy, wanted), oracle(*case, target), strict=True):
        # One ulp of the dtype (the interpreter truncates to bf16) and three float32 roundings of
        # operands below 6
        bound = torch.finfo(found.dtype).eps * np.abs(truth) + 6 * 2.0**-23
        assert found.shape == truth.shape
        assert (np.abs(found.double().cpu().numpy() - truth) <= bound).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(1,), (3, 683), (4, 33, 32)], ids=str)
def test_same_bits_as_pytorch(backend, device, shape, target):
    case = make(2, shape, device=device)
    found = paired_add_noise(*case, **asked(case, target))
    on_cpu = tuple(x.cpu() for x in case)
    plain = module.paired_add_noise_ref(*on_cpu, **asked(on_cpu, target))
    for a, b in zip(found, plain, strict=True):
        assert torch.equal(a.cpu().view(torch.int32), b.view(torch.int32))


def test_noise_is_that_of_philox_normal(backend, device):
    latents, keys, alpha, sigma = make(device=device)
    noisy, noise = paired_add_noise(latents, keys, alpha, sigma)
    assert torch.equal(noise, philox_normal(keys, latents.shape[1:]))
    nothing, _ = paired_add_noise(torch.zeros_like(latents), keys, alpha, sigma)
    assert torch.equal(nothing[:3], nothing[3:])  # winner and loser share it
    assert torch.equal(nothing[:3], sigma.view(3, 1, 1, 1) * noise)
    assert not torch.equal(noisy[:3], noisy[3:])


@pytest.mark.parametrize("target", TARGETS)
def test_channels_last_has_the_same_noise(backend, device, target):
    latents, *rest = case = make(2, (4, 9, 11), device=device)
    options = asked(case, target)
    expected = paired_add_noise(latents, *rest, **options)
    last = latents.to(memory_format=torch.channels_last)
    for found, plain in zip(paired_add_noise(last, *rest, **options), expected, strict=True):
        assert torch.equal(found, plain)
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_other_strides(backend, device):
    latents, keys, alpha, sigma = make(device=device)
    expected = paired_add_noise(latents, keys, alpha, sigma)
    sliced = torch.cat([latents, latents], dim=1)[:, :4]
    every_second = [torch.stack([x, x], dim=-1)[..., 0] for x in (keys, alpha, sigma)]
    for found, plain in zip(paired_add_noise(sliced, *every_second), expected, strict=True):
        assert torch.equal(found, plain)


def test_a_pair_depends_on_itself_alone(backend, device):
    latents, keys, alpha, sigma = make(4, device=device)
    together = paired_add_noise(latents, keys, alpha, sigma, target="flow")
    alone = paired_add_noise(latents[[2, 6]], keys[2:3], alpha[2:3], sigma[2:3], target="flow")
    assert all(torch.equal(a[[2, 6]], b) for a, b in zip(together, alone, strict=True))


def test_every_element_is_written(backend, device, poison):
    for target in TARGETS:
        case = make(device=device)
        assert all(x.isfinite().all() for x in paired_add_noise(*case, **asked(case, target)))


def test_reads_and_writes_nothing_outside(backend, device, fences, monkeypatch):
    case = make(2, (3, 333), device=device)
    expected = paired_add_noise(*case, target="flow")
    fenced = [fences.around(x) for x in case]
    fences.watch(monkeypatch)
    found = paired_add_noise(*fenced, target="flow")
    monkeypatch.undo()
    assert fences.intact()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("target", ["epsilon", "affine"])
def test_opcheck(backend, device, target):
    latents, *rest = case = make(2, (2, 3, 3), device=device)
    factors = asked(case, target)["factors"] or (None, None)
    for x in (latents, latents.to(memory_format=torch.channels_last)):
        args = (x, *rest, *factors, target, torch.bfloat16)
        torch.library.opcheck(torch.ops.cdpo.paired_add_noise, args)


def test_compiles_without_graph_breaks(backend, device):
    def corrupt(*case: Tensor) -> tuple[Tensor, Tensor]:
        noisy, target = paired_add_noise(*case, target="v_prediction")
        return noisy + 1, target

    torch._dynamo.reset()
    compiled = torch.compile(corrupt, fullgraph=True, backend="aot_eager")
    case = make(device=device)
    assert all(torch.equal(a, b) for a, b in zip(compiled(*case), corrupt(*case), strict=True))


LATENTS, KEYS, ALPHA, SIGMA = make(2, (3,))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "latents are torch.float64", {"latents": LATENTS.double()}),
        (TypeError, "latents are torch.int64", {"latents": LATENTS.long()}),
        (TypeError, "dtype is torch.int32", {"dtype": torch.int32}),
        (TypeError, "keys are torch.int32", {"keys": KEYS.int()}),
        (TypeError, "alpha is torch.float64", {"alpha": ALPHA.double()}),
        (ValueError, r"sigma is \(2, 1\); it must be \(2,\)", {"sigma": SIGMA[:, None]}),
        (ValueError, "1 keys for 2 pairs", {"keys": KEYS[:1]}),
        (ValueError, r"latents are \(3, 3\)", {"latents": LATENTS[:3]}),
        (ValueError, r"latents are \(0, 3\)", {"latents": LATENTS[:0]}),
        (ValueError, r"latents are \(4,\)", {"latents": LATENTS[:, 0]}),
        (ValueError, r"latents are \(4, 0\)", {"latents": LATENTS[:, :0]}),
        (ValueError, "target is 'v'; taken are epsilon", {"target": "v"}),
        (ValueError, "factors are for target='affine'", {"target": "affine"}),
        (ValueError, "factors are for target='affine'", {"factors": (ALPHA, SIGMA)}),
        (
            ValueError,
            r"factors of the noise is \(1,\)",
            {"target": "affine", "factors": (ALPHA, SIGMA[:1])},
        ),
        (ValueError, "one device; given latents on cpu", {"sigma": SIGMA.to("meta")}),
        (ValueError, "seed runs from -5", {"keys": KEYS - torch.tensor([5, 0, 0, 0])}),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_input(error, message, arguments):
    good = {"latents": LATENTS, "keys": KEYS, "alpha": ALPHA, "sigma": SIGMA}
    with pytest.raises(error, match=message):
        paired_add_noise(**(good | arguments))
