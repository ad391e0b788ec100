import hashlib

import numpy as np
import pytest
import torch
from cdpo.engine.basics.keyed import (
    Permutation,
    Stream,
    content_id,
    integers,
    make_keys,
    normal,
    uniform,
)
from cdpo.kernels import philox_uint32
from hypothesis import given, settings
from hypothesis import strategies as st

KEYS = make_keys(1, Stream.NOISE, [0, 1, 2**63 - 1], [0, 3, 2**32 - 1])


def test_golden_values_never_change():
    """Runs resume, and shards are filled, by these numbers: a change breaks both in silence."""
    assert content_id("a dog riding a bike") == 5375405552283459347
    assert content_id("a dog", "3", "1") == 3026970228295382088
    assert [hex(int(u * 2**24)) for u in uniform(KEYS)] == ["0x1e674c", "0x6488bc", "0xe6b329"]
    assert integers(KEYS, 1000).tolist() == [118, 392, 901]
    assert [x.hex() for x in normal(KEYS, (2,)).flatten().tolist()] == [
        *("-0x1.fde8180000000p-1", "-0x1.cee2c80000000p+0", "-0x1.95f1f20000000p-2"),
        *("0x1.4efa9e0000000p+0", "0x1.a3bd680000000p-3", "0x1.a15a840000000p-2"),
    ]


@pytest.mark.parametrize(
    ("size", "first", "digest"),
    [(5, [3, 2, 0, 4, 1], "4f19"), (256, [60, 207, 115], "6c6a"), (5000, [2662, 505, 83], "c1ca")],
)
def test_golden_permutations_never_change(size, first, digest):
    entries = Permutation(size, 7, Stream.PAIR_ORDER, 12345, 2).at(np.arange(size))
    assert entries[: len(first)].tolist() == first
    assert hashlib.sha256(entries.astype("<i8").tobytes()).hexdigest()[:4] == digest


def test_content_id_is_a_positive_int64_and_tells_texts_apart():
    ids = {content_id(f"prompt {n}", str(m)) for n in range(100) for m in range(10)}
    assert len(ids) == 1000
    assert all(0 <= number < 2**63 for number in ids)


def test_numbers_do_not_depend_on_the_batch_they_are_drawn_in():
    keys = make_keys(3, Stream.TIMESTEP, list(range(50)), 4)
    alone = torch.cat([uniform(key[None]) for key in keys])
    assert torch.equal(uniform(keys), alone)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(normal(keys[order], (3, 5)), normal(keys, (3, 5))[order])


@pytest.mark.parametrize("changed", ["seed", "stream", "item", "visit"])
def test_every_part_of_a_key_matters(changed):
    base = {"seed": 1, "stream": Stream.NOISE, "item": 5, "visit": 2}
    other = base | {changed: Stream.GUIDANCE if changed == "stream" else 9}
    a, b = (
        normal(make_keys(key["seed"], key["stream"], [key["item"]], key["visit"]), (1000,))
        for key in (base, other)
    )
    assert abs(torch.corrcoef(torch.cat([a, b]))[0, 1]) < 0.12


def test_uniform_integers_and_normal_are_what_they_say():
    keys = make_keys(0, Stream.TIMESTEP, list(range(20_000)))
    u, n, z = uniform(keys), integers(keys, 10), normal(keys, (1,)).flatten()
    assert u.dtype == torch.float32
    assert 0 <= u.min() < u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01
    assert torch.equal(n, philox_uint32(keys, 1)[:, 0] * 10 >> 32)
    counts = torch.bincount(n, minlength=10)
    assert len(counts) == 10
    assert ((counts - 2000.0) ** 2 / 2000).sum() < 27.9  # chi-square, 9 degrees, p = 0.001
    assert abs(z.mean()) < 0.03
    assert abs(z.std() - 1) < 0.03


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5000), st.integers(0, 2**32 - 1), st.integers(0, 2**63 - 1))
def test_a_permutation_is_a_bijection(size, seed, item):
    permutation = Permutation(size, seed, Stream.PAIR_ORDER, item, 0)
    entries = permutation.at(np.arange(size))
    assert entries.dtype == np.int64
    assert np.array_equal(np.sort(entries), np.arange(size))
    assert permutation(size - 1) == entries[-1]


@pytest.mark.parametrize("size", [3, 5, 16, 260])
def test_small_permutations_are_even_enough(size):
    """Each entry lands everywhere: (n-1)/n of chi-square has (n-1)^2 degrees of freedom."""
    runs = 1000
    table = np.zeros((size, size))
    for item in range(runs):
        entries = Permutation(size, 11, Stream.PAIR_BUDGET, item, 0).at(np.arange(size))
        table[np.arange(size), entries] += 1
    expected = runs / size
    degrees = (size - 1) ** 2
    statistic = (size - 1) / size * ((table - expected) ** 2 / expected).sum()
    assert abs(statistic - degrees) < 4 * np.sqrt(2 * degrees)


def test_a_permutation_of_1e8_starts_at_once_and_refuses_what_is_outside():
    permutation = Permutation(10**8, 0, Stream.SHARD_FILL, 1, 0)
    assert 0 <= permutation(10**8 - 1) < 10**8
    with pytest.raises(IndexError, match="outside"):
        permutation(10**8)
    with pytest.raises(ValueError, match="size=0"):
        Permutation(0, 0, Stream.SHARD_FILL, 1, 0)
