"""The Triton programs of `group_norm_silu`: two launches forward, two backward.

Formulas, layout and what a program does are told in `group_norm_silu.py`, which launches them.
"""

# Triton functions have no Python types:
# mypy: allow-untyped-defs, allow-incomplete-defs

from ..dispatch import tl, triton

# ----------------------------------------------------------------------------------- shared pieces


@triton.jit
def _place(num_rows, part_rows, channels, BLOCK_C: tl.constexpr):
    """This program's sample (int64), part of its rows, and channels, which run fastest."""
    num_parts = tl.cdiv(num_rows, part_rows)
    num_blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    sample = program // num_blocks // num_parts
    part = program // num_blocks % num_parts
    channel = program % num_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return sample.to(tl.int64), part, channel


@triton.jit
def _load_tile(ptr, sample, row, channel, num_rows, channels):
    """Rows x channels of a sample in float32, 0 outside; the offsets and the mask as well."""
    offset = (sample * num_rows + row[:, None]) * channels + channel[None, :]
    mask = (row < num_rows)[:, None] & (channel < channels)[None, :]
    return tl.load(ptr + offset, mask, 0.0).to(tl.float32), offset, mask


@triton.jit
def _channel_constants(
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    sample,
    channel,
    channels,
    num_groups,
    AFFINE: tl.constexpr,
):
    """Mean, rstd, weight and bias of each channel, as rows to broadcast."""
    live = channel < channels
    group = sample * num_groups + channel // (channels // num_groups)
    mean = tl.load(mean_ptr + group, live, 0.0)
    rstd = tl.load(rstd_ptr + group, live, 0.0)
    if AFFINE:
        weight = tl.load(weight_ptr + channel, live, 0.0).to(tl.float32)
        bias = tl.load(bias_ptr + channel, live, 0.0).to(tl.float32)
    else:
        weight = tl.full(mean.shape, 1.0, tl.float32)
        bias = tl.zeros_like(mean)
    return mean[None, :], rstd[None, :], weight[None, :], bias[None, :]


