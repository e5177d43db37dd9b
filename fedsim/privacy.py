"""F1. Differential privacy: what a mechanism is known by, what it spends, and the parts that it is made of.

Accounting is dp-accounting's, never by hand; a function here only says which events have happened. Units, and what neighbours are:

    example   add or remove one training example of one client; the number of examples that a client has is public
    client    add or remove one client with all its data (`cohort` sampling: replace one client)

dp-accounting takes over a second to import, and is imported where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedsim.entropy import Entropy
from fedsim.errors import FedsimError
from fedsim.params import Params
from fedsim.rng import Key

if TYPE_CHECKING:
    from collections.abc import Iterator

Unit = Literal["example", "client"]
Accountant = Literal["rdp", "pld"]
Clipping = Literal["flat", "per-layer", "automatic"]

AUTOMATIC = 0.01
"""gamma of automatic clipping, as in its paper."""


@dataclass(frozen=True)
class Protection:
    """A Gaussian mechanism, used once a step (example) or once a round (client).

    Attributes:
        unit: whom it protects.
        noise: standard deviation of the noise over the sensitivity of what it is added to; None = to be solved for.
        pretended: `(cohort, population)` of a larger federation whose noise a small simulation has; the account is then that one's.
    """

    unit: Unit
    noise: float | None
    pretended: tuple[int, int] | None = None


@dataclass(frozen=True)
class Spent:
    """Uses of a Gaussian mechanism, all alike.

    Attributes:
        noise: standard deviation over sensitivity to adding or removing one record.
        rate: chance with which each record is in a use, independently (Poisson); 1 = all are.
        uses: how often.
        of: `(m, n)` where exactly m of n records are in each use instead; neighbours then differ by one that is replaced.
    """

    noise: float
    rate: float
    uses: int
    of: tuple[int, int] | None = None


def epsilon(spent: Sequence[Spent], delta: float, accountant: Accountant = "rdp") -> float:
    """The epsilon of everything together, at `delta`. No noise: infinity; nothing: zero."""
    spent = [each for each in spent if each.uses > 0 and (each.rate > 0 or each.of)]
    if not spent:
        return 0.0
    if any(each.noise <= 0 for each in spent):
        return math.inf
    replaced = any(each.of for each in spent)
    with _quiet():
        if accountant == "pld" and not replaced:  # it knows no sampling without replacement
            return _by_losses(spent, delta)
        return _by_divergence(spent, delta, replaced)


def _by_losses(spent: Sequence[Spent], delta: float) -> float:
    from dp_accounting import pld

    account = pld.PLDAccountant()
    for each in spent:
        account.compose(_event(each, replaced=False), each.uses)
    return float(account.get_epsilon(delta))


def _by_divergence(spent: Sequence[Spent], delta: float, replaced: bool) -> float:
    from dp_accounting import rdp

    curves = [_curve(replace(each, uses=1), replaced) for each in spent]
    total = sum(each.uses * values for each, (_, values) in zip(spent, curves, strict=True))
    return float(rdp.compute_epsilon(curves[0][0], total, delta)[0])


@lru_cache(maxsize=1024)
def _curve(once: Spent, replaced: bool) -> tuple[np.ndarray, np.ndarray]:
    """Renyi divergences of one use, by order. Kept, because a tenth of a second in every round would be a nuisance."""
    import dp_accounting as dp
    from dp_accounting import rdp

    class Curve(rdp.RdpAccountant):
        def values(self) -> tuple[np.ndarray, np.ndarray]:
            return np.asarray(self._orders), np.asarray(self._rdp)

    neighbours = dp.NeighboringRelation.REPLACE_ONE if replaced else dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    return Curve(neighboring_relation=neighbours).compose(_event(once, replaced)).values()


def solve_noise(target: float, delta: float, spent: Sequence[Spent], accountant: Accountant = "rdp") -> float:
    """The least noise with which `spent` costs at most epsilon = `target`, in the place of each noise that is NaN. To 0.05 %, rounded up.

    Raises:
        FedsimError: no noise up to 10^6 is enough.
    """

    def cost(noise: float) -> float:
        return epsilon([replace(each, noise=noise) if math.isnan(each.noise) else each for each in spent], delta, accountant)

    high = 1.0
    while cost(high) > target:
        high *= 2
        if high > MOST_NOISE:
            raise FedsimError(f"no noise multiplier up to {MOST_NOISE:g} reaches epsilon = {target:g} at delta = {delta:g}")
    low = high / 2 if high > 1 else 0.0
    while high - low > 5e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= target else (middle, high)
    return high


MOST_NOISE = 1e6


def gaussian_epsilon(releases: Iterable[tuple[float, int]], delta: float) -> float:
    """The epsilon of Gaussian releases, each a noise multiplier and how often it is made. No amplification by sampling is assumed.

    Releases of the same records, each chosen in the light of those before, cost exactly as much as one with noise multiplier
    (sum_t z_t^-2)^(-1/2) (Dong, Roth and Su, J. Royal Stat. Soc. B 2022, Corollary 3.3).
    """
    from dp_accounting import get_epsilon_gaussian

    square = sum(times / z**2 for z, times in releases)
    return float(get_epsilon_gaussian(1 / math.sqrt(square), delta)) if square else 0.0


def gaussian_noise(epsilon: float, delta: float) -> float:
    """The least noise multiplier with which one Gaussian release is (epsilon, delta)-private."""
    from dp_accounting import get_sigma_gaussian

    return float(get_sigma_gaussian(epsilon, delta))


def zcdp(spent: Sequence[Spent]) -> float:
    """rho of zero-concentrated privacy (Bun and Steinke, 2016), without amplification by sampling: `sum uses / (2 noise^2)`."""
    used = [each for each in spent if each.uses > 0]
    return sum(each.uses * (4 if each.of else 1) / (2 * each.noise**2) if each.noise > 0 else math.inf for each in used)


def default_delta(records: float) -> float:
    """`1 / n^1.1`: below 1/n, at which a mechanism may publish a record in the clear."""
    return float(min(0.5, records**-1.1))


def _event(spent: Spent, replaced: bool) -> Any:
    """One use, in dp-accounting's words."""
    import dp_accounting as dp

    # One record replaced moves a sum by twice as much as one removed.
    noise = spent.noise / 2 if replaced else spent.noise
    event: Any = dp.GaussianDpEvent(noise)
    if spent.of:
        event = dp.SampledWithoutReplacementDpEvent(spent.of[1], spent.of[0], event)
    elif spent.rate < 1 and not replaced:  # replacing under Poisson sampling: no amplification is claimed
        event = dp.PoissonSampledDpEvent(spent.rate, event)
    return event


