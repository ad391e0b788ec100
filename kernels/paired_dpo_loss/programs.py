"""The Triton programs of `paired_dpo_loss`: one launch forward, one backward.

Formulas, layout and what a program does are told in `paired_dpo_loss.py`, which launches them.
"""

# Triton functions have no Python types:
# mypy: allow-untyped-defs, allow-incomplete-defs

from ..dispatch import tl, triton

# ---------------------------------------------------------------------------------------- forward


@triton.jit
def _error_terms(x, c, HUBER: tl.constexpr):
    """Per element: the error, and the root that the difference and the gradient divide by."""
    if HUBER:
        root = tl.sqrt(x * x + c * c)
        return x * x / (root + c), root
    else:
        return x * x, x


@triton.jit
def _residual(p, t, slope, SLOPES: tl.constexpr):
    if SLOPES:
        return slope * (p - t)
    else:
        return p - t


@triton.jit
def _pull(x, root, HUBER: tl.constexpr):
    """Per element: the slope of the error, for MSE half of it."""
    if HUBER:
        return x / root
    else:
        return x


@triton.jit
def _negative_log_sigmoid(x):
    """max(−x, 0) + log1p(e), e = exp(−|x|), with log1p(e) = 2 artanh(s), s = e/(2 + e) ≤ 1/3.

    Eleven terms of the artanh series reach float32 precision, for tiny e as well, where log(1 + e)
    rounds to 0.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    square = s * s
    series = 1.0 / 21.0
    for term in tl.static_range(1, 11):
        series = series * square + 1.0 / (21 - 2 * term)
    return tl.maximum(-x, 0.0) + 2.0 * s * series


@triton.jit
def forward_kernel(
    policy_ptr,
    reference_ptr,
    target_ptr,
    slopes_ptr,
    weights_ptr,
    partials_ptr,  # (2 or 5, and 2 with SAFEGUARD, num_pairs, num_chunks)
    tickets_ptr,  # (1 + num_pairs,) int32, all 0
    loss_ptr,
    logits_ptr,
    policy_error_ptr,
    reference_error_ptr,
    loser_kept_ptr,
    scale,
    huber_c,
    loser_gradient,
    given_up,  # 1 − the safeguard
    num_elements,
    policy_stride,
    reference_stride,
    target_stride,
    HUBER: tl.constexpr,
    CACHED: tl.constexpr,  # the reference is (2B,) errors, not predictions
    SHARED: tl.constexpr,  # one target for winner and loser
    SLOPES: tl.constexpr,  # without them slopes_ptr is None
    WEIGHTS: tl.constexpr,  # without them weights_ptr is None
    SAFEGUARD: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIR_TILES: tl.constexpr,
):
    """One chunk of one pair, winner and loser together; the last chunk finishes the pair."""
    pair = tl.program_id(0)
    chunk = tl.program_id(1)
    num_pairs = tl.num_programs(0)
    num_chunks = tl.num_programs(1)
    winner = pair.to(tl.int64)
    loser = winner + num_pairs
    offset = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < num_elements

    # .to(float32) in registers; masked lanes have p = r = t = 0 and add nothing
    p_w = tl.load(policy_ptr + winner * policy_stride + offset, mask, 0.0).to(tl.float32)
    p_l = tl.load(policy_ptr + loser * policy_stride + offset, mask, 0.0).to(tl.float32)
    t_w = tl.load(target_ptr + winner * target_stride + offset, mask, 0.0).to(tl.float32)
    if SHARED:
        t_l = t_w
    else:
        t_l = tl.load(target_ptr + loser * target_stride + offset, mask, 0.0).to(tl.float32)

    slope = tl.load(slopes_ptr + winner) if SLOPES else 1.0
    x_w = _residual(p_w, t_w, slope, SLOPES)
    x_l = _residual(p_l, t_l, slope, SLOPES)
    policy_w, root_w = _error_terms(x_w, huber_c, HUBER)
    policy_l, root_l = _error_terms(x_l, huber_c, HUBER)

    plane = num_chunks.to(tl.int64) * num_pairs
    partial = partials_ptr + winner * num_chunks + chunk
    tl.store(partial, tl.sum(policy_w))
    tl.store(partial + plane, tl.sum(policy_l))
    if not CACHED:
        r_ptr = reference_ptr + offset
        r_w = tl.load(r_ptr + winner * reference_stride, mask, 0.0).to(tl.float32)
        r_l = tl.load(r_ptr + loser * reference_stride, mask, 0.0).to(tl.float32)
        y_w = _residual(r_w, t_w, slope, SLOPES)
        y_l = _residual(r_l, t_l, slope, SLOPES)
        reference_w, base_w = _error_terms(y_w, huber_c, HUBER)
        reference_l, base_l = _error_terms(y_l, huber_c, HUBER)
        # policy minus reference error without cancellation
        gain_w = _residual(p_w, r_w, slope, SLOPES) * (x_w + y_w)
        gain_l = _residual(p_l, r_l, slope, SLOPES) * (x_l + y_l)
        if HUBER:
            gain_w = gain_w / (root_w + base_w)
            gain_l = gain_l / (root_l + base_l)
        tl.store(partial + 2 * plane, tl.sum(reference_w))
        tl.store(partial + 3 * plane, tl.sum(reference_l))
        tl.store(partial + 4 * plane, tl.sum(gain_w - gain_l))
    if SAFEGUARD:
        pull_w = _pull(x_w, root_w, HUBER)
        pull_l = _pull(x_l, root_l, HUBER)
        own = partial + (2 if CACHED else 5) * plane
        tl.store(own, tl.sum(pull_w * pull_w))
        tl.store(own + plane, tl.sum(pull_w * pull_l))
    # The barrier puts the stores of all threads before the ticket, which publishes them.
    tl.debug_barrier()
    if tl.atomic_add(tickets_ptr + 1 + pair, 1, sem="acq_rel") == num_chunks - 1:
        tl.store(tickets_ptr + 1 + pair, 0)  # for the next launch
        _finish_pair(
            reference_ptr,
            weights_ptr,
            partials_ptr,
            logits_ptr,
            policy_error_ptr,
            reference_error_ptr,
            loser_kept_ptr,
            scale,
            loser_gradient,
            given_up,
            num_elements,
            winner,
            num_pairs,
            num_chunks,
            CACHED,
            WEIGHTS,
            SAFEGUARD,
            CHUNKS,
            CHUNK_TILES,
        )
        tl.debug_barrier()
        if tl.atomic_add(tickets_ptr, 1, sem="acq_rel") == num_pairs - 1:
            tl.store(tickets_ptr, 0)
            _mean_loss(logits_ptr, loss_ptr, num_pairs, PAIRS, PAIR_TILES)


@triton.jit
def _finish_pair(
    reference_ptr,
    weights_ptr,
    partials_ptr,
    logits_ptr,
    policy_error_ptr,
    reference_error_ptr,
    loser_kept_ptr,
    scale,
    loser_gradient,
    given_up,
    num_elements,
    winner,
    num_pairs,
    num_chunks,
    CACHED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    SAFEGUARD: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
):
    """A pair's results from the sums of its chunks; run by the last program of the pair."""
    loser = winner + num_pairs
    plane = num_chunks.to(tl.int64) * num_pairs
    partial = partials_ptr + winner * num_chunks
    policy_w = _add_chunks(partial, num_chunks, CHUNKS, CHUNK_TILES) / num_elements
    policy_l = _add_chunks(partial + plane, num_chunks, CHUNKS, CHUNK_TILES) / num_elements
    partial += 2 * plane
    if CACHED:
        reference_w = tl.load(reference_ptr + winner)
        reference_l = tl.load(reference_ptr + loser)
        margin = (policy_w - reference_w) - (policy_l - reference_l)
    else:
        reference_w = _add_chunks(partial, num_chunks, CHUNKS, CHUNK_TILES) / num_elements
        reference_l = _add_chunks(partial + plane, num_chunks, CHUNKS, CHUNK_TILES) / num_elements
        margin = _add_chunks(partial + 2 * plane, num_chunks, CHUNKS, CHUNK_TILES) / num_elements
        partial += 3 * plane
    logit = -scale * margin
    if WEIGHTS:
        logit = tl.load(weights_ptr + winner) * logit
    kept = loser_gradient
    if SAFEGUARD:
        own = _add_chunks(partial, num_chunks, CHUNKS, CHUNK_TILES)
        shared = _add_chunks(partial + plane, num_chunks, CHUNKS, CHUNK_TILES)
        harmless = tl.minimum(tl.div_rn(given_up * own, shared), 1.0)
        kept = loser_gradient * tl.where(shared > 0, harmless, 1.0)
    tl.store(logits_ptr + winner, logit)
    tl.store(loser_kept_ptr + winner, kept)
    tl.store(policy_error_ptr + winner, policy_w)
    tl.store(policy_error_ptr + loser, policy_l)
    tl.store(reference_error_ptr + winner, reference_w)
    tl.store(reference_error_ptr + loser, reference_l)


