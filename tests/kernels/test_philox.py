"""Philox against the vectors published with Random123 and a Philox in Python integers."""

import importlib
import math

import numpy as np
import pytest
import torch
from cdpo.kernels import philox_normal, philox_uint32
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import drawn_cases
from torch import Tensor

module = importlib.import_module("cdpo.kernels.philox")
WORD = 0xFFFFFFFF
KEYS = torch.tensor(
    [[0, 0, 0, 0], [WORD, WORD, 2**63 - 1, WORD], [1, 2, 3, 4], [7, 0, 2**40 + 5, 2**31]]
)


def philox_in_integers(counter: list[int], key: list[int]) -> list[int]:
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high_0, low_0 = divmod(0xD2511F53 * c0, 2**32)
        high_1, low_1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def row_in_integers(key: list[int], count: int) -> list[int]:
    seed, stream, item, visit = key
    words: list[int] = []
    for block in range(-(-count // 4)):
        words += philox_in_integers([block, visit, item % 2**32, item >> 32], [seed, stream])
    return words[:count]


def normals_in_float64(words: list[int]) -> np.ndarray:
    """Box–Muller as the docstring of philox.py has it."""
    x = np.array(words, dtype=np.float64).reshape(-1, 2) // 256
    radius = np.sqrt(-2 * np.log((x[:, 0] + 1) / 2**24))
    angle = 2 * math.pi * x[:, 1] / 2**24
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


# kat_vectors of Random123: counter, key, words of philox4x32-10
VECTORS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([WORD] * 4, [WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS, ids=["zeros", "ones", "pi"])
def test_published_vectors(counter, key, words):
    assert philox_in_integers(counter, key) == words
    found = module.philox_4x32(
        tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key)
    )
    assert [int(word) for word in found] == words


def test_published_vectors_through_the_public_function():
    """Key zero gives the first vector; the third's words go where the docstring says."""
    assert philox_uint32(torch.zeros(1, 4, dtype=torch.int64), 4)[0].tolist() == VECTORS[0][2]
    (_, visit, low, high), (seed, stream), _ = VECTORS[2]
    key = torch.tensor([[seed, stream, (high << 32) + low, visit]])
    expected = row_in_integers(key[0].tolist(), 9)
    assert philox_uint32(key, 9)[0].tolist() == expected


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    word=st.tuples(*[st.integers(0, WORD)] * 3),
    item=st.integers(0, 2**63 - 1),
    count=st.integers(1, 23),
)
def test_words_equal_those_of_python_integers(word, item, count):
    key = [word[0], word[1], item, word[2]]
    assert philox_uint32(torch.tensor([key]), count)[0].tolist() == row_in_integers(key, count)


@drawn_cases
@given(
    word=st.tuples(*[st.integers(0, WORD)] * 3),
    item=st.integers(0, 2**63 - 1),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
)
def test_normals_of_the_words(backend, device, word, item, shape):
    key = [word[0], word[1], item, word[2]]
    found = philox_normal(torch.tensor([key], device=device), shape)
    assert found.shape == (1, *shape)
    assert found.dtype == torch.float32
    size = math.prod(shape)
    truth = normals_in_float64(row_in_integers(key, size + size % 2))[:size]
    np.testing.assert_allclose(found.cpu().flatten().numpy(), truth, rtol=4e-7, atol=1e-6)


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 7, 5), (4, 32, 33), (4096,)], ids=str)
def test_same_bits_from_every_implementation(backend, device, shape):
    found = philox_normal(KEYS.to(device), shape).cpu()
    plain = module.philox_normal_ref(KEYS, shape)
    assert torch.equal(found.view(torch.int32), plain.view(torch.int32))


def test_pinned_normals(backend, device):
    """Changing these changes the noise of every run that users have recorded."""
    found = philox_normal(torch.tensor([[1234, 1, 42, 3]], device=device), (6,))[0].tolist()
    assert [float(x).hex() for x in found] == PINNED


PINNED = [
    "-0x1.feb2c80000000p-2",
    "0x1.fda66c0000000p-1",
    "0x1.c9796c0000000p+0",
    "-0x1.5b901a0000000p-2",
    "-0x1.9ace080000000p-2",
    "0x1.49836a0000000p-1",
]


def test_accuracy():
    """One in 61 of the 2²⁴ radii and angles, in units of float32's last place."""
    x = torch.arange(0, 2**24, 61) << 8
    zero = torch.zeros_like(x)
    radius, _ = module._box_muller_torch(x, zero)
    truth = ((x >> 8).double() + 1).div_(2**24).log_().mul_(-2).sqrt_()
    assert ((radius.double() - truth).abs() <= 2 * 2.0**-23 * truth).all()
    cosine, sine = (n.double() / radius[0].double() for n in module._box_muller_torch(zero, x))
    angle = (x >> 8).double().mul_(2 * math.pi / 2**24)
    assert (cosine - angle.cos()).abs().max() <= 1.5 * 2.0**-23
    assert (sine - angle.sin()).abs().max() <= 1.5 * 2.0**-23


