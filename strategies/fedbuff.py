"""FedBuff: buffered asynchronous aggregation.

Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba, "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022
(arXiv 2106.06639), Algorithm 1. The asynchrony is the pace `buffered: {concurrency, buffer}`; this is what the server makes of a buffer.

    client i:  Delta_i = local(w_{t - tau_i}) - w_{t - tau_i}
    server:    w <- w + server_lr * (1 / K) sum_{i in buffer} s(tau_i) Delta_i,     K = updates in the buffer

s is `staleness`, 1 / sqrt(1 + tau) in the paper's experiments. What counts less is not made up for: the sum is divided by K, not by the sum
of the s(tau_i).

Differs: a client whose update waits in the buffer takes no new job before it is aggregated, so a buffer holds a client once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt
from torch import Tensor

from fedsim.local import Sgd
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.rng import Key
from fedsim.staleness import Polynomial, Staleness
from fedsim.strategy import LocalProgram, ModelState, WeightedStrategy
from fedsim.types import Arrivals, Total


@register("fedbuff")
@dataclass(frozen=True)
class FedBuff(WeightedStrategy):
    """Average of a buffer of updates, each shrunk by its staleness (Nguyen et al., AISTATS 2022)."""

    local: LocalProgram = Sgd()
    staleness: Staleness = Polynomial()
    server_lr: Annotated[float, Gt(0)] = 1.0

    def init(self, problem: Problem, w: Params) -> ModelState:
        return ModelState(w)

    def weigh(self, problem: Problem, state: ModelState, arrivals: Arrivals) -> Tensor:
        return self.staleness.factor(arrivals.staleness)  # [K]

    def apply(self, problem: Problem, state: ModelState, total: Total, arrivals: Arrivals, key: Key) -> ModelState:
        return ModelState(state.w.plus(total.payload, self.server_lr / len(arrivals)))
