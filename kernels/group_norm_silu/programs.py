"""The Triton programs of `group_norm_silu`: two launches forward, two backward.

Formulas, layout and what a program does are told in `op.py`, which launches them. What is the same
for all elements of a channel is worked out once a program; an element costs what the comments say.
"""

# Triton functions have no Python types:
# mypy: allow-untyped-defs, allow-incomplete-defs

from ..dispatch import tl, triton
from ..elementary import sigmoid

# ----------------------------------------------------------------------------------- shared pieces


@triton.jit
def _place(num_rows, part_rows, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's sample (int64), part of its rows, and channels, which run fastest."""
    num_blocks: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    num_parts = tl.cdiv(num_rows, part_rows)
    program = tl.program_id(0)
    sample = program // (num_blocks * num_parts)
    part = program // num_blocks % num_parts
    channel = program % num_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return sample.to(tl.int64), part, channel


@triton.jit
def _tile(channel, rows_left, CHANNELS: tl.constexpr, TILE_ROWS: tl.constexpr):
    """Offsets of rows x channels from the tile's first row, and which of them there are."""
    row = tl.arange(0, TILE_ROWS)
    mask = (row < rows_left)[:, None] & (channel < CHANNELS)[None, :]
    return row[:, None] * CHANNELS + channel[None, :], mask


@triton.jit
def _load(ptr, mask, WHOLE: tl.constexpr):
    """In float32, 0 outside; whole tiles need no mask."""
    if WHOLE:
        return tl.load(ptr).to(tl.float32)
    else:
        return tl.load(ptr, mask, 0.0).to(tl.float32)


@triton.jit
def _store(ptr, value, mask, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(ptr, value)
    else:
        tl.store(ptr, value, mask)


@triton.jit
def _channel_constants(
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    sample,
    channel,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    AFFINE: tl.constexpr,
):
    """Of each channel, as rows to broadcast: mean, rstd, and z = (x - mean) * scale + shift."""
    live = channel < CHANNELS
    group = sample * GROUPS + channel // (CHANNELS // GROUPS)
    mean = tl.load(mean_ptr + group, live, 0.0)
    rstd = tl.load(rstd_ptr + group, live, 0.0)
    if AFFINE:
        scale = rstd * tl.load(weight_ptr + channel, live, 0.0).to(tl.float32)
        shift = tl.load(bias_ptr + channel, live, 0.0).to(tl.float32)
    else:
        scale, shift = rstd, tl.zeros_like(mean)
    return mean[None, :], rstd[None, :], scale[None, :], shift[None, :]


@triton.jit
def _activation_gradient(grad, z, SILU: tl.constexpr):
    """9 instructions."""
    if SILU:
        share = sigmoid(z)
        grad = grad * (share * tl.fma(z, 1.0 - share, 1.0))
    return grad


@triton.jit
def _join(distance, within, weight, total, AXIS: tl.constexpr):
    """Mean of lanes and squared deviations from it, of their means, squares and sizes."""
    mean = tl.sum(weight * distance, AXIS) / total
    deviation = distance - tl.expand_dims(mean, AXIS)
    return mean, tl.sum(tl.fma(weight * deviation, deviation, within), AXIS)


@triton.jit
def _draws_last_ticket(tickets_ptr, sample, count):
    """True in the last of `count` programs to come here; the tickets are left 0."""
    # The barrier puts the stores of all threads before the ticket, which publishes them.
    tl.debug_barrier()
    last = tl.atomic_add(tickets_ptr + sample, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(tickets_ptr + sample, 0)  # for the next launch
    return last


@triton.jit
def _flat_tile(
    tile, group, num_chunks, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, FLAT: tl.constexpr
):
    """Of groups x (chunk, channel of the group): chunk, channel, offset among partials, mask.

    Chunks and channels are counted as one, so that no lane idles where a group has ten channels.
    """
    group_channels: tl.constexpr = CHANNELS // GROUPS
    flat = tile * FLAT + tl.arange(0, FLAT)
    chunk = (flat // group_channels)[None, :]
    channel = group[:, None] * group_channels + (flat % group_channels)[None, :]
    mask = (group < GROUPS)[:, None] & (chunk < num_chunks)
    return chunk, channel, chunk * (2 * CHANNELS) + channel, mask


# ---------------------------------------------------------------------------------------- forward


@triton.jit
def forward_statistics_kernel(
    x_ptr,
    partials_ptr,  # (num_samples, num_chunks, 2, channels): distances of means, squared deviations
    tickets_ptr,  # (num_samples,) int32, all 0
    mean_ptr,
    rstd_ptr,
    eps,
    num_rows,
    chunk_rows,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUPS_TILE: tl.constexpr,
    FLAT_TILE: tl.constexpr,
):
    """Mean and squared deviations of a chunk's channels; the last program finishes the sample."""
    sample, chunk, channel = _place(num_rows, chunk_rows, CHANNELS, BLOCK_C)
    first = chunk * chunk_rows
    rows = tl.minimum(num_rows - first, chunk_rows)
    group_channels: tl.constexpr = CHANNELS // GROUPS
    sample_ptr = x_ptr + sample * num_rows * CHANNELS
    x_ptr += (sample * num_rows + first) * CHANNELS  # in 64 bits, as sample is
    offset, mask = _tile(channel, rows, CHANNELS, TILE_ROWS)
    # Each lane counts from its first value: 4 instructions an element, and nothing cancels.
    origin = _load(x_ptr + offset, mask, WHOLE)
    sums = tl.zeros([TILE_ROWS, BLOCK_C], tl.float32)
    squares = tl.zeros([TILE_ROWS, BLOCK_C], tl.float32)
    tile_ptr = x_ptr
    for start in range(TILE_ROWS, rows, TILE_ROWS):
        tile_ptr += TILE_ROWS * CHANNELS
        offset, mask = _tile(channel, rows - start, CHANNELS, TILE_ROWS)
        distance = _load(tile_ptr + offset, mask, WHOLE) - origin
        if not WHOLE:
            distance = tl.where(mask, distance, 0.0)
        sums += distance
        squares = tl.fma(distance, distance, squares)
    if WHOLE:
        count = 1.0 * (rows // TILE_ROWS)
        share = sums * (1.0 / count)
    else:
        count = ((rows - tl.arange(0, TILE_ROWS) + TILE_ROWS - 1) // TILE_ROWS).to(tl.float32)
        count = tl.maximum(count, 0.0)[:, None]
        share = sums / tl.maximum(count, 1.0)
    live = channel < CHANNELS
    # Means are distances from the group's first element until the end, so that the mean itself is
    # rounded once.
    base = tl.load(sample_ptr + channel // group_channels * group_channels, live, 0.0)
    base = base.to(tl.float32)
    distance = (origin - base[None, :]) + share
    mean, squares = _join(distance, tl.fma(-sums, share, squares), count, 1.0 * rows, 0)

    num_chunks = tl.cdiv(num_rows, chunk_rows)
    partial = partials_ptr + (sample * num_chunks + chunk) * (2 * CHANNELS) + channel
    tl.store(partial, mean, live)
    tl.store(partial + CHANNELS, squares, live)
    num_blocks: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    if _draws_last_ticket(tickets_ptr, sample, num_chunks * num_blocks):
        partials_ptr += sample * num_chunks * (2 * CHANNELS)
        for tile in range((GROUPS + GROUPS_TILE - 1) // GROUPS_TILE):
            group = tile * GROUPS_TILE + tl.arange(0, GROUPS_TILE)
            group_mean, variance = _combine_chunks(
                partials_ptr, group, num_rows, chunk_rows, CHANNELS, GROUPS, GROUPS_TILE, FLAT_TILE
            )
            of_group = sample * GROUPS + group
            anchor = tl.load(sample_ptr + group * group_channels, group < GROUPS, 0.0)
            tl.store(mean_ptr + of_group, anchor.to(tl.float32) + group_mean, group < GROUPS)
            tl.store(rstd_ptr + of_group, 1.0 / tl.sqrt_rn(variance + eps), group < GROUPS)


@triton.jit
def _combine_chunks(
    partials_ptr,
    group,
    num_rows,
    chunk_rows,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_TILE: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Mean and variance of groups, from those of their channels in each chunk: as a chunk's are."""
    group_channels: tl.constexpr = CHANNELS // GROUPS
    num_chunks = tl.cdiv(num_rows, chunk_rows)
    # .cg: from L2, where the other programs' stores are
    _, _, offset, mask = _flat_tile(0, group, num_chunks, CHANNELS, GROUPS, FLAT)
    origin = tl.load(partials_ptr + offset, mask, 0.0, cache_modifier=".cg")
    weights = tl.zeros([GROUPS_TILE, FLAT], tl.float32)
    sums = tl.zeros([GROUPS_TILE, FLAT], tl.float32)
    squares = tl.zeros([GROUPS_TILE, FLAT], tl.float32)
    for tile in range(tl.cdiv(num_chunks * group_channels, FLAT)):
        chunk, _, offset, mask = _flat_tile(tile, group, num_chunks, CHANNELS, GROUPS, FLAT)
        weight = tl.minimum(num_rows - chunk * chunk_rows, chunk_rows).to(tl.float32)
        mean = tl.load(partials_ptr + offset, mask, 0.0, cache_modifier=".cg")
        within = tl.load(partials_ptr + offset + CHANNELS, mask, 0.0, cache_modifier=".cg")
        distance = mean - origin
        weights += tl.where(mask, weight, 0.0)
        sums += tl.where(mask, weight * distance, 0.0)
        squares += tl.where(mask, tl.fma(weight * distance, distance, within), 0.0)
    share = sums / tl.maximum(weights, 1.0)
    live = group < GROUPS
    base = tl.load(partials_ptr + group * group_channels, live, 0.0, cache_modifier=".cg")
    distance = (origin - base[:, None]) + share
    size = 1.0 * num_rows * group_channels
    mean, squares = _join(distance, tl.fma(-sums, share, squares), weights, size, 1)
    return base + mean, squares / size


@triton.jit
def forward_apply_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    out_ptr,
    num_rows,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    AFFINE: tl.constexpr,
    SILU: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of rows and channels: normalised, scaled, activated."""
    sample, tile, channel = _place(num_rows, TILE_ROWS, CHANNELS, BLOCK_C)
    first = tile * TILE_ROWS
    offset, mask = _tile(channel, num_rows - first, CHANNELS, TILE_ROWS)
    start = (sample * num_rows + first) * CHANNELS
    x = _load(x_ptr + start + offset, mask, WHOLE)
    mean, _, scale, shift = _channel_constants(
        weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sample, channel, CHANNELS, GROUPS, AFFINE
    )
    # Not x * scale + (shift - mean * scale), which cancels where the mean is large.
    out = tl.fma(x - mean, scale, shift)
    if SILU:
        out = out * sigmoid(out)
    _store(out_ptr + start + offset, out, mask, WHOLE)


# --------------------------------------------------------------------------------------- backward


@triton.jit
def backward_sums_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    partials_ptr,  # (num_samples, num_chunks, 2, channels): Σ ∂z, Σ ∂z·x̂
    tickets_ptr,  # (num_samples,) int32, all 0
    group_sums_ptr,  # (num_samples, num_groups, 2): both sums with weight, over m
    num_rows,
    chunk_rows,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    AFFINE: tl.constexpr,
    SILU: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUPS_TILE: tl.constexpr,
    FLAT_TILE: tl.constexpr,
):
    """Both sums of a chunk's channels; the last program adds them up for the sample's groups."""
    sample, chunk, channel = _place(num_rows, chunk_rows, CHANNELS, BLOCK_C)
    mean, rstd, scale, shift = _channel_constants(
        weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sample, channel, CHANNELS, GROUPS, AFFINE
    )
    first = chunk * chunk_rows
    rows = tl.minimum(num_rows - first, chunk_rows)
    x_ptr += (sample * num_rows + first) * CHANNELS
    grad_ptr += (sample * num_rows + first) * CHANNELS
    plain = tl.zeros([TILE_ROWS, BLOCK_C], tl.float32)
    projected = tl.zeros([TILE_ROWS, BLOCK_C], tl.float32)
    for start in range(0, rows, TILE_ROWS):
        offset, mask = _tile(channel, rows - start, CHANNELS, TILE_ROWS)
        grad = _load(grad_ptr + offset, mask, WHOLE)
        distance = _load(x_ptr + offset, mask, WHOLE) - mean
        grad_ptr += TILE_ROWS * CHANNELS
        x_ptr += TILE_ROWS * CHANNELS
        grad_z = _activation_gradient(grad, tl.fma(distance, scale, shift), SILU)
        if not WHOLE:  # 0 times what is not finite
            grad_z = tl.where(mask, grad_z, 0.0)
            distance = tl.where(mask, distance, 0.0)
        plain += grad_z
        projected = tl.fma(grad_z, distance, projected)

    num_chunks = tl.cdiv(num_rows, chunk_rows)
    partial = partials_ptr + (sample * num_chunks + chunk) * (2 * CHANNELS) + channel
    live = channel < CHANNELS
    tl.store(partial, tl.sum(plain, 0), live)
    tl.store(partial + CHANNELS, tl.sum(projected * rstd, 0), live)
    num_blocks: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    if _draws_last_ticket(tickets_ptr, sample, num_chunks * num_blocks):
        partials_ptr += sample * num_chunks * (2 * CHANNELS)
        group_channels: tl.constexpr = CHANNELS // GROUPS
        size = 1.0 * num_rows * group_channels
        for tile in range((GROUPS + GROUPS_TILE - 1) // GROUPS_TILE):
            group = tile * GROUPS_TILE + tl.arange(0, GROUPS_TILE)
            plain_sum = tl.zeros([GROUPS_TILE, FLAT_TILE], tl.float32)
            projected_sum = tl.zeros([GROUPS_TILE, FLAT_TILE], tl.float32)
            for flat in range(tl.cdiv(num_chunks * group_channels, FLAT_TILE)):
                _, of_channel, offset, mask = _flat_tile(
                    flat, group, num_chunks, CHANNELS, GROUPS, FLAT_TILE
                )
                # .cg: from L2, where the other programs' stores are
                sums_ptr = partials_ptr + offset
                plain_part = tl.load(sums_ptr, mask, 0.0, cache_modifier=".cg")
                projected_part = tl.load(sums_ptr + CHANNELS, mask, 0.0, cache_modifier=".cg")
                if AFFINE:
                    factor = tl.load(weight_ptr + of_channel, mask, 0.0).to(tl.float32)
                    plain_part *= factor
                    projected_part *= factor
                plain_sum += plain_part
                projected_sum += projected_part
            group_sum = group_sums_ptr + (sample * GROUPS + group) * 2
            tl.store(group_sum, tl.sum(plain_sum, 1) / size, group < GROUPS)
            tl.store(group_sum + 1, tl.sum(projected_sum, 1) / size, group < GROUPS)


@triton.jit
def backward_apply_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    group_sums_ptr,
    grad_x_ptr,
    num_rows,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    AFFINE: tl.constexpr,
    SILU: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of the input's gradient."""
    sample, tile, channel = _place(num_rows, TILE_ROWS, CHANNELS, BLOCK_C)
    first = tile * TILE_ROWS
    offset, mask = _tile(channel, num_rows - first, CHANNELS, TILE_ROWS)
    start = (sample * num_rows + first) * CHANNELS
    grad = _load(grad_ptr + start + offset, mask, WHOLE)
    x = _load(x_ptr + start + offset, mask, WHOLE)
    mean, rstd, scale, shift = _channel_constants(
        weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sample, channel, CHANNELS, GROUPS, AFFINE
    )
    group_sum = group_sums_ptr + (sample * GROUPS + channel // (CHANNELS // GROUPS)) * 2
    live = channel < CHANNELS
    plain = rstd * tl.load(group_sum, live, 0.0)[None, :]
    projected = rstd * (rstd * tl.load(group_sum + 1, live, 0.0)[None, :])
    distance = x - mean
    grad_z = _activation_gradient(grad, tl.fma(distance, scale, shift), SILU)
    grad_x = tl.fma(scale, grad_z, -tl.fma(distance, projected, plain))
    _store(grad_x_ptr + start + offset, grad_x, mask, WHOLE)
