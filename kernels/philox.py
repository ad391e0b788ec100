"""Keyed noise: Philox 4x32-10 and Box–Muller in one launch, a pure function of the key.

A row's key is (seed, stream, item_id, visit). Its element e is lane e mod 4 of the block

    philox4x32-10(counter = (e div 4, visit, item_id mod 2³², item_id div 2³²),
                  key     = (seed, stream))

and four words x0…x3 make four normals, (x0, x1) → (n0, n1) and (x2, x3) → (n2, n3):

    u = ((x_even >> 8) + 1) · 2⁻²⁴ ∈ (0, 1]        a = 2π · (x_odd >> 8) · 2⁻²⁴ ∈ [0, 2π)
    n_even = √(−2 ln u) · cos a                    n_odd = √(−2 ln u) · sin a

Both uniforms are exact in float32; the largest normal is 5.77. Logarithm, sine and cosine are the
polynomials of the Cephes library (errors under 2 ulp), written out in single multiplications and
additions, none of them fused, and the root is rounded correctly: so not the words alone but the
normals too are the same bits in PyTorch, in the interpreter and on a GPU. They also cost less there
than libdevice's sine with its slow path for huge angles.

Layout: a program makes BLOCK counters of one row and stores 4·BLOCK neighbouring float32. Elements
are counted in logical (row-major) order, whatever the memory format of the tensor they are for.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011; the test vectors are
those of their Random123 library. Moshier, Cephes, single/logf.c and sinf.c.
"""

# Triton functions have no Python types:
# mypy: allow-untyped-defs, allow-incomplete-defs

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .dispatch import NO_FUSION, CompileSpec, launch, takes_triton, tl, triton

MAX_BLOCK = 512  # counters a program: 2048 normals, 16-byte stores
TORCH_BLOCKS = 1 << 16  # counters at a time in PyTorch, whose int64 temporaries take 40 times that
M0, M1 = 0xD2511F53, 0xCD9E8D57  # multipliers
W0, W1 = 0x9E3779B9, 0xBB67AE85  # key increments: golden ratio, √3 − 1
LOW = 0xFFFFFFFF
LOG_COEFFICIENTS = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)


# ---------------------------------------------------------------------------------------- forward


@triton.jit
def philox_round(c0, c1, c2, c3, k0, k1):
    """One round; a 32x32 product in uint64 is one mul.wide.u32 and holds both halves."""
    product_0 = c0.to(tl.uint64) * 0xD2511F53
    product_1 = c2.to(tl.uint64) * 0xCD9E8D57
    new_0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ k0
    new_2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
    return new_0, product_1.to(tl.uint32), new_2, product_0.to(tl.uint32)


@triton.jit
def philox_block(keys_ptr, row, block):
    """The four words of counters `block` (uint32) under the key of a row (int64)."""
    key = keys_ptr + row * 4
    seed = tl.load(key).to(tl.uint64)
    stream = tl.load(key + 1).to(tl.uint64)
    item = tl.load(key + 2).to(tl.uint64)
    zero = tl.zeros_like(block)
    c0 = block
    c1 = zero + tl.load(key + 3).to(tl.uint32)
    c2 = zero + item.to(tl.uint32)
    c3 = zero + (item >> 32).to(tl.uint32)
    for step in tl.static_range(10):
        k0 = (seed + (step * 0x9E3779B9) % 0x100000000).to(tl.uint32)
        k1 = (stream + (step * 0xBB67AE85) % 0x100000000).to(tl.uint32)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
    return c0, c1, c2, c3


