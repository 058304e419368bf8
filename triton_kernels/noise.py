"""Standard normals as csrc/kernels/random.h defines them: launch with enable_fp_fusion=False."""

import triton
import triton.language as tl

from .dropout import philox

NOISE_DOMAIN = tl.constexpr(2)


@triton.jit
def _uniform(word):
    return ((word >> 8).to(tl.int32).to(tl.float32) + 0.5) * 5.9604644775390625e-08


@triton.jit
def _squared_radius(u):
    """-2 ln(u): ln(m) = 2 s (1 + z / 3 + ...), s = (m - 1) / (m + 1), z = s**2, m in [sqrt(1/2), sqrt(2))."""
    shifted = u.to(tl.int32, bitcast=True) + 0x004AFB0D
    exponent = ((shifted >> 23) - 127).to(tl.float32)
    m = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    s = tl.div_rn(m - 1, m + 1)
    z = s * s
    twice = s + s
    total = z * 0 + 1 / 9
    total = total * z + 1 / 7
    total = total * z + 1 / 5
    total = total * z + 1 / 3
    return -2 * (exponent * 0.693147182 + (twice * (total * z) + twice))


@triton.jit
def _turn(v):
    """(cos(2 pi v), sin(2 pi v)) for v in [0, 1]."""
    t = 4 * v
    q = (t + 0.5).to(tl.int32)
    a = (t - q.to(tl.float32)) * 1.57079637
    z = a * a
    c = z * 0 + 1 / 40320
    s = z * 0 + 1 / 362880
    c = c * z - 1 / 720
    s = s * z - 1 / 5040
    c = c * z + 1 / 24
    s = s * z + 1 / 120
    c = c * z - 1 / 2
    s = s * z - 1 / 6
    c = c * z + 1
    s = (s * z + 1) * a
    first = tl.where((q & 1) == 1, s, c)
    second = tl.where((q & 1) == 1, c, s)
    # quadrants 0 .. 3: (c, s), (-s, c), (-c, -s), (s, -c)
    return tl.where(((q + 1) & 2) == 0, first, -first), tl.where((q & 2) == 0, second, -second)


@triton.jit
def normals(seed, group, sample):
    """The four standard normals of elements 4 * group .. 4 * group + 3."""
    w0, w1, w2, w3 = philox(seed, group, sample, NOISE_DOMAIN)
    first = tl.sqrt_rn(_squared_radius(_uniform(w0)))
    second = tl.sqrt_rn(_squared_radius(_uniform(w2)))
    cosine0, sine0 = _turn(_uniform(w1))
    cosine1, sine1 = _turn(_uniform(w3))
    return first * cosine0, first * sine0, second * cosine1, second * sine1


@triton.jit
def normal(seed, element, sample):
    """The standard normal of each element, in any order: a Philox call an element."""
    n0, n1, n2, n3 = normals(seed, element >> 2, sample)
    lane = element & 3
    return tl.where(lane < 2, tl.where(lane == 0, n0, n1), tl.where(lane == 2, n2, n3))


@triton.jit
def four_normals(seed, group, sample, GROUPS: tl.constexpr):
    """(GROUPS, 4): the normals of a block of groups."""
    n0, n1, n2, n3 = normals(seed, group, sample)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (GROUPS, 4))