@triton.jit
def _add_chunks(partial, num_chunks, CHUNKS: tl.constexpr, CHUNK_TILES: tl.constexpr):
    sums = tl.zeros([CHUNKS], tl.float32)
    for tile in range(CHUNK_TILES):
        chunk = tile * CHUNKS + tl.arange(0, CHUNKS)
        # .cg: from L2, where the other programs' stores are
        sums += tl.load(partial + chunk, chunk < num_chunks, 0.0, cache_modifier=".cg")
    return tl.sum(sums)


@triton.jit
def _mean_loss(logits_ptr, loss_ptr, num_pairs, PAIRS: tl.constexpr, PAIR_TILES: tl.constexpr):
    """Run by the last program of all."""
    losses = tl.zeros([PAIRS], tl.float64)
    for tile in range(PAIR_TILES):
        pair = tile * PAIRS + tl.arange(0, PAIRS)
        live = pair < num_pairs
        logit = tl.load(logits_ptr + pair, live, 0.0, cache_modifier=".cg")
        losses += tl.where(live, _negative_log_sigmoid(logit), 0.0).to(tl.float64)
    tl.store(loss_ptr, (tl.sum(losses) / num_pairs).to(tl.float32))


# --------------------------------------------------------------------------------------- backward


@triton.jit
def backward_kernel(
    grad_loss_ptr,
    logits_ptr,
    loser_kept_ptr,
    policy_ptr,
    target_ptr,
    slopes_ptr,
    weights_ptr,
    grad_ptr,
    scale,
    huber_c,
    num_elements,
    policy_stride,
    target_stride,
    grad_stride,
    HUBER: tl.constexpr,
    SHARED: tl.constexpr,
    SLOPES: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one pair: the gradient of both predictions from the pair's logit."""
    winner = tl.program_id(0).to(tl.int64)
    num_pairs = tl.num_programs(0)
    loser = winner + num_pairs
    offset = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < num_elements
    logit = tl.load(logits_ptr + winner)
    weight = tl.load(grad_loss_ptr).to(tl.float32) * scale / (1.0 + tl.exp(logit))
    weight = weight / num_pairs / num_elements
    if WEIGHTS:
        weight = tl.load(weights_ptr + winner) * weight
    kept = tl.load(loser_kept_ptr + winner)

    p_w = tl.load(policy_ptr + winner * policy_stride + offset, mask, 0.0).to(tl.float32)
    p_l = tl.load(policy_ptr + loser * policy_stride + offset, mask, 0.0).to(tl.float32)
    t_w = tl.load(target_ptr + winner * target_stride + offset, mask, 0.0).to(tl.float32)
    if SHARED:
        t_l = t_w
    else:
        t_l = tl.load(target_ptr + loser * target_stride + offset, mask, 0.0).to(tl.float32)
    slope = tl.load(slopes_ptr + winner) if SLOPES else 1.0
    x_w = _residual(p_w, t_w, slope, SLOPES)
    x_l = _residual(p_l, t_l, slope, SLOPES)
    if SLOPES:
        weight = weight * slope
    if HUBER:
        grad_w = weight * (x_w / tl.sqrt(x_w * x_w + huber_c * huber_c))
        grad_l = -weight * kept * (x_l / tl.sqrt(x_l * x_l + huber_c * huber_c))
    else:
        grad_w = 2.0 * weight * x_w
        grad_l = -2.0 * weight * kept * x_l
    tl.store(grad_ptr + winner * grad_stride + offset, grad_w, mask)
    tl.store(grad_ptr + loser * grad_stride + offset, grad_l, mask)
