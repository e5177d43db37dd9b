"""FedAsync: every model that comes in is mixed into the server's, the less the staler it is.

Xie, Koyejo, Gupta, "Asynchronous Federated Optimization", OPT 2020 (arXiv 1903.03934), Algorithm 1. The asynchrony is the pace
`buffered: {concurrency, buffer: 1}`; clients may add the paper's proximal term, `local: {name: sgd, proximal: rho}`.

    client i:  w_i = local(w_{t - tau_i})
    server:    a_i = alpha * s(tau_i) ;  w <- (1 - a_i) w + a_i w_i

s is `staleness`: constant, hinge or polynomial in the paper.

With several arrivals at once (buffer > 1, or another pace)

    w <- (1 - abar) w + (1 / K) sum_i a_i w_i,     abar = mean of the a_i

which is the paper's update for K = 1.

Differs: the paper mixes one model at a time; the mean above does not depend on the order of arrivals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt, Le
from torch import Tensor

from fedsim.local import Sgd
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.rng import Key
from fedsim.staleness import Polynomial, Staleness
from fedsim.strategy import LocalProgram, ModelState, Report, Strategy
from fedsim.tree import weighted_sum
from fedsim.types import Arrivals, Updates


@register("fedasync")
@dataclass(frozen=True)
class FedAsync(Strategy):
    """Mixes each arriving model into the server's by its staleness (Xie et al., OPT 2020)."""

    recalls: ClassVar[bool] = True

    local: LocalProgram = Sgd()
    alpha: Annotated[float, Gt(0), Le(1)] = 0.6
    staleness: Staleness = Polynomial()

    def init(self, problem: Problem, w: Params) -> ModelState:
        return ModelState(w)

    def mixing(self, arrivals: Arrivals) -> Tensor:
        """a_i, the share of each arriving model, `[K]`."""
        return self.alpha * self.staleness.factor(arrivals.staleness)

    def server(self, problem: Problem, state: ModelState, updates: Updates, key: Key) -> ModelState:
        a = self.mixing(updates.arrivals)  # [K]
        w_i: Params = updates.started + updates.payload  # [K, ...]
        mixed: Params = weighted_sum(w_i, a / len(a))
        return ModelState((1 - float(a.mean())) * state.w + mixed)

    def report(self, problem: Problem, before: ModelState, state: ModelState, arrivals: Arrivals) -> Report:
        return {"weight": self.mixing(arrivals)}
