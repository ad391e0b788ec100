"""Functions of one number, for Triton kernels, in as few instructions as float32's accuracy allows.

On a GPU `exp2` and `rsqrt` are one instruction each, right to two units in the last place; `exp`
and the division are four and six around the same instruction.
"""

# Triton functions have no Python types:
# mypy: allow-untyped-defs, allow-incomplete-defs

from .dispatch import tl, triton


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)): 5 instructions; 0 where exp overflows."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def normal_tail(x):
    """Φ(−|x|), Φ the normal distribution: 11 instructions, by a polynomial for its logarithm.

    The error is at most 5e-8, and 1e-6 of the value where |x| < 3 (PyTorch's ½ (1 + erf) has 6e-8
    everywhere, more than the value beyond −5.3). Minimax on [0, 6]; further out it falls on to −∞.
    """
    size = tl.abs(x)
    power = tl.fma(size, -2.7664221292877804e-08, 8.060449090407928e-07)
    power = tl.fma(size, power, -1.0174527233175468e-05)
    power = tl.fma(size, power, 7.061851647449657e-05)
    power = tl.fma(size, power, -0.000255725288297981)
    power = tl.fma(size, power, -5.677676381310448e-05)
    power = tl.fma(size, power, 0.007023804821074009)
    power = tl.fma(size, power, -0.052497271448373795)
    power = tl.fma(size, power, -0.45920172333717346)
    power = tl.fma(size, power, -1.151106357574463)
    return tl.exp2(tl.fma(size, power, -1.0))
