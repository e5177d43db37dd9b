"""FedVARP and FedStale: the server remembers every client's last update, and lets the absent count by it.

Jhunjhunwala, Sharma, Nagarkatti, Joshi, "FedVARP: Tackling the Variance Due to Partial Client Participation in Federated Learning",
UAI 2022 (arXiv 2207.14130); Rodio and Neglia, "FedStale: Leveraging Stale Client Updates in Federated Learning", 2024 (arXiv 2405.04171).

    client i:  Delta_i = local(w) - w
    server:    v = sum_{i in S} c_i (Delta_i - beta h_i) + beta sum_{i=1..N} alpha_i h_i
               w <- w + server_lr * v;    h_i <- Delta_i for i in S                      h_i = 0 before i first takes part

    beta = 0 is FedAvg weighted by c, beta = 1 is FedVARP, between them is FedStale: (1 - beta) FedAvg + beta FedVARP.

    rates: known       c_i = alpha_i / p_i        unbiased for any beta
           estimated   c_i = alpha_i omega_i      omega as in FedAU (fedsim/intervals.py), the estimate of 1/p_i before this round
           cohort      c_i = alpha_i / sum_{j in S} alpha_j      the mean over those who took part: unbiased where all p_i are equal

With equal alpha, and S of a fixed size drawn uniformly, `cohort` and `known` are the same, and are the FedVARP paper's.

The sum over all clients is kept up to date (in float64): sum_i alpha_i h_i changes by sum_{i in S} alpha_i (Delta_i - h_i). So a round
costs a pass over the cohort, not over N.

Differs: a round in which nobody takes part leaves the model as it is (so does FedStale's code).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from fedsim.intervals import Cutoff, Intervals, judge
from fedsim.local import Sgd
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.rng import Key
from fedsim.strategy import LocalProgram, Report, Strategy, Weighting, client_shares
from fedsim.table import Table
from fedsim.tree import record, weighted_sum
from fedsim.types import Arrivals, Updates

Rates = Literal["known", "estimated", "cohort"]


@record
class Remembering:
    """The model, every client's last update, and who took part how often."""

    w: Params
    h: Table  # h_i, [N, P]
    mean: Params  # sum_i alpha_i h_i, float64
    intervals: Intervals


@dataclass(frozen=True)
class _Recalling(Strategy):
    """The round above, for a beta."""

    paces: ClassVar[frozenset[str]] = frozenset({"sync"})  # the table has one update a client and round

    local: LocalProgram = Sgd()
    server_lr: Annotated[float, Gt(0)] = 1.0
    rates: Rates = "cohort"
    cutoff: Cutoff = None
    weights: Weighting = "uniform"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"rates"} if self.rates == "known" else ())

    @property
    @abstractmethod
    def memory_share(self) -> float:
        """The round's beta."""

    def init(self, problem: Problem, w: Params) -> Remembering:
        h = Table.of(w.zeros(), problem.clients, problem.storage)  # nobody has been heard of
        return Remembering(w, h, w.zeros().to(torch.float64), Intervals.none(problem.clients))

    def _coefficients(self, problem: Problem, state: Remembering, arrivals: Arrivals) -> Tensor:
        """c_i of each arrival, `[C]`."""
        alpha = client_shares(self.weights, problem)[arrivals.ids]
        if self.rates == "cohort":
            return alpha / alpha.sum()
        if self.rates == "estimated":
            return alpha * state.intervals.omega(int(problem.version), self.cutoff, arrivals.ids)
        assert problem.rates is not None  # `needs` has seen to it
        return alpha / problem.rates[arrivals.ids]

    def server(self, problem: Problem, state: Remembering, updates: Updates, key: Key) -> Remembering:
        ids, beta = updates.arrivals.ids, self.memory_share
        h, alpha = state.h.get(ids), client_shares(self.weights, problem)[ids]
        c = self._coefficients(problem, state, updates.arrivals)
        v = weighted_sum(updates.payload, c) - beta * weighted_sum(h, c) + beta * state.mean.map(Tensor.to, state.w)
        mean = state.mean + weighted_sum(updates.payload, alpha) - weighted_sum(h, alpha)
        intervals = state.intervals.after(int(problem.version), self.cutoff, ids)
        return Remembering(state.w + self.server_lr * v, state.h.put(ids, updates.payload), mean, intervals)

    def report(self, problem: Problem, before: Remembering, state: Remembering, arrivals: Arrivals) -> Report:
        """c_i as `weight`, and how good the estimate of 1/p is, where it is used and the truth is known."""
        judged = judge(before.intervals, self.cutoff, problem, arrivals) if self.rates == "estimated" else {}
        return {"weight": self._coefficients(problem, before, arrivals)} | judged


@register("fedvarp")
@dataclass(frozen=True)
class FedVarp(_Recalling):
    """Correct each fresh update by what the server remembers of the client, and add the mean memory (Jhunjhunwala et al., UAI 2022).

    rates: where 1/p_i comes from. cutoff: of `estimated`, as in `fedau`; null = never.
    """

    @property
    def memory_share(self) -> float:
        return 1.0


@register("fedstale")
@dataclass(frozen=True)
class FedStale(_Recalling):
    """Mix fresh updates with remembered ones, in a proportion beta (Rodio and Neglia, 2024).

    rates: where 1/p_i comes from. cutoff: of `estimated`, as in `fedau`; null = never, as in the paper's scripts.
    """

    rates: Rates = "estimated"
    weights: Weighting = "samples"
    beta: Annotated[float, Ge(0), Le(1)] = 0.5

    @property
    def memory_share(self) -> float:
        return self.beta
