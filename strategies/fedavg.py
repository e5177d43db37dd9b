"""FedAvg: federated averaging.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas, "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017
(arXiv 1602.05629), Algorithm 1.

    client i:  Delta_i = local(w) - w                                   several epochs of SGD from w
    server:    w <- w + server_lr * sum_{i in S} a_i Delta_i / A

    samples:   a_i = n_i,  A = sum_{i in S} n_i                         the paper's
    uniform:   a_i = 1,    A = |S|
    all:       a_i = 1,    A = N: an absent client counts as one that did not move

At paces where updates come in stale, a_i is multiplied by s(tau_i), `staleness`.

Differs: the paper averages models; averaging their changes is the same when server_lr = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt
from torch import Tensor

from fedsim.local import Sgd
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.rng import Key
from fedsim.staleness import Staleness
from fedsim.strategy import FRESH, LocalProgram, ModelState, WeightedStrategy, client_weights
from fedsim.types import Arrivals, Total


@register("fedavg")
@dataclass(frozen=True)
class FedAvg(WeightedStrategy):
    """Average the clients' changes, weighted by examples, uniformly, or over all clients (McMahan et al., AISTATS 2017)."""

    local: LocalProgram = Sgd()
    weights: Literal["samples", "uniform", "all"] = "samples"
    server_lr: Annotated[float, Gt(0)] = 1.0
    staleness: Staleness = FRESH

    def init(self, problem: Problem, w: Params) -> ModelState:
        return ModelState(w)

    @property
    def uniform(self) -> bool:
        return self.weights != "samples"

    def weigh(self, problem: Problem, state: ModelState, arrivals: Arrivals) -> Tensor:
        return client_weights("samples" if self.weights == "samples" else "uniform", arrivals, self.staleness)  # [C]

    def apply(self, problem: Problem, state: ModelState, total: Total, arrivals: Arrivals, key: Key) -> ModelState:
        delta: Params = total.payload / problem.clients if self.weights == "all" else total.mean()
        return ModelState(state.w + self.server_lr * delta)
