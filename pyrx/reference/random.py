"""Draws that are not masks, the definition in csrc/kernels/random.h: +, -, *, / and sqrt alone, normals in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrx.reference.dropout import philox

DRAW_DOMAIN, NOISE_DOMAIN, PAIR_DOMAIN, PATCH_DOMAIN, SPECTRUM_DOMAIN = 1, 2, 3, 4, 5
BETA_ATTEMPTS = 16


def divide(x: Tensor, n: float) -> Tensor:
    """x / n, correctly rounded: on a GPU PyTorch multiplies by the reciprocal of a Python number."""
    return x / torch.full((), n, dtype=x.dtype, device=x.device)


def sqrt(x: Tensor) -> Tensor:
    """Correctly rounded, of float64 x >= 0: on a CPU PyTorch's may be a unit in the last place off."""
    root = torch.sqrt(x)
    high = root * 134217729.0  # 2**27 + 1 splits the root in halves, whose products are exact (Dekker 1971)
    high = high - (high - root)
    low = root - high
    square = root * root
    rest = (x - square) - (((high * high - square) + 2 * high * low) + low * low)  # x - root**2, exactly
    bits = root.view(torch.int64)
    over, under = (bits + 1).view(torch.float64), (bits - 1).view(torch.float64)
    nearer = torch.where(rest > root * (over - root), over, root)
    return torch.where((x > 0) & (rest <= -root * (root - under)), under, nearer)


def uniform(high: Tensor, low: Tensor) -> Tensor:
    """(k + 1/2) / 2**52 in (0, 1), k the upper 52 bits of two words."""
    return ((high << 20 | low >> 12).double() + 0.5) * 2.0**-52


def below(word: Tensor, n: int | Tensor) -> Tensor:
    """An int64 in [0, n), n at most 2**31."""
    return word * n >> 32


def happens(word: Tensor, threshold: int) -> Tensor:
    return word >> 16 < threshold


def log_positive(x: Tensor) -> Tensor:
    """2 s (1 + z / 3 + z**2 / 5 + ...), s = (m - 1) / (m + 1), z = s**2, plus the exponent's share."""
    bits = x.view(torch.int64)
    exponent = ((bits >> 52) - 1022).double()
    m = ((bits & 0x000FFFFFFFFFFFFF) | 0x3FE0000000000000).view(torch.float64)
    small = m < 0.70710678118654752
    m, exponent = torch.where(small, m * 2, m), torch.where(small, exponent - 1, exponent)
    s = (m - 1) / (m + 1)
    z = s * s
    total = torch.zeros_like(x)
    for odd in range(21, 1, -2):
        total = z * (total + 1.0 / odd)
    return exponent * 0.69314718055994531 + (2 * s * total + 2 * s)