@contextmanager
def _quiet() -> Iterator[None]:
    """Without absl's warnings about orders that do not converge: those are left out, which is sound."""
    import logging

    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


# ---- the parts of a mechanism


def example_norms(g: Params) -> Tensor:
    """Length of each example's gradient, over all tensors. `{[B, ...]} -> [B]`."""
    return torch.stack([v[:, None].flatten(1).square().sum(1) for v in g.values()]).sum(0).sqrt()


def clipped_sum(g: Params, mask: Tensor | None, limit: float, clipping: Clipping = "flat") -> Params:
    """Sum over examples of gradients that are no longer than `limit`: adding or removing one moves it by at most that.

        flat        g_i * min(1, C / ||g_i||)                                      Abadi et al., CCS 2016
        per-layer   each tensor of g_i by its own length, to C / sqrt(tensors)     McMahan et al., ICLR 2018
        automatic   g_i * C / (||g_i|| + 0.01)                                     Bu et al., NeurIPS 2023 (AUTO-S)

    An example whose gradient is not finite counts as zero: it must not decide whether an update is accepted.

    Args:
        g: gradients of the examples, `{[B, ...]}`.
        mask: 1 for an example and 0 for padding, `[B]`, or None.
    """
    if clipping == "per-layer":
        each = limit / math.sqrt(len(g))
        return Params({k: clipped_sum(Params({k: v}), mask, each)[k] for k, v in g.items()})
    norms = example_norms(g)
    factor = limit / (norms + AUTOMATIC) if clipping == "automatic" else (limit / norms.clamp(min=1e-12)).clamp(max=1)
    factor = torch.where(norms.isfinite(), factor, 0.0)
    if mask is not None:
        factor = factor * mask
    return g.map(lambda v: torch.tensordot(factor.to(v.dtype), v.nan_to_num(0.0, 0.0, 0.0), dims=1))


def clipped(delta: Params, limit: Tensor | float) -> tuple[Params, Tensor]:
    """`delta` no longer than `limit`, and whether it was: 1 or 0, a scalar."""
    norm = delta.norm()
    return delta * (limit / norm.clamp(min=1e-12)).clamp(max=1), (norm <= limit).to(norm.dtype)


def noise_like(w: Params, key: Key, entropy: Entropy) -> Params:
    """Standard normal noise of the shape of `w`, one stream for all tensors."""
    drawn = torch.from_numpy(entropy.normal(np.array([key], dtype=np.uint64), (w.size,)))[0]
    return w.from_flat(drawn.to(next(iter(w.values()))))
