"""Keyed randomness: every random number is a pure function of (seed, stream, item, visit).

``seed`` is the recipe's; ``stream`` says what the number is for, so that no two uses ever share
one; ``item`` is a stable 63-bit id (of a pair, a prompt, a candidate); ``visit`` numbers the
traversals of the data, so that a pair met again gets new noise. The generator is Philox 4x32-10
(Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*, SC 2011): the same bits on CPU, in
the Triton interpreter and on a GPU, whatever the batch size, worker count, world size or history.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch

from ...kernels import philox_normal, philox_uint32

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_ROUNDS = np.arange(10, dtype=np.uint64)[:, None, None]
_INCREMENTS = _ROUNDS * np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)


class Stream(IntEnum):
    """What a random number is for. Values are part of the data format: append, never renumber."""

    CANDIDATE_NOISE = 1
    COMPARE_NOISE = 2
    SAMPLE_NOISE = 3
    TIMESTEP = 4
    NOISE = 5
    GUIDANCE = 6
    CAPTION_DROPOUT = 7
    PAIR_BUDGET = 8
    SHARD_FILL = 9
    SHARD_ORDER = 10
    PAIR_ORDER = 11
    BOOTSTRAP = 12
    ADAPTER_DROPOUT = 13
    POSTERIOR = 14
    PROMPT_MASK = 15
    PROMPT_SPLIT = 16
    VALIDATION_SPLIT = 17
    VALIDATION_NOISE = 18


def content_id(*parts: str) -> int:
    """A stable 63-bit id of some text, e.g. of a prompt: independent of the order of a file."""
    digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_keys(
    seed: int,
    stream: Stream,
    items: Sequence[int] | torch.Tensor,
    visits: Sequence[int] | torch.Tensor | int = 0,
) -> torch.Tensor:
    """Keys (N, 4) int64 with columns (seed, stream, item, visit), as the kernels take them."""
    items = torch.as_tensor(items, dtype=torch.int64)
    visits = torch.as_tensor(visits, dtype=torch.int64, device=items.device).expand_as(items)
    head = torch.tensor([seed, int(stream)], dtype=torch.int64, device=items.device)
    return torch.cat([head.expand(len(items), 2), torch.stack([items, visits], dim=1)], dim=1)


def uniform(keys: torch.Tensor) -> torch.Tensor:
    """One float32 in [0, 1) a key: the upper 24 bits of the first word, so every value is exact.
    Keys and numbers lie in host memory.
    """
    return torch.from_numpy((_first_words(keys) >> 8).astype(np.float32) * np.float32(2.0**-24))


def integers(keys: torch.Tensor, high: int) -> torch.Tensor:
    """One int64 in [0, high) a key, high <= 2**31; bias at most high / 2**32 (multiply-shift).
    Keys and numbers lie in host memory.
    """
    return torch.from_numpy(_first_words(keys) * high >> 32)


def _first_words(keys: torch.Tensor) -> np.ndarray:
    """`philox_uint32(keys, 1)[:, 0]`, int64 (N,), in a third of its operations and without
    PyTorch's dispatch, which for a handful of numbers is all that they cost. What the generator
    works on lies in rows: words 0 and 2, words 1 and 3, and the two halves of the key.
    """
    seed_and_stream, item, visit = np.split(keys.numpy().astype(np.uint64).T, (2, 3))
    even = np.concatenate([np.zeros_like(item), item & _LOW])
    odd = np.concatenate([visit, item >> _HALF])
    for key in (seed_and_stream + _INCREMENTS) & _LOW:
        product = even * _MULTIPLIERS
        even = (product >> _HALF)[::-1] ^ odd ^ key
        odd = (product & _LOW)[::-1]
    return even[0].astype(np.int64)


def normal(keys: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Standard normal float32 (N, *shape), one independent field a key."""
    return philox_normal(keys, tuple(shape))


class Permutation:
    """A keyed permutation of range(size) that computes any entry alone, in constant memory.

    A four-round Feistel network over the smallest even number of bits that holds ``size``, walked
    along its cycle until it lands inside (Black and Rogaway, *Ciphers with Arbitrary Finite
    Domains*, 2002): at most four times as many evaluations as entries on average, so a shuffle of
    1e8 pairs costs nothing to start and resumes anywhere. Four rounds on a few bits are visibly
    uneven (13 % off at 5 entries), so up to ``TABLE_SIZE`` entries are sorted by random words.
    """

    TABLE_SIZE = 256

    def __init__(self, size: int, seed: int, stream: Stream, item: int, visit: int) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, got size={size}")
        self.size = size
        keys = make_keys(seed, stream, [item], visit)
        self._table: np.ndarray | None = None
        if size <= self.TABLE_SIZE:
            self._table = np.argsort(philox_uint32(keys, size)[0].numpy(), kind="stable")
            return
        self._half = ((size - 1).bit_length() + 1) // 2
        self._round_keys = philox_uint32(keys, 8)[0].numpy().astype(np.uint64)

    def __call__(self, index: int) -> int:
        """The entry at ``index``."""
        return int(self.at(np.asarray([index]))[0])

    def at(self, indices: np.ndarray) -> np.ndarray:
        """Entries (int64) at many indices of [0, size)."""
        indices = np.asarray(indices)
        if len(indices) and (indices.min() < 0 or indices.max() >= self.size):
            raise IndexError(f"index outside [0, {self.size})")
        if self._table is not None:
            return self._table[indices]
        values = self._encrypt(indices.astype(np.uint64))
        while (outside := values >= self.size).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        half, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = values >> half, values & mask
        for key, tweak in zip(self._round_keys[:4], self._round_keys[4:], strict=True):
            left, right = right, left ^ (_mix(right, key, tweak) & mask)
        return (left << half) | right


def _mix(values: np.ndarray, key: np.uint64, tweak: np.uint64) -> np.ndarray:
    """A 64-bit finaliser (splitmix64's constants) of values + key; wrapping on purpose."""
    with np.errstate(over="ignore"):
        mixed = values + (key << np.uint64(32) | tweak)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
