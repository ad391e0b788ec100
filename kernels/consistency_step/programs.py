"""The Triton programs of `consistency_step`, a launch each.

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


# --------------------------------------------------------------------------------------- programs


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
def targets_kernel(
    prediction_ptr,
    previous_ptr,
    noisy_ptr,
    of_noisy_ptr,
    of_prediction_ptr,
    earlier_of_noisy_ptr,
    earlier_of_prediction_ptr,
    targets_ptr,
    num_pairs,
    num_elements,
    num_chunks,
    prediction_stride,
    previous_stride,
    noisy_stride,
    BLOCK: tl.constexpr,
):
    """One chunk of one sample: the frozen network's answer, as a prediction at noisy."""
    row, pair, offset, mask = _place(num_pairs, num_elements, num_chunks, BLOCK)
    of_noisy = tl.load(of_noisy_ptr + pair)
    of_prediction = tl.load(of_prediction_ptr + pair)
    earlier_of_noisy = tl.load(earlier_of_noisy_ptr + pair)
    earlier_of_prediction = tl.load(earlier_of_prediction_ptr + pair)

    prediction = _load(prediction_ptr, row, prediction_stride, offset, mask)
    previous = _load(previous_ptr, row, previous_stride, offset, mask)
    noisy = _load(noisy_ptr, row, noisy_stride, offset, mask)
    answer = earlier_of_noisy * previous + earlier_of_prediction * prediction
    targets = tl.div_rn(answer - of_noisy * noisy, of_prediction)
    targets = tl.where(of_prediction == 0, 0.0, targets)
    tl.store(targets_ptr + row * num_elements + offset, targets, mask)
