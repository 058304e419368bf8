"""FMix's mattes: fields of noise whose spectrum decays with the frequency, cut at a level (Harris et al. 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyrx.reference.dropout import philox
from pyrx.reference.random import DRAW_DOMAIN, SPECTRUM_DOMAIN, happens


def spectrum(seed: Tensor, fields: int, height: int, width: int, decay_power: float) -> Tensor:
    """(fields, H, W // 2 + 1) complex64: normal real and imaginary parts over max(f, 1 / max(H, W)) ** decay_power."""
    device, columns = seed.device, width // 2 + 1
    count = height * columns
    # two normals a counter by Box and Muller, in torch's own functions: transforms differ between devices anyway
    index, field = torch.arange((count + 1) // 2, device=device), torch.arange(fields, device=device)
    words = philox(seed, index.expand(fields, -1), field[:, None], SPECTRUM_DOMAIN).float()
    radius = torch.sqrt(-2 * torch.log((words[..., 0::2] + 0.5) * 2.0**-32))
    normals = torch.polar(radius, words[..., 1::2] * (2 * math.pi * 2.0**-32))
    normals = normals.reshape(fields, -1)[:, :count].reshape(fields, height, columns)
    y = torch.fft.fftfreq(height, device=device, dtype=torch.float32)
    x = torch.fft.rfftfreq(width, device=device, dtype=torch.float32)
    frequency = torch.sqrt(y[:, None] ** 2 + x**2).clamp(min=1 / max(height, width))
    return normals / frequency**decay_power


def field(spectra: Tensor, width: int) -> Tensor:
    """(fields, H, W) float32: the real part of the inverse transform."""
    # one dimension at a time: of both at once, what a spectrum that is not symmetric gives is each library's own matter
    return torch.fft.irfft(torch.fft.ifft(spectra, dim=-2), n=width, dim=-1)


def mattes(
    seed: Tensor, fields: int, height: int, width: int, lam: Tensor, decay_power: float, max_soft: float
) -> Tensor:
    """(N, 1, H, W) of lam (N,), bool, or with max_soft float32: the floor or ceiling of lam H W largest pixels are 1.

    `fields` is N, or 1 where all samples share one.
    """
    samples, pixels = lam.shape[0], height * width
    if samples * pixels == 0:
        return torch.zeros(
            (samples, 1, height, width), dtype=torch.bool if max_soft == 0 else torch.float32, device=lam.device
        )
    noise = field(spectrum(seed, fields, height, width, decay_power), width).reshape(fields, pixels)
    order = noise.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(pixels, device=lam.device).expand(fields, -1))
    words = philox(seed, torch.arange(fields, device=lam.device), 0, DRAW_DOMAIN)
    exact = lam.double() * pixels
    largest = torch.where(happens(words[:, 1], 32768), exact.ceil(), exact.floor()).long()[:, None]
    matte = rank < largest
    if max_soft > 0:
        ramp = (torch.minimum(lam, 1 - lam).double().clamp(max=max_soft) * pixels).long()[:, None]
        falling = (largest + ramp - 1 - rank).float() / (2 * ramp - 1).clamp(min=1)
        matte = torch.where(ramp > 0, falling.clamp(0, 1), matte.to(falling.dtype))
    return matte.reshape(samples, 1, height, width)
