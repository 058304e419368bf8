"""Distributions that the statistical tests compare with, in NumPy alone."""

import math

import numpy as np


def beta_cdf(alpha, x):
    """Of Beta(alpha, alpha)."""
    # x = u**(1 / alpha) / 2 takes the pole at zero away: the density in u is (1 - x)**(alpha - 1) times a constant
    u = np.linspace(0, 1, 200001)
    half = 0.5 * u ** (1 / alpha)
    density = (1 - half) ** (alpha - 1)
    integral = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    integral /= 2 * integral[-1]
    low = np.interp((2 * np.minimum(x, 1 - x)) ** alpha, u, integral)
    return np.where(x <= 0.5, low, 1 - low)


def kolmogorov_limit(count):
    """Exceeded by one in 2e-6 samples of that size."""
    return math.sqrt(-math.log(1e-6) / 2 / count)


def chi_square_limit(freedom):
    """Exceeded with a chance of about 1e-6 (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