def test_extreme_uniforms_are_finite():
    words = torch.tensor([0, WORD])
    both = [module._box_muller_torch(a.view(1), b.view(1)) for a in words for b in words]
    assert all(n.isfinite() for pair in both for n in pair)
    largest = math.sqrt(48 * math.log(2))
    assert max(abs(n.item()) for pair in both for n in pair) == pytest.approx(largest, rel=1e-6)


def test_a_row_depends_on_its_key_alone(backend, device):
    keys = KEYS.to(device)
    together = philox_normal(keys, (3, 50))
    alone = torch.cat([philox_normal(key[None], (3, 50)) for key in keys])
    assert torch.equal(together, alone)
    assert torch.equal(together.flatten(1)[:, :7], philox_normal(keys, (7,)))


def test_chunks_do_not_show(monkeypatch):
    whole = philox_uint32(KEYS, 999), module.philox_normal_ref(KEYS, (999,))
    monkeypatch.setattr(module, "TORCH_BLOCKS", 31)
    assert torch.equal(philox_uint32(KEYS, 999), whole[0])
    assert torch.equal(module.philox_normal_ref(KEYS, (999,)), whole[1])


@pytest.mark.parametrize("column", range(4))
def test_every_column_matters(column):
    near, far = KEYS[2:3].clone(), KEYS[2:3].clone()
    near[0, column] += 1
    far[0, column] += 2**31
    rows = [philox_uint32(key, 64) for key in (KEYS[2:3], near, far)]
    assert all((a != b).all() for a in rows for b in rows if a is not b)


def test_distribution():
    """Moments of 2²⁰ normals within five standard errors; neighbours and rows uncorrelated."""
    keys = torch.tensor([[5, 6, item, 7] for item in range(16)])
    sample = module.philox_normal_ref(keys, (2**16,)).double()
    n = sample.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((sample**power).mean() - moment) < 5 * math.sqrt(variance / n)
    for lag in (1, 2, 3, 4):
        assert abs((sample[:, lag:] * sample[:, :-lag]).mean()) < 5 / math.sqrt(n)
    correlation = torch.corrcoef(sample) - torch.eye(16)
    assert correlation.abs().max() < 5 / math.sqrt(2**16)


def test_every_element_is_written(backend, device, poison):
    assert philox_normal(KEYS.to(device), (3, 683)).isfinite().all()


def test_reads_and_writes_nothing_outside(backend, device, fences, monkeypatch):
    keys = fences.around(KEYS.to(device))
    expected = philox_normal(keys, (999,))
    fences.watch(monkeypatch)
    found = philox_normal(keys, (999,))
    monkeypatch.undo()
    assert fences.intact()
    assert torch.equal(found, expected)


def test_non_contiguous_keys(backend, device):
    keys = KEYS.to(device)
    assert torch.equal(philox_normal(keys.t().contiguous().t(), (9,)), philox_normal(keys, (9,)))


def test_opcheck(backend, device):
    torch.library.opcheck(torch.ops.cdpo.philox_normal, (KEYS.to(device), [3, 5]))


def test_compiles_without_graph_breaks(backend, device):
    def draw(keys: Tensor) -> tuple[Tensor, Tensor]:
        return philox_normal(keys, (3, 5)) * 2, philox_uint32(keys, 6) + 1

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    keys = KEYS.to(device)
    assert all(torch.equal(a, b) for a, b in zip(compiled(keys), draw(keys), strict=True))


@pytest.mark.parametrize(
    ("error", "message", "keys", "shape"),
    [
        (TypeError, "keys are torch.int32", KEYS.int(), (3,)),
        (ValueError, r"keys are \(4, 3\)", KEYS[:, :3], (3,)),
        (ValueError, r"keys are \(4,\)", KEYS[0], (3,)),
        (ValueError, r"keys are \(0, 4\)", KEYS[:0], (3,)),
        (ValueError, "at least one element", KEYS, (3, 0)),
        (
            ValueError,
            r"seed runs from -1 to .*\[0, 2\^32\)",
            KEYS - torch.tensor([1, 0, 0, 0]),
            (3,),
        ),
        (ValueError, r"visit runs .*\[0, 2\^32\)", KEYS + torch.tensor([0, 0, 0, 1]), (3,)),
        (ValueError, r"item_id runs .*\[0, 2\^63\)", KEYS - torch.tensor([0, 0, 1, 0]), (3,)),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_input(error, message, keys, shape):
    with pytest.raises(error, match=message):
        philox_normal(keys, shape)


def test_bad_count():
    with pytest.raises(ValueError, match="count is 0"):
        philox_uint32(KEYS, 0)
