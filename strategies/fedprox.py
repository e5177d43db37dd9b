"""FedProx: FedAvg whose clients are held near the model they received.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020 (arXiv 1812.06127), Algorithm 2.

    client i:  w_i ~ argmin_v f_i(v) + mu/2 ||v - w||^2      by `local`, started at w
    server:    w <- w + sum_{i in S} a_i (w_i - w) / sum_{i in S} a_i

Differs: the paper samples clients by size and averages uniformly; here participation belongs to the fleet, and clients are weighted by
size (`weights: uniform` is the paper's average).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge
from torch import Tensor

from fedsim.local import Sgd
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.rng import Key
from fedsim.staleness import Staleness
from fedsim.strategy import FRESH, LocalProgram, ModelState, WeightedStrategy, Weighting, client_weights
from fedsim.types import Arrivals, Job, Total


@register("fedprox")
@dataclass(frozen=True)
class FedProx(WeightedStrategy):
    """FedAvg with a proximal term of weight mu in every client's loss (Li et al., MLSys 2020)."""

    local: LocalProgram = Sgd()
    mu: Annotated[float, Ge(0)] = 0.01
    weights: Weighting = "samples"
    staleness: Staleness = FRESH

    def __post_init__(self) -> None:
        if not hasattr(self.local, "proximal"):
            raise ValueError(f"local: {type(self.local).__name__} has no proximal term; take sgd or adam")

    def init(self, problem: Problem, w: Params) -> ModelState:
        return ModelState(w)

    def plan(self, problem: Problem, state: ModelState, ids: np.ndarray, key: Key) -> list[Job]:
        program: Any = self.local
        return [Job(ids, state.w, replace(program, proximal=self.mu))]

    @property
    def uniform(self) -> bool:
        return self.weights == "uniform"

    def weigh(self, problem: Problem, state: ModelState, arrivals: Arrivals) -> Tensor:
        return client_weights(self.weights, arrivals, self.staleness)  # [C]

    def apply(self, problem: Problem, state: ModelState, total: Total, arrivals: Arrivals, key: Key) -> ModelState:
        return ModelState(state.w + total.mean())