def exp_negative(x: Tensor) -> Tensor:
    """exp(x) for x <= 0; 0 below -700."""
    n = torch.floor(x.clamp(min=-700) * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10
    total = torch.ones_like(x)
    for k in range(13, 0, -1):
        total = 1 + divide(total * r, k)
    power = ((n.long() + 1023) << 52).view(torch.float64)
    return torch.where(x >= -700, total * power, 0.0)


def turn(v: Tensor) -> tuple[Tensor, Tensor]:
    """(cos(2 pi v), sin(2 pi v)) for v in [0, 1)."""
    t = 4 * v
    quadrant = torch.floor(t + 0.5)
    a = (t - quadrant) * 1.5707963267948966
    z = a * a
    c, s = torch.ones_like(v), torch.ones_like(v)
    for k in range(16, 1, -2):
        c = 1 - divide(c * z, k * (k - 1))
    for k in range(17, 2, -2):
        s = 1 - divide(s * z, k * (k - 1))
    s = a * s
    q = quadrant.long() & 3
    odd, low = (q & 1) == 1, (q == 0) | (q == 3)
    first, second = torch.where(odd, s, c), torch.where(odd, c, s)
    # quadrants 0 .. 3: (c, s), (-s, c), (-c, -s), (s, -c)
    return torch.where(low, first, -first), torch.where(q < 2, second, -second)


def beta(seed: Tensor, index: Tensor, alpha: float) -> Tensor:
    """Beta(alpha, alpha) of each index, float64 in [0, 1]: see csrc/kernels/random.h for the methods."""
    words = philox(seed, index, 1, DRAW_DOMAIN)
    u, v = uniform(words[..., 0], words[..., 1]), uniform(words[..., 2], words[..., 3])
    if alpha == 1:
        return u
    if alpha > 0.5:
        power = exp_negative(2 / (2 * alpha - 1) * log_positive(u))
        return 0.5 + 0.5 * sqrt(1 - power) * turn(v)[0]
    result, done = torch.zeros_like(u), torch.zeros_like(u, dtype=torch.bool)
    for attempt in range(1, BETA_ATTEMPTS + 1):
        words = philox(seed, index, attempt, DRAW_DOMAIN)
        u, v = uniform(words[..., 0], words[..., 1]), uniform(words[..., 2], words[..., 3])
        x, y = divide(log_positive(u), alpha), divide(log_positive(v), alpha)
        accepted = ~done & (exp_negative(x) + exp_negative(y) <= 1)
        if attempt == BETA_ATTEMPTS:
            accepted = ~done
        ratio = exp_negative(-(x - y).abs())
        result = torch.where(accepted, torch.where(x < y, ratio, 1.0) / (1 + ratio), result)
        done = done | accepted
    return result


def _uniform_float(word: Tensor) -> Tensor:
    """(word >> 8 + 1/2) / 2**24 in (0, 1], float32."""
    return ((word >> 8).float() + 0.5) * 2.0**-24


def _squared_radius(u: Tensor) -> Tensor:
    """-2 ln(u): ln(m) as in log_positive, m in [sqrt(1/2), sqrt(2))."""
    shifted = u.view(torch.int32) + (0x3F800000 - 0x3F3504F3)
    exponent = ((shifted >> 23) - 127).float()
    m = ((shifted & 0x007FFFFF) + 0x3F3504F3).view(torch.float32)
    s = (m - 1) / (m + 1)
    z, twice = s * s, s + s
    total = torch.full_like(s, 1 / 9)
    for odd in (7, 5, 3):
        total = total * z + 1 / odd
    return -2 * (exponent * 0.693147182 + (twice * (total * z) + twice))


def _turn_float(v: Tensor) -> tuple[Tensor, Tensor]:
    """(cos(2 pi v), sin(2 pi v)) for v in [0, 1], float32."""
    t = 4 * v
    q = (t + 0.5).int()
    a = (t - q.float()) * 1.57079637
    z = a * a
    c, s = torch.full_like(z, 1 / 40320), torch.full_like(z, 1 / 362880)
    for even, odd in ((-1 / 720, -1 / 5040), (1 / 24, 1 / 120), (-1 / 2, -1 / 6), (1.0, 1.0)):
        c, s = c * z + even, s * z + odd
    s = s * a
    first, second = torch.where((q & 1) == 1, s, c), torch.where((q & 1) == 1, c, s)
    # quadrants 0 .. 3: (c, s), (-s, c), (-c, -s), (s, -c)
    return torch.where(((q + 1) & 2) == 0, first, -first), torch.where((q & 2) == 0, second, -second)


def normals(seed: Tensor, group: Tensor, sample: int) -> Tensor:
    """Standard normals of elements 4 group .. 4 group + 3 (Box and Muller 1958), float32: (*group.shape, 4)."""
    words = philox(seed, group, sample, NOISE_DOMAIN)
    # in float64, since torch's float32 roots are not all correctly rounded
    radius = _squared_radius(_uniform_float(words[..., ::2])).double().sqrt().float()
    cosine, sine = _turn_float(_uniform_float(words[..., 1::2]))
    return torch.stack([radius * cosine, radius * sine], -1).flatten(-2)


def normal(seed: Tensor, numel: int, sample: int) -> Tensor:
    """The standard normals of elements 0 .. numel - 1, float32."""
    return normals(seed, torch.arange((numel + 3) // 4, device=seed.device), sample).reshape(-1)[:numel]
