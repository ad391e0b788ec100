"""The Triton programs of `consistency_step`: two launches forward, one backward.

Formulas, layout and what a program does are told in `consistency_step.py`, which launches them.
"""

# Triton functions have no Python types:
# mypy: allow-untyped-defs, allow-incomplete-defs

from ..dispatch import tl, triton

# ---------------------------------------------------------------------------------------- helpers


@triton.jit
def _place(num_pairs, num_elements, num_chunks, BLOCK: tl.constexpr):
    """This program's sample (a row of the batch), its pair, and its elements of the sample."""
    row = tl.program_id(0) // num_chunks
    chunk = (tl.program_id(0) % num_chunks).to(tl.int64)
    offset = chunk * BLOCK + tl.arange(0, BLOCK)
    return row.to(tl.int64), row % num_pairs, offset, offset < num_elements


@triton.jit
def _load(pointer, row, stride, offset, mask):
    return tl.load(pointer + row * stride + offset, mask, 0.0).to(tl.float32)


@triton.jit
def _clean(noisy, prediction, alpha, sigma, PREDICTION: tl.constexpr):
    # div_rn: a plain division is off by up to two ulps on a GPU
    if PREDICTION == "epsilon":
        return tl.div_rn(noisy - sigma * prediction, alpha)
    elif PREDICTION == "v_prediction":
        return alpha * noisy - sigma * prediction
    else:
        return prediction


@triton.jit
def _noise(noisy, prediction, alpha, sigma, PREDICTION: tl.constexpr):
    if PREDICTION == "epsilon":
        return prediction
    elif PREDICTION == "v_prediction":
        return alpha * prediction + sigma * noisy
    else:
        return tl.div_rn(noisy - alpha * prediction, sigma)


@triton.jit
def _scalings(timestep, timestep_scaling, sigma_data):
    """c_skip and c_out; exactly 1 and 0 where the timestep is 0."""
    s = timestep_scaling * timestep.to(tl.float32)
    variance = sigma_data * sigma_data
    total = s * s + variance
    return tl.div_rn(variance, total), tl.div_rn(s, tl.sqrt_rn(total))


@triton.jit
def _consistency(noisy, prediction, alpha, sigma, c_skip, c_out, PREDICTION: tl.constexpr):
    return c_skip * noisy + c_out * _clean(noisy, prediction, alpha, sigma, PREDICTION)


# ---------------------------------------------------------------------------------------- forward


@triton.jit
def solver_kernel(
    teacher_ptr,  # (2 * num_rows, ...): conditional, then unconditional
    noisy_ptr,
    guidance_ptr,
    alpha_ptr,
    sigma_ptr,
    earlier_alpha_ptr,
    earlier_sigma_ptr,
    previous_ptr,
    num_pairs,
    num_elements,
    num_chunks,
    teacher_stride,
    noisy_stride,
    PREDICTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one sample: guidance, then one DDIM step."""
    row, pair, offset, mask = _place(num_pairs, num_elements, num_chunks, BLOCK)
    guidance = tl.load(guidance_ptr + pair)
    alpha = tl.load(alpha_ptr + pair)
    sigma = tl.load(sigma_ptr + pair)
    earlier_alpha = tl.load(earlier_alpha_ptr + pair)
    earlier_sigma = tl.load(earlier_sigma_ptr + pair)

    conditional = _load(teacher_ptr, row, teacher_stride, offset, mask)
    unconditional = _load(teacher_ptr, row + 2 * num_pairs, teacher_stride, offset, mask)
    noisy = _load(noisy_ptr, row, noisy_stride, offset, mask)
    guided = conditional + guidance * (conditional - unconditional)
    clean = _clean(noisy, guided, alpha, sigma, PREDICTION)
    noise = _noise(noisy, guided, alpha, sigma, PREDICTION)
    previous = earlier_alpha * clean + earlier_sigma * noise
    tl.store(previous_ptr + row * num_elements + offset, previous, mask)


@triton.jit
def outputs_kernel(
    policy_ptr,
    reference_ptr,
    target_ptr,
    noisy_ptr,
    previous_ptr,
    timesteps_ptr,
    alpha_ptr,
    sigma_ptr,
    earlier_timesteps_ptr,
    earlier_alpha_ptr,
    earlier_sigma_ptr,
    policy_out_ptr,
    reference_out_ptr,
    target_out_ptr,
    timestep_scaling,
    sigma_data,
    num_pairs,
    num_elements,
    num_chunks,
    policy_stride,
    reference_stride,
    target_stride,
    noisy_stride,
    previous_stride,
    REFERENCE: tl.constexpr,  # without it, whatever is called reference is None
    TARGET: tl.constexpr,  # without it, whatever is called target, previous or earlier is None
    PREDICTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one sample: up to three consistency functions."""
    row, pair, offset, mask = _place(num_pairs, num_elements, num_chunks, BLOCK)
    out_offset = row * num_elements + offset
    alpha = tl.load(alpha_ptr + pair)
    sigma = tl.load(sigma_ptr + pair)
    c_skip, c_out = _scalings(tl.load(timesteps_ptr + pair), timestep_scaling, sigma_data)

    noisy = _load(noisy_ptr, row, noisy_stride, offset, mask)
    policy = _load(policy_ptr, row, policy_stride, offset, mask)
    policy = _consistency(noisy, policy, alpha, sigma, c_skip, c_out, PREDICTION)
    tl.store(policy_out_ptr + out_offset, policy, mask)
    if REFERENCE:
        reference = _load(reference_ptr, row, reference_stride, offset, mask)
        reference = _consistency(noisy, reference, alpha, sigma, c_skip, c_out, PREDICTION)
        tl.store(reference_out_ptr + out_offset, reference, mask)
    if TARGET:
        alpha = tl.load(earlier_alpha_ptr + pair)
        sigma = tl.load(earlier_sigma_ptr + pair)
        timestep = tl.load(earlier_timesteps_ptr + pair)
        c_skip, c_out = _scalings(timestep, timestep_scaling, sigma_data)
        previous = _load(previous_ptr, row, previous_stride, offset, mask)
        target = _load(target_ptr, row, target_stride, offset, mask)
        target = _consistency(previous, target, alpha, sigma, c_skip, c_out, PREDICTION)
        tl.store(target_out_ptr + out_offset, target, mask)


# --------------------------------------------------------------------------------------- backward


@triton.jit
def backward_kernel(
    grad_output_ptr,
    timesteps_ptr,
    alpha_ptr,
    sigma_ptr,
    grad_ptr,
    timestep_scaling,
    sigma_data,
    num_pairs,
    num_elements,
    num_chunks,
    grad_output_stride,
    PREDICTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one sample: f is affine in the prediction, with one slope a pair."""
    row, pair, offset, mask = _place(num_pairs, num_elements, num_chunks, BLOCK)
    alpha = tl.load(alpha_ptr + pair)
    sigma = tl.load(sigma_ptr + pair)
    _, slope = _scalings(tl.load(timesteps_ptr + pair), timestep_scaling, sigma_data)
    if PREDICTION == "epsilon":
        slope = slope * tl.div_rn(-sigma, alpha)
    elif PREDICTION == "v_prediction":
        slope = slope * -sigma
    grad_output = _load(grad_output_ptr, row, grad_output_stride, offset, mask)
    tl.store(grad_ptr + row * num_elements + offset, grad_output * slope, mask)