@triton.jit
def _activation_gradient(grad, z, SILU: tl.constexpr):
    if SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        grad = grad * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
    return grad


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
def _flat_tile(tile, group, num_chunks, channels, num_groups, FLAT: tl.constexpr):
    """Of groups x (chunk, channel of the group): chunk, offset among the partials, channel, mask.

    Chunks and channels are counted as one, so that no lane idles where a group has ten channels.
    """
    group_channels = channels // num_groups
    flat = tile * FLAT + tl.arange(0, FLAT)
    chunk = (flat // group_channels)[None, :]
    channel = group[:, None] * group_channels + (flat % group_channels)[None, :]
    mask = (group < num_groups)[:, None] & (chunk < num_chunks)
    return chunk, chunk * channels + channel, channel, mask


# ---------------------------------------------------------------------------------------- forward


@triton.jit
def forward_statistics_kernel(
    x_ptr,
    partials_ptr,  # (2, num_samples, num_chunks, channels): means, sums of squared deviations
    tickets_ptr,  # (num_samples,) int32, all 0
    mean_ptr,
    rstd_ptr,
    eps,
    num_rows,
    channels,
    num_groups,
    chunk_rows,
    TILE_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUPS_TILE: tl.constexpr,
    FLAT_TILE: tl.constexpr,
):
    """Mean and squared deviations of a chunk's channels; the last program finishes the sample."""
    sample, chunk, channel = _place(num_rows, chunk_rows, channels, BLOCK_C)
    first = chunk * chunk_rows
    last = tl.minimum(first + chunk_rows, num_rows)
    lane_mean = tl.zeros([TILE_ROWS, BLOCK_C], tl.float32)
    lane_squares = tl.zeros([TILE_ROWS, BLOCK_C], tl.float32)
    step = 0.0
    for start in range(first, last, TILE_ROWS):
        row = start + tl.arange(0, TILE_ROWS)
        x, _, _ = _load_tile(x_ptr, sample, row, channel, num_rows, channels)
        step += 1.0
        deviation = (x - lane_mean) * (row < last).to(tl.float32)[:, None]
        lane_mean += deviation * (1.0 / step)
        lane_squares += deviation * (x - lane_mean)
    lane = tl.arange(0, TILE_ROWS)
    count = ((last - first - lane + TILE_ROWS - 1) // TILE_ROWS).to(tl.float32)
    rows = (last - first).to(tl.float32)
    # Means are added up as distances from a value among them: far from zero that rounds less.
    origin_ptr = x_ptr + (sample * num_rows + first) * channels + channel
    origin = tl.load(origin_ptr, channel < channels, 0.0).to(tl.float32)
    mean = origin + tl.sum((lane_mean - origin[None, :]) * count[:, None], 0) / rows
    deviation = lane_mean - mean[None, :]
    squares = tl.sum(lane_squares + count[:, None] * deviation * deviation, 0)

    num_chunks = tl.cdiv(num_rows, chunk_rows)
    parts = num_chunks * tl.cdiv(channels, BLOCK_C)  # programs of a sample
    num_samples = tl.num_programs(0) // parts
    plane = num_samples.to(tl.int64) * num_chunks * channels
    partial = partials_ptr + (sample * num_chunks + chunk) * channels + channel
    tl.store(partial, mean, channel < channels)
    tl.store(partial + plane, squares, channel < channels)
    if _draws_last_ticket(tickets_ptr, sample, parts):
        partials_ptr += sample * num_chunks * channels
        for tile in range(tl.cdiv(num_groups, GROUPS_TILE)):
            group = tile * GROUPS_TILE + tl.arange(0, GROUPS_TILE)
            group_mean, variance = _combine_chunks(
                partials_ptr,
                partials_ptr + plane,
                group,
                num_rows,
                chunk_rows,
                channels,
                num_groups,
                GROUPS_TILE,
                FLAT_TILE,
            )
            offset = sample * num_groups + group
            tl.store(mean_ptr + offset, group_mean, group < num_groups)
            tl.store(rstd_ptr + offset, 1.0 / tl.sqrt_rn(variance + eps), group < num_groups)


@triton.jit
def _combine_chunks(
    means_ptr,
    squares_ptr,
    group,
    num_rows,
    chunk_rows,
    channels,
    num_groups,
    GROUPS: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Mean and variance of groups, from those of their channels in each chunk: two passes."""
    num_chunks = tl.cdiv(num_rows, chunk_rows)
    group_channels = channels // num_groups
    tiles = tl.cdiv(num_chunks * group_channels, FLAT)
    size = 1.0 * num_rows * group_channels
    live = group < num_groups
    # .cg: from L2, where the other programs' stores are
    origin = tl.load(means_ptr + group * group_channels, live, 0.0, cache_modifier=".cg")
    sums = tl.zeros([GROUPS, FLAT], tl.float32)
    for tile in range(tiles):
        chunk, offset, _, mask = _flat_tile(tile, group, num_chunks, channels, num_groups, FLAT)
        rows = tl.minimum(num_rows - chunk * chunk_rows, chunk_rows).to(tl.float32)
        distance = tl.load(means_ptr + offset, mask, 0.0, cache_modifier=".cg") - origin[:, None]
        sums += tl.where(mask, rows * distance, 0.0)
    mean = origin + tl.sum(sums, 1) / size
    squares = tl.zeros([GROUPS, FLAT], tl.float32)
    for tile in range(tiles):
        chunk, offset, _, mask = _flat_tile(tile, group, num_chunks, channels, num_groups, FLAT)
        rows = tl.minimum(num_rows - chunk * chunk_rows, chunk_rows).to(tl.float32)
        deviation = tl.load(means_ptr + offset, mask, 0.0, cache_modifier=".cg") - mean[:, None]
        within = tl.load(squares_ptr + offset, mask, 0.0, cache_modifier=".cg")
        squares += tl.where(mask, within + rows * deviation * deviation, 0.0)
    return mean, tl.sum(squares, 1) / size


@triton.jit
def forward_apply_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    out_ptr,
    num_rows,
    channels,
    num_groups,
    AFFINE: tl.constexpr,
    SILU: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of rows and channels: normalised, scaled, activated."""
    sample, tile, channel = _place(num_rows, TILE_ROWS, channels, BLOCK_C)
    row = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    x, offset, mask = _load_tile(x_ptr, sample, row, channel, num_rows, channels)
    mean, rstd, weight, bias = _channel_constants(
        weight_ptr,
        bias_ptr,
        mean_ptr,
        rstd_ptr,
        sample,
        channel,
        channels,
        num_groups,
        AFFINE,
    )
    out = (x - mean) * rstd * weight + bias
    if SILU:
        out = out / (1.0 + tl.exp(-out))
    tl.store(out_ptr + offset, out, mask)


# --------------------------------------------------------------------------------------- backward


@triton.jit
def backward_sums_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    partials_ptr,  # (2, num_samples, num_chunks, channels): Σ ∂z, Σ ∂z·x̂
    tickets_ptr,  # (num_samples,) int32, all 0
    group_sums_ptr,  # (2, num_samples, num_groups): both sums with weight, over m
    num_rows,
    channels,
    num_groups,
    chunk_rows,
    AFFINE: tl.constexpr,
    SILU: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUPS_TILE: tl.constexpr,
    FLAT_TILE: tl.constexpr,
):
    """Both sums of a chunk's channels; the last program adds them up for the sample's groups."""
    sample, chunk, channel = _place(num_rows, chunk_rows, channels, BLOCK_C)
    mean, rstd, weight, bias = _channel_constants(
        weight_ptr,
        bias_ptr,
        mean_ptr,
        rstd_ptr,
        sample,
        channel,
        channels,
        num_groups,
        AFFINE,
    )
    first = chunk * chunk_rows
    last = tl.minimum(first + chunk_rows, num_rows)
    plain = tl.zeros([TILE_ROWS, BLOCK_C], tl.float32)
    projected = tl.zeros([TILE_ROWS, BLOCK_C], tl.float32)
    for start in range(first, last, TILE_ROWS):
        row = start + tl.arange(0, TILE_ROWS)
        x, offset, mask = _load_tile(x_ptr, sample, row, channel, num_rows, channels)
        grad = tl.load(grad_ptr + offset, mask, 0.0).to(tl.float32)
        normalised = (x - mean) * rstd
        grad_z = _activation_gradient(grad, normalised * weight + bias, SILU)
        grad_z = tl.where(mask, grad_z, 0.0)
        plain += grad_z
        projected += tl.where(mask, grad_z * normalised, 0.0)

    num_chunks = tl.cdiv(num_rows, chunk_rows)
    parts = num_chunks * tl.cdiv(channels, BLOCK_C)  # programs of a sample
    num_samples = tl.num_programs(0) // parts
    plane = num_samples.to(tl.int64) * num_chunks * channels
    partial = partials_ptr + (sample * num_chunks + chunk) * channels + channel
    tl.store(partial, tl.sum(plain, 0), channel < channels)
    tl.store(partial + plane, tl.sum(projected, 0), channel < channels)
    if _draws_last_ticket(tickets_ptr, sample, parts):
        partials_ptr += sample * num_chunks * channels
        group_channels = channels // num_groups
        size = 1.0 * num_rows * group_channels
        for tile in range(tl.cdiv(num_groups, GROUPS_TILE)):
            group = tile * GROUPS_TILE + tl.arange(0, GROUPS_TILE)
            plain_sum = tl.zeros([GROUPS_TILE, FLAT_TILE], tl.float32)
            projected_sum = tl.zeros([GROUPS_TILE, FLAT_TILE], tl.float32)
            for flat in range(tl.cdiv(num_chunks * group_channels, FLAT_TILE)):
                _, offset, of_channel, mask = _flat_tile(
                    flat, group, num_chunks, channels, num_groups, FLAT_TILE
                )
                # .cg: from L2, where the other programs' stores are
                sums_ptr = partials_ptr + offset
                plain_part = tl.load(sums_ptr, mask, 0.0, cache_modifier=".cg")
                projected_part = tl.load(sums_ptr + plane, mask, 0.0, cache_modifier=".cg")
                if AFFINE:
                    factor = tl.load(weight_ptr + of_channel, mask, 0.0).to(tl.float32)
                    plain_part *= factor
                    projected_part *= factor
                plain_sum += plain_part
                projected_sum += projected_part
            group_sum = group_sums_ptr + sample * num_groups + group
            live = group < num_groups
            tl.store(group_sum, tl.sum(plain_sum, 1) / size, live)
            group_sum += num_samples.to(tl.int64) * num_groups
            tl.store(group_sum, tl.sum(projected_sum, 1) / size, live)


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
    channels,
    num_groups,
    AFFINE: tl.constexpr,
    SILU: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of the input's gradient."""
    sample, tile, channel = _place(num_rows, TILE_ROWS, channels, BLOCK_C)
    row = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    x, offset, mask = _load_tile(x_ptr, sample, row, channel, num_rows, channels)
    grad = tl.load(grad_ptr + offset, mask, 0.0).to(tl.float32)
    mean, rstd, weight, bias = _channel_constants(
        weight_ptr,
        bias_ptr,
        mean_ptr,
        rstd_ptr,
        sample,
        channel,
        channels,
        num_groups,
        AFFINE,
    )
    group = sample * num_groups + channel // (channels // num_groups)
    plain_sum = tl.load(group_sums_ptr + group, channel < channels, 0.0)[None, :]
    num_samples = tl.num_programs(0) // tl.cdiv(num_rows, TILE_ROWS) // tl.cdiv(channels, BLOCK_C)
    group += num_samples.to(tl.int64) * num_groups
    projected_sum = tl.load(group_sums_ptr + group, channel < channels, 0.0)[None, :]
    normalised = (x - mean) * rstd
    grad_z = _activation_gradient(grad, normalised * weight + bias, SILU)
    grad_x = rstd * (weight * grad_z - (plain_sum + normalised * projected_sum))
    tl.store(grad_x_ptr + offset, grad_x, mask)
