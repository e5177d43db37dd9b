"""One-shot conformal calibration: what DP-FedCP (`conformal`) is measured against. Each client answers once.

    conformal-local      Q_i = local split quantile: the ceil((1 - alpha)(n_i + 1))-th smallest score of client i; infinite where n_i is
                         too small. Nothing is shared (the threshold travels only to be looked at)
    conformal-exact      clients send scores and labels; the server takes the exact weighted quantile. With `target: pooled` it is pooled
                         split conformal prediction, as in FCP; with another target the oracle that DP-FedCP approaches
    conformal-qq         each client sends its local quantile Q_i, the server takes the k-th smallest of them: FedCP-QQ

FCP: Lu, Yu, Karimireddy, Jordan, Raskar, "Federated Conformal Predictors for Distributed Uncertainty Quantification", ICML 2023
(arXiv 2305.17564). FedCP-QQ: Humbert, Le Bars, Bellet, Arlot, "One-Shot Federated Conformal Prediction", ICML 2023 (arXiv 2302.06322).

Under exchangeability G_i(t) = P(Q_i <= t-th quantile of the scores) = I_t(l_i, n_i - l_i + 1) with l_i = ceil((1 - alpha)(n_i + 1)), a
regularised incomplete beta function; 0 where l_i > n_i. The k-th smallest of m independent ones covers with probability
    1 - integral_0^1 P(at least k of Bernoulli(G_i(t)), i = 1..m) dt,
and k is the least with which that is at least 1 - alpha (m + 1, a full set, where there is none).

Differs: FCP puts mass K (clients) at infinity, here it is 1. FedCP-QQ searches over l as well, with all n_i equal; here l_i is as above
and n_i may differ. Neither weighs labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.conformal import (
    Alpha,
    Calibration,
    Heard,
    OneShot,
    Pooled,
    Scored,
    Target,
    all_scores,
    calibration_sizes,
    class_count,
    importance,
    room,
    split_quantile,
    weighted_quantile,
)
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.strategy import NOTHING
from fedsim.tree import record
from fedsim.types import Reply


@record
class Scores:
    """All that a client has: its scores and their labels, `[room]`; 0 beyond its n."""

    v: Tensor
    y: Tensor


@register("send-scores")
@dataclass(frozen=True)
class SendScores(Calibration):
    """Sends all scores and labels of the calibration data: no privacy."""

    def finish(self, problem: Problem, message: Tensor, carry: Scored, n: Tensor) -> Reply:
        return Reply(Scores(carry.v[:-1], carry.y[:-1]), NOTHING, {})


@register("send-quantile")
@dataclass(frozen=True)
class SendQuantile(Calibration):
    """Sends the local split-conformal quantile of the calibration scores."""

    def finish(self, problem: Problem, message: Tensor, carry: Scored, n: Tensor) -> Reply:
        return Reply(split_quantile(carry.v[:-1], carry.n, message), NOTHING, {})


def local_ranks(problem: Problem, alpha: float) -> tuple[Tensor, Tensor]:
    """Which of its scores each client's quantile is, from 1, and of how many: `[N]` float64 twice."""
    n = calibration_sizes(problem).double()
    return ((1 - alpha) * (n + 1) * (1 - 1e-12)).ceil(), n


def local_quantiles(problem: Problem, state: Heard, alpha: float) -> Tensor:
    """Each client's quantile, infinite where it has too few examples, or has not answered. `[N]` float64."""
    rank, n = local_ranks(problem, alpha)
    known = (rank <= n).to(state.heard.device) & state.heard
    return state.answers.double().where(known, torch.inf)


def rank_of_ranks(rank: np.ndarray, n: np.ndarray, alpha: float, points: int = 4000) -> int:
    """k of FedCP-QQ for local ranks and sizes `[m]`: the midpoint rule on `points`, and one array of P(j of m) at each, by convolution."""
    from scipy.special import betainc

    t = (np.arange(points) + 0.5) / points
    p = np.zeros((points, len(n) + 1))
    p[:, 0] = 1
    for j, (l_i, n_i) in enumerate(zip(rank, n, strict=True)):
        g = betainc(l_i, n_i - l_i + 1, t) if l_i <= n_i else np.zeros(points)
        p[:, 1 : j + 2] = p[:, 1 : j + 2] * (1 - g)[:, None] + p[:, : j + 1] * g[:, None]
        p[:, 0] *= 1 - g
    below = p.cumsum(1)[:, :-1].mean(0)  # [m]: 1 - P(at least k), for k = 1..m
    return int(np.searchsorted(below, 1 - alpha)) + 1


@register("conformal-local")
@dataclass(frozen=True)
class LocalConformal(OneShot):
    """Split conformal prediction on each client alone: a client with few calibration examples gets full sets."""

    alpha: Alpha = 0.1
    local: SendQuantile = SendQuantile()

    def blank(self, problem: Problem) -> Tensor:
        return problem.version.new_zeros(())

    def thresholds(self, problem: Problem, state: Heard) -> Tensor:
        return local_quantiles(problem, state, self.alpha)[:, None].expand(-1, class_count(problem))


@register("conformal-exact")
@dataclass(frozen=True)
class ExactConformal(OneShot):
    """Conformal prediction on all clients' scores sent to the server: pooled (Lu et al., ICML 2023), or weighted, the oracle."""

    alpha: Alpha = 0.1
    target: Target = Pooled()
    local: SendScores = SendScores()

    def blank(self, problem: Problem) -> Scores:
        v = problem.version.new_zeros(room(problem))
        return Scores(v, v.long())

    def thresholds(self, problem: Problem, state: Heard) -> Tensor:
        k, sizes = class_count(problem), calibration_sizes(problem)
        v, y = all_scores(state.heard, state.answers.v, state.answers.y, sizes)
        owner = torch.repeat_interleave(torch.arange(problem.clients), torch.where(state.heard.cpu(), sizes.cpu(), 0).long())
        counts = torch.bincount(owner * k + y.cpu(), minlength=problem.clients * k).view(-1, k)  # [N, K]
        weights, lacking = importance(self.target.laws(counts), counts.sum(0))
        return weighted_quantile(v.cpu(), y.cpu(), weights, self.alpha).masked_fill(lacking, torch.inf)


@register("conformal-qq")
@dataclass(frozen=True)
class QuantileOfQuantiles(OneShot):
    """The k-th smallest of the clients' quantiles: one scalar a client, one round (Humbert et al., ICML 2023)."""

    alpha: Alpha = 0.1
    local: SendQuantile = SendQuantile()

    def blank(self, problem: Problem) -> Tensor:
        return problem.version.new_zeros(())

    def thresholds(self, problem: Problem, state: Heard) -> Tensor:
        q = local_quantiles(problem, state, self.alpha)[state.heard].sort().values
        rank, n = (v.cpu().numpy()[state.heard.cpu().numpy()] for v in local_ranks(problem, self.alpha))
        k = rank_of_ranks(rank, n, self.alpha) if len(n) else 1
        found: Any = q[k - 1] if k <= len(q) else q.new_tensor(torch.inf)
        return found.expand(1, class_count(problem))