@triton.jit
def box_muller(x_even, x_odd):
    """Two normals from two words. (x >> 8) < 2²⁴: exact in int32 and in float32."""
    # u = fraction · 2^exponent, fraction in [√½, √2)
    bits = ((x_even >> 8).to(tl.int32) + 1).to(tl.float32).to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) - 150).to(tl.float32)
    fraction = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    small = fraction < 0.70710677
    exponent = tl.where(small, exponent - 1.0, exponent)
    x = tl.where(small, fraction + fraction, fraction) - 1.0
    z = x * x
    y = 7.0376836292e-2 * x - 1.1514610310e-1
    y = y * x + 1.1676998740e-1
    y = y * x - 1.2420140846e-1
    y = y * x + 1.4249322787e-1
    y = y * x - 1.6668057665e-1
    y = y * x + 2.0000714765e-1
    y = y * x - 2.4999993993e-1
    y = y * x + 3.3333331174e-1
    y = y * x * z - 2.12194440e-4 * exponent - 0.5 * z
    log_u = x + y + 0.693359375 * exponent
    radius = tl.sqrt_rn(-2.0 * log_u)

    # angle = quadrant · π/2 + a, a in [−π/4, π/4]
    turn = (x_odd >> 8).to(tl.int32)
    quadrant = (turn + 0x200000) >> 22
    a = (turn - (quadrant << 22)).to(tl.float32) * 3.7450702829239286e-07
    z = a * a
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * a + a
    cosine = (2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2
    cosine = cosine * z * z - 0.5 * z + 1.0
    odd = (quadrant & 1) == 1
    across = radius * tl.where(odd, sine, cosine)
    along = radius * tl.where(odd, cosine, sine)
    n_even = tl.where(((quadrant + 1) & 2) == 2, -across, across)
    n_odd = tl.where((quadrant & 2) == 2, -along, along)
    return n_even, n_odd


@triton.jit
def philox_normals(keys_ptr, row, block):
    """Normals of consecutive counters, in element order: shape [4 · len(block)]."""
    x0, x1, x2, x3 = philox_block(keys_ptr, row, block)
    n0, n1 = box_muller(x0, x1)
    n2, n3 = box_muller(x2, x3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def _normal_kernel(keys_ptr, out_ptr, num_elements, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    normals = philox_normals(keys_ptr, row, block.to(tl.uint32))
    offset = tl.program_id(1).to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(out_ptr + row * num_elements + offset, normals, offset < num_elements)


# --------------------------------------------------------------------------------------- launcher


def _normal_triton(keys: Tensor, shape: list[int]) -> Tensor:
    keys = keys.contiguous()
    out = torch.empty((keys.shape[0], *shape), dtype=torch.float32, device=keys.device)
    num_elements = math.prod(shape)
    block = min(triton.next_power_of_2(triton.cdiv(num_elements, 4)), MAX_BLOCK)
    grid = (keys.shape[0], triton.cdiv(num_elements, 4 * block))
    launch(
        _normal_kernel,
        grid,
        keys,
        out,
        num_elements,
        BLOCK=block,
        num_warps=max(block // 128, 1),
        **NO_FUSION,
    )
    return out


def compile_specs() -> list[CompileSpec]:
    """The specialisations that `benchmarks/compile_report.py` compiles without a GPU."""
    signature = {"keys_ptr": "*i64", "out_ptr": "*fp32", "num_elements": "i32"}
    return [CompileSpec("philox_normal", _normal_kernel, signature, {"BLOCK": MAX_BLOCK}, 4)]


# ------------------------------------------------------------------------------------ torch.library


@torch.library.custom_op("cdpo::philox_normal", mutates_args=())
def _op(keys: Tensor, shape: list[int]) -> Tensor:
    if not keys.is_cuda:  # on CUDA a look at the values would wait for the device
        check_key_range(keys)
    return _normal_triton(keys, shape) if takes_triton(keys) else _normal_torch(keys, shape)


@_op.register_fake
def _(keys: Tensor, shape: list[int]) -> Tensor:
    return keys.new_empty((keys.shape[0], *shape), dtype=torch.float32)


# ----------------------------------------------------------------------------------------- public


def philox_normal(keys: Tensor, shape: tuple[int, ...] | list[int]) -> Tensor:
    """Standard normals, float32 (N, *shape), one row a key.

    keys: int64 (N, 4), columns (seed, stream, item_id, visit); item_id in [0, 2⁶³), the others in
    [0, 2³²). The range is checked for keys on the CPU.
    """
    check_keys(keys)
    if math.prod(shape) < 1:
        raise ValueError(f"shape is {tuple(shape)}; it must have at least one element")
    normals: Tensor = _op(keys, list(shape))
    return normals


def philox_uint32(keys: Tensor, count: int) -> Tensor:
    """The raw words, int64 (N, count) with values in [0, 2³²); plain PyTorch on any device."""
    check_keys(keys)
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1")
    num_blocks = -(-count // 4)
    words = [torch.stack(four, dim=-1).flatten(1) for _, four in _blocks(keys, num_blocks)]
    return torch.cat(words, dim=1)[:, :count]


def check_keys(keys: Tensor) -> None:
    """Refuse what is not int64 (N, 4)."""
    if keys.dtype != torch.int64:
        raise TypeError(f"keys are {keys.dtype}; they must be int64")
    if keys.ndim != 2 or keys.shape[1] != 4 or keys.shape[0] == 0:
        raise ValueError(
            f"keys are {tuple(keys.shape)}; they must be (N, 4), N ≥ 1, with columns seed, stream, "
            "item_id, visit"
        )


def check_key_range(keys: Tensor) -> None:
    """Refuse values that the counter and key words cannot hold; waits for the device."""
    low, high = keys.amin(0).tolist(), keys.amax(0).tolist()
    for column, name in enumerate(("seed", "stream", "item_id", "visit")):
        limit = 1 << (63 if name == "item_id" else 32)
        if low[column] < 0 or high[column] >= limit:
            raise ValueError(
                f"keys: {name} runs from {low[column]} to {high[column]}; it must be in "
                f"[0, 2^{limit.bit_length() - 1})"
            )


# -------------------------------------------------------------------------------------- reference

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox_normal_ref(keys: Tensor, shape: tuple[int, ...] | list[int]) -> Tensor:
    """The same in plain PyTorch."""
    check_keys(keys)
    return _normal_torch(keys, list(shape))


def _normal_torch(keys: Tensor, shape: list[int]) -> Tensor:
    num_rows, num_elements = keys.shape[0], math.prod(shape)
    num_blocks = -(-num_elements // 4)
    out = torch.empty((num_rows, num_blocks, 4), dtype=torch.float32, device=keys.device)
    for first, (x0, x1, x2, x3) in _blocks(keys, num_blocks):
        span = out[:, first : first + x0.shape[1]]
        for lane, even, odd in ((0, x0, x1), (2, x2, x3)):
            span[..., lane], span[..., lane + 1] = _box_muller_torch(even, odd)
    return out.view(num_rows, -1)[:, :num_elements].contiguous().view(num_rows, *shape)


def _box_muller_torch(x_even: Tensor, x_odd: Tensor) -> tuple[Tensor, Tensor]:
    """`box_muller` operation by operation."""
    bits = ((x_even >> 8).int() + 1).float().view(torch.int32)
    exponent = ((bits >> 23) - 150).float()
    fraction = ((bits & 0x7FFFFF) | 0x3F000000).view(torch.float32)
    small = fraction < 0.70710677
    exponent = torch.where(small, exponent - 1.0, exponent)
    x = torch.where(small, fraction + fraction, fraction).sub_(1.0)
    z = x * x
    y = x.mul(LOG_COEFFICIENTS[0]).add_(LOG_COEFFICIENTS[1])
    for coefficient in LOG_COEFFICIENTS[2:]:
        y.mul_(x).add_(coefficient)
    y.mul_(x).mul_(z).sub_(2.12194440e-4 * exponent).sub_(0.5 * z)
    log_u = x.add_(y).add_(0.693359375 * exponent)
    # PyTorch's float32 root on a CPU (MKL) is at times an ulp off; float64 rounds right
    radius = log_u.mul_(-2.0).double().sqrt_().float()

    turn = (x_odd >> 8).int()
    quadrant = (turn + 0x200000) >> 22
    a = turn.sub_(quadrant << 22).float().mul_(3.7450702829239286e-07)
    z = a * a
    sine = (-1.9515295891e-4 * z).add_(8.3321608736e-3).mul_(z).sub_(1.6666654611e-1)
    sine = sine.mul_(z).mul_(a).add_(a)
    cosine = (
        (2.443315711809948e-5 * z).sub_(1.388731625493765e-3).mul_(z).add_(4.166664568298827e-2)
    )
    cosine = cosine.mul_(z).mul_(z).sub_(0.5 * z).add_(1.0)
    odd = (quadrant & 1) == 1
    across = radius * torch.where(odd, sine, cosine)
    along = radius * torch.where(odd, cosine, sine)
    n_even = torch.where(((quadrant + 1) & 2) == 2, -across, across)
    return n_even, torch.where((quadrant & 2) == 2, -along, along)


def _blocks(keys: Tensor, num_blocks: int) -> Iterator[tuple[int, Words]]:
    """(first block, its four words (N, some blocks)), a bounded number of blocks at a time."""
    step = max(TORCH_BLOCKS // keys.shape[0], 1)
    seed, stream, item, visit = keys.unsqueeze(-1).unbind(1)
    for first in range(0, num_blocks, step):
        block = torch.arange(first, min(first + step, num_blocks), device=keys.device)
        yield first, philox_4x32((block, visit, item & LOW, item >> 32), (seed, stream))


def philox_4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Ten rounds on int64 tensors that hold 32-bit words and broadcast against each other.

    A 32x32 product wraps around in int64, but its two halves come out right.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        product_0, product_1 = c0 * M0, c2 * M1
        c0 = ((product_1 >> 32) & LOW) ^ c1 ^ k0
        c2 = ((product_0 >> 32) & LOW) ^ c3 ^ k1
        c1, c3 = product_1 & LOW, product_0 & LOW
        k0, k1 = (k0 + W0) & LOW, (k1 + W1) & LOW
    return c0, c1, c2, c3
