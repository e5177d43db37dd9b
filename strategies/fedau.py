"""FedAU: clients that take part rarely count more, by an online estimate of how rarely. And the baseline that knows it.

Wang and Ji, "A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging", ICLR 2024 (arXiv 2306.03401),
Algorithms 1 and 2.

    client i:  Delta_i = local(w) - w
    server:    w <- w + server_lr * (1/N) sum_{i in S} omega_i Delta_i          N: all clients, not those that took part

    fedau:     omega_i = mean length of i's intervals between participations, each cut at `cutoff` rounds, up to the round BEFORE this one
    known-p:   omega_i = 1 / p_i, with the true probability that i takes part

The objective is the mean over clients of their losses, whatever their sizes. With omega_i = 1 / p_i the step is unbiased for it. The
paper's two other baselines are `fedavg` with `weights: uniform` (average-participating) and `weights: all` (average-all).

`fedsim/intervals.py` has the estimator. Until its first interval is complete, a client counts as 1: the first rounds move slowly.

Differs: the server keeps the intervals, not each client; the numbers are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt
from torch import Tensor

from fedsim.intervals import Cutoff, Intervals, judge
from fedsim.local import Sgd
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.rng import Key
from fedsim.strategy import LocalProgram, ModelState, Report, WeightedStrategy, Weighting, client_shares
from fedsim.tree import record
from fedsim.types import Arrivals, Total


@record
class Counting:
    """The model, and what is known of who takes part how often."""

    w: Params
    intervals: Intervals


@register("fedau")
@dataclass(frozen=True)
class FedAU(WeightedStrategy):
    """Weigh clients by the mean interval between their participations, learned online (Wang and Ji, ICLR 2024).

    cutoff: K, the length at which an interval is cut: less variance for some bias; null = never. The authors' example and FedAWE take 50.
    """

    paces: ClassVar[frozenset[str]] = frozenset({"sync"})  # an interval is counted in rounds

    local: LocalProgram = Sgd()
    server_lr: Annotated[float, Gt(0)] = 1.0
    cutoff: Cutoff = 50

    def init(self, problem: Problem, w: Params) -> Counting:
        return Counting(w, Intervals.none(problem.clients))

    def weigh(self, problem: Problem, state: Counting, arrivals: Arrivals) -> Tensor:
        return state.intervals.omega(int(problem.version), self.cutoff, arrivals.ids)  # [C]

    def apply(self, problem: Problem, state: Counting, total: Total, arrivals: Arrivals, key: Key) -> Counting:
        w = state.w + self.server_lr * (total.payload / problem.clients)
        return Counting(w, state.intervals.after(int(problem.version), self.cutoff, arrivals.ids))

    def report(self, problem: Problem, before: Counting, state: Counting, arrivals: Arrivals) -> Report:
        return {"weight": self.weigh(problem, before, arrivals)} | judge(before.intervals, self.cutoff, problem, arrivals)


@register("known-p")
@dataclass(frozen=True)
class KnownP(WeightedStrategy):
    """Weigh clients by the inverse of their true participation probability: what estimators are measured against.

    weights: uniform = the objective is the mean over clients, as in FedAU; samples = over examples, as in FedStale.
    """

    paces: ClassVar[frozenset[str]] = frozenset({"sync"})
    needs: ClassVar[frozenset[str]] = frozenset({"rates"})

    local: LocalProgram = Sgd()
    server_lr: Annotated[float, Gt(0)] = 1.0
    weights: Weighting = "uniform"

    def init(self, problem: Problem, w: Params) -> ModelState:
        return ModelState(w)

    def weigh(self, problem: Problem, state: ModelState, arrivals: Arrivals) -> Tensor:
        assert problem.rates is not None  # `needs` has seen to it
        return client_shares(self.weights, problem)[arrivals.ids] / problem.rates[arrivals.ids]  # alpha_i / p_i, [C]

    def apply(self, problem: Problem, state: ModelState, total: Total, arrivals: Arrivals, key: Key) -> ModelState:
        return ModelState(state.w + self.server_lr * total.payload)
