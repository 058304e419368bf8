"""Draws that are not masks, as csrc/kernels/random.h defines them: launch with enable_fp_fusion=False."""

import struct

import triton
import triton.language as tl

from .dropout import philox

DRAW_DOMAIN = tl.constexpr(1)
PAIR_DOMAIN = tl.constexpr(3)
BETA_ATTEMPTS = tl.constexpr(16)
_STEP = tl.constexpr(2.0**-52)


def float64_bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


@triton.jit
def float64_of(bits):
    """The float64 of these bits: a Python float would become a float32 argument."""
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def uniform(high, low):
    """(k + 1/2) / 2**52 in (0, 1), k the upper 52 bits of two words."""
    k = (high.to(tl.int64) << 20) | (low >> 12).to(tl.int64)
    return (k.to(tl.float64) + 0.5) * _STEP


@triton.jit
def below(word, n):
    """An int64 in [0, n), n an int64 of at most 2**31."""
    return (word.to(tl.int64) * n) >> 32


@triton.jit
def happens(word, threshold):
    return (word >> 16).to(tl.int64) < threshold


@triton.jit
def log_positive(x):
    bits = x.to(tl.int64, bitcast=True)
    exponent = ((bits >> 52) - 1022).to(tl.float64)
    m = ((bits & 0x000FFFFFFFFFFFFF) | 0x3FE0000000000000).to(tl.float64, bitcast=True)
    small = m < 0.70710678118654752
    m = tl.where(small, m * 2, m)
    exponent = tl.where(small, exponent - 1, exponent)
    s = (m - 1) / (m + 1)
    z = s * s
    total = tl.zeros_like(x)
    for odd in tl.static_range(21, 1, -2):
        total = z * (total + 1.0 / odd)
    return exponent * 0.69314718055994531 + (2 * s * total + 2 * s)


@triton.jit
def exp_negative(x):
    """exp(x) for x <= 0; 0 below -700."""
    large = x >= -700
    x = tl.where(large, x, 0.0)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10
    total = tl.zeros_like(x) + 1
    for k in tl.static_range(13, 0, -1):
        total = 1 + total * r / k
    power = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    return tl.where(large, total * power, 0.0)


@triton.jit
def turn(v):
    """(cos(2 pi v), sin(2 pi v)) for v in [0, 1)."""
    t = 4 * v
    quadrant = tl.floor(t + 0.5)
    a = (t - quadrant) * 1.5707963267948966
    z = a * a
    c = tl.zeros_like(v) + 1
    s = c
    for k in tl.static_range(16, 1, -2):
        c = 1 - c * z / (k * (k - 1))
    for k in tl.static_range(17, 2, -2):
        s = 1 - s * z / (k * (k - 1))
    s = a * s
    q = quadrant.to(tl.int64) & 3
    first = tl.where((q & 1) == 1, s, c)
    second = tl.where((q & 1) == 1, c, s)
    # quadrants 0 .. 3: (c, s), (-s, c), (-c, -s), (s, -c)
    return tl.where((q == 0) | (q == 3), first, -first), tl.where(q < 2, second, -second)


@triton.jit
def _johnk_attempt(seed, index, attempt, alpha):
    w0, w1, w2, w3 = philox(seed, index, attempt, DRAW_DOMAIN)
    return log_positive(uniform(w0, w1)) / alpha, log_positive(uniform(w2, w3)) / alpha


@triton.jit
def beta(seed, index, alpha):
    """Beta(alpha, alpha) of each of a block of indices, float64 in [0, 1]; alpha is a scalar."""
    attempt = tl.cast(1, tl.int32)
    w0, w1, w2, w3 = philox(seed, index, attempt, DRAW_DOMAIN)
    result = uniform(w0, w1)
    if alpha != 1:
        if alpha > 0.5:
            power = exp_negative(2 / (2 * alpha - 1) * log_positive(result))
            cosine, _ = turn(uniform(w2, w3))
            result = 0.5 + 0.5 * tl.sqrt(1 - power) * cosine
        else:
            x, y = _johnk_attempt(seed, index, attempt, alpha)
            rejected = exp_negative(x) + exp_negative(y) > 1
            while (attempt < BETA_ATTEMPTS) & (tl.max(rejected.to(tl.int32), 0) != 0):
                attempt += 1
                next_x, next_y = _johnk_attempt(seed, index, attempt, alpha)
                x = tl.where(rejected, next_x, x)
                y = tl.where(rejected, next_y, y)
                rejected = exp_negative(x) + exp_negative(y) > 1
            ratio = exp_negative(tl.where(x < y, x - y, y - x))
            result = tl.where(x < y, ratio, 1.0) / (1 + ratio)
    return result
