"""F3. Statistics of a comparison: means and their intervals, paired differences, corrected tests, ranks. Computed by SciPy; seeded.

n = seeds, k = strategies, m = blocks. A test that cannot be made (one seed, or differences without any spread) has the p-value None, and
whatever has no p-value is never significant. Pairs matter: two strategies under one seed share partition, participation, first model and
batches, so their difference is far less noisy than either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
"""Of every interval."""

ALPHA = 0.05
"""A corrected p-value below it is called significant."""

RESAMPLES = 4999
SEED = 0
"""Of the bootstrap: the same data give the same interval."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Summary:
    """A sample of n values.

    Attributes:
        n: how many.
        mean, std: mean and sample standard deviation (n - 1); std is None for one value.
        interval: 95 % t interval of the mean, or None for one value.
    """

    n: int
    mean: float
    std: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Paired:
    """The difference of two strategies, seed by seed.

    Attributes:
        n: pairs.
        difference: mean of `a - b`.
        interval: 95 % t interval of it, or None for one pair.
        bootstrap: 95 % bootstrap interval of it (BCa), or None for fewer than three pairs.
        p: of the paired t-test, two-sided, or None where there is nothing to test: one pair, or differences that are all the same.
    """

    n: int
    difference: float
    interval: Interval | None
    bootstrap: Interval | None
    p: float | None


def summary(values: Sequence[float]) -> Summary:
    """Mean, standard deviation and interval. Raises ValueError without values."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) == 0:
        raise ValueError("no values to sum up")
    if len(x) == 1:
        return Summary(1, float(x[0]), None, None)
    return Summary(len(x), float(x.mean()), float(x.std(ddof=1)), _t_interval(x))


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """The paired difference `a - b`, values in the same order of seeds. Raises ValueError without any."""
    d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if d.ndim != 1 or len(d) == 0:
        raise ValueError("a paired difference needs two samples of the same seeds")
    if len(d) == 1:
        return Paired(1, float(d[0]), None, None, None)
    return Paired(len(d), float(d.mean()), _t_interval(d), _bootstrap(d), _paired_p(d))


def _t_interval(x: NDArray[np.float64]) -> Interval:
    from scipy import stats

    half = float(stats.t.ppf((1 + LEVEL) / 2, len(x) - 1)) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return float(x.mean()) - half, float(x.mean()) + half


def _paired_p(d: NDArray[np.float64]) -> float | None:
    from scipy import stats

    if _constant(d):
        return None
    p = float(stats.ttest_1samp(d, 0.0).pvalue)
    return p if math.isfinite(p) else None


def _bootstrap(d: NDArray[np.float64]) -> Interval | None:
    """BCa interval of the mean (Efron, JASA 1987), seeded. With fewer than three values there is too little to resample."""
    from scipy import stats

    if len(d) < 3:
        return None
    if _constant(d):
        return float(d.mean()), float(d.mean())
    random = np.random.default_rng(SEED)
    found = stats.bootstrap((d,), np.mean, confidence_level=LEVEL, n_resamples=RESAMPLES, method="BCa", rng=random).confidence_interval
    low, high = float(found.low), float(found.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _constant(d: NDArray[np.float64]) -> bool:
    """Whether the values differ by no more than rounding."""
    return bool(np.ptp(d) <= 1e-12 * max(1.0, float(np.abs(d).max())))


def holm(p: Sequence[float | None]) -> list[float | None]:
    """P-values corrected for having made all these tests at once (Holm, Scand. J. Statist. 1979). None stays None and is no test.

    The i-th smallest of m is multiplied by m - i + 1, never falls below one before it, and is at most 1.
    """
    tests = sorted((value, i) for i, value in enumerate(p) if value is not None)
    out: list[float | None] = [None] * len(p)
    reached = 0.0
    for step, (value, i) in enumerate(tests):
        reached = max(reached, min(1.0, (len(tests) - step) * value))
        out[i] = reached
    return out


def significant(p: float | None) -> bool:
    """Whether a corrected p-value says that there is a difference. None and NaN say nothing."""
    return p is not None and p < ALPHA


def mean_ranks(scores: NDArray[np.float64], higher: bool) -> NDArray[np.float64]:
    """The mean rank of each strategy over blocks, `[m, k] -> [k]`; 1 is best, equal scores share their ranks."""
    from scipy import stats

    return np.asarray(stats.rankdata(-scores if higher else scores, axis=1).mean(axis=0))


def friedman(scores: NDArray[np.float64]) -> float | None:
    """P-value of Friedman's test that no strategy ranks above another, `[m, k]`; None for fewer than three of either, or all ties."""
    from scipy import stats

    m, k = scores.shape
    if m < 3 or k < 3 or all(_constant(row) for row in scores):
        return None
    p = float(stats.friedmanchisquare(*scores.T).pvalue)
    return p if math.isfinite(p) else None


def critical_difference(k: int, m: int) -> float:
    """How far mean ranks of `k` strategies over `m` blocks must be apart (Nemenyi's test; Demsar, JMLR 2006)."""
    from scipy import stats

    q = float(stats.studentized_range.ppf(1 - ALPHA, k, np.inf)) / math.sqrt(2)
    return q * math.sqrt(k * (k + 1) / (6 * m))


def area(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The area under a curve over its width: the mean height, by trapezoids. None for fewer than two points."""
    if len(x) < 2 or x[-1] == x[0]:
        return None
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def reached(values: Sequence[float], target: float, higher: bool) -> int | None:
    """The position of the first value that is at the target or beyond it, or None."""
    return next((i for i, v in enumerate(values) if (v >= target if higher else v <= target)), None)
