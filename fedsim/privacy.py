"""F1. What noise costs and buys: accounting of Gaussian releases, by dp-accounting and never by hand.

A release adds normal noise to something whose Euclidean length changes by at most its sensitivity when one record changes; its noise
multiplier is the noise's deviation over that sensitivity.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache


def epsilon(releases: Iterable[tuple[float, int]], delta: float) -> float:
    """The epsilon of Gaussian releases, each a noise multiplier and how often it is made, all of the same records, one after another.

    No amplification by sampling is assumed. Privacy loss distributions (Koskela et al., AISTATS 2020), rounded up.
    """
    return _spent(tuple(sorted((z, times) for z, times in releases if times > 0)), delta)


@cache
def _spent(releases: tuple[tuple[float, int], ...], delta: float) -> float:
    from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    for z, times in releases:
        accountant.compose(SelfComposedDpEvent(GaussianDpEvent(z), times))
    return float(accountant.get_epsilon(delta))


@cache
def noise_for(epsilon: float, delta: float) -> float:
    """The least noise multiplier with which one Gaussian release is (epsilon, delta)-private.

    T releases with multipliers z_t cost as much as one with multiplier (sum_t z_t^-2)^(-1/2).
    """
    from dp_accounting import GaussianDpEvent, calibrate_dp_mechanism
    from dp_accounting.pld import PLDAccountant

    return float(calibrate_dp_mechanism(PLDAccountant, GaussianDpEvent, epsilon, delta))
