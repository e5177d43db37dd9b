"""F1. What noise costs and buys: accounting of Gaussian releases, by dp-accounting and never by hand.

A release adds normal noise to something whose Euclidean length changes by at most its sensitivity when one record changes; its noise
multiplier z is the noise's deviation over that sensitivity. Releases of the same records, each chosen in the light of those before, cost
exactly as much as one with multiplier (sum_t z_t^-2)^(-1/2) (Dong, Roth, Su, J. Royal Stat. Soc. B 2022, Corollary 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable


def epsilon(releases: Iterable[tuple[float, int]], delta: float) -> float:
    """The epsilon of Gaussian releases, each a noise multiplier and how often it is made. No amplification by sampling is assumed."""
    from dp_accounting import get_epsilon_gaussian

    square = sum(times / z**2 for z, times in releases)
    return float(get_epsilon_gaussian(1 / math.sqrt(square), delta)) if square else 0.0


def noise_for(epsilon: float, delta: float) -> float:
    """The least noise multiplier with which one Gaussian release is (epsilon, delta)-private."""
    from dp_accounting import get_sigma_gaussian

    return float(get_sigma_gaussian(epsilon, delta))
