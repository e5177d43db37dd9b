"""F3. What prediction sets are worth: how often they hold the true label, for whom, and how large they are.

All counts are of test examples. N = clients, K = classes, M = examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Judged:
    """Prediction sets of test examples.

    Attributes:
        covered: whether a set holds the true label, `[M]` bool.
        size: of each set (labels, or the width of an interval), `[M]`.
        owner: the client of each example, `[M]` int64.
        label: its class, `[M]` int64; all 0 where the task has none.
        clients, classes: N and K.
        counted: whether sizes are numbers of labels.
    """

    covered: NDArray[np.bool_]
    size: Floats
    owner: NDArray[np.int64]
    label: NDArray[np.int64]
    clients: int
    classes: int
    counted: bool

    def by_client(self) -> tuple[Floats, Floats, Floats]:
        """Coverage, mean size and number of examples of each client, `[N]`; NaN where it has no examples."""
        return _means(self.owner, self.clients, self.covered, self.size)

    def by_class(self) -> tuple[Floats, Floats, Floats]:
        """The same of each class, `[K]`."""
        return _means(self.label, self.classes, self.covered, self.size)


def _means(group: NDArray[np.int64], groups: int, covered: NDArray[np.bool_], size: Floats) -> tuple[Floats, Floats, Floats]:
    count = np.bincount(group, minlength=groups).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return (
            np.bincount(group, weights=covered, minlength=groups) / count,
            np.bincount(group, weights=size, minlength=groups) / count,
            count,
        )


def binomial_interval(hits: Any, count: Any, level: float = 0.95) -> tuple[Floats, Floats]:
    """Clopper and Pearson's exact interval of a probability, from hits among independent trials; elementwise. (0, 1) without trials."""
    from scipy.stats import beta

    hits, count = np.asarray(hits, dtype=np.float64), np.asarray(count, dtype=np.float64)
    tail = (1 - level) / 2
    with np.errstate(invalid="ignore"):
        low = np.where(hits > 0, beta.ppf(tail, np.maximum(hits, 1), count - hits + 1), 0.0)
        high = np.where(hits < count, beta.isf(tail, hits + 1, np.maximum(count - hits, 1)), 1.0)
    return low, high


def coverage(judged: Judged, alpha: float) -> dict[str, float]:
    """Numbers to print, for a promise of 1 - alpha. NaN where there is nothing to compute them from.

    marginal          share of all examples whose set holds the true label; low, high: its exact binomial 95 % interval
    client_mean       mean over clients of their coverage;   worst_client the least;   worst_10 mean of the worst ceil(10 %)
    client_gap        mean over clients of |coverage - (1 - alpha)|; it has the noise of small test sets in it
    clients_below     share of clients whose coverage is below 1 - alpha by more than the noise (their 95 % interval ends below)
    class_gap         the same as client_gap over classes (Ding et al., NeurIPS 2023);   worst_class the least
    set_size          mean over examples;   set_size_client_mean over clients
    singletons, empty share of sets with one label, with none; only where sizes count labels
    """
    hits, count = float(judged.covered.sum()), len(judged.covered)
    low, high = binomial_interval(hits, count)
    mine, size, n = judged.by_client()
    out = {"marginal": hits / count if count else math.nan, "low": float(low), "high": float(high)} | _clients(mine, n, alpha)
    if judged.classes > 1:
        theirs = judged.by_class()[0]
        theirs = theirs[~np.isnan(theirs)]
        out |= {"class_gap": float(np.abs(theirs - (1 - alpha)).mean()), "worst_class": float(theirs.min())} if len(theirs) else {}
    out |= {"set_size": float(judged.size.mean()) if count else math.nan, "set_size_client_mean": _mean(size)}
    if judged.counted and count:
        out |= {"singletons": float((judged.size == 1).mean()), "empty": float((judged.size == 0).mean())}
    return out


def _mean(values: Floats) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else math.nan


def _clients(mine: Floats, n: Floats, alpha: float) -> dict[str, float]:
    there = n > 0
    mine, n = np.sort(mine[there]), n[there][np.argsort(mine[there], kind="stable")]
    if not len(mine):
        return dict.fromkeys(("client_mean", "worst_client", "worst_10", "client_gap", "clients_below"), math.nan)
    return {
        "client_mean": float(mine.mean()),
        "worst_client": float(mine[0]),
        "worst_10": float(mine[: -(-len(mine) // 10)].mean()),
        "client_gap": float(np.abs(mine - (1 - alpha)).mean()),
        "clients_below": float((binomial_interval(np.round(mine * n), n)[1] < 1 - alpha).mean()),
    }


def under_law(judged: Judged, law: Floats) -> dict[str, float]:
    """Coverage and set size if classes came by `law` `[K]`, with examples of each class as they are: valid under label shift.

        target            sum_y law_y * coverage_y; target_low, target_high: its 95 % interval (normal, strata independent)
        target_set_size   likewise

    NaN where the law has a class that no example is of.
    """
    covered, size, n = judged.by_class()
    there = law > 0
    share, p, m = law[there], covered[there], n[there]
    if (m == 0).any():
        return dict.fromkeys(("target", "target_low", "target_high", "target_set_size"), math.nan)
    middle = float(share @ p)
    half = 1.959964 * math.sqrt(float(np.square(share) @ (p * (1 - p) / m)))
    return {
        "target": middle,
        "target_low": max(0.0, middle - half),
        "target_high": min(1.0, middle + half),
        "target_set_size": float(share @ size[there]),
    }


def of_client(judged: Judged, client: int) -> dict[str, float]:
    """`target...` on the examples of one client alone, with the exact binomial interval."""
    own = judged.owner == client
    hits, count = float(judged.covered[own].sum()), int(own.sum())
    low, high = binomial_interval(hits, count)
    size = float(judged.size[own].mean()) if count else math.nan
    return {
        "target": hits / count if count else math.nan,
        "target_low": float(low),
        "target_high": float(high),
        "target_set_size": size,
    }
