"""Prediction of future weights: clients begin where the server's model will be when their update comes back.

A baseline of Wang and Gao, "Tackling Intertwined Data and Device Heterogeneities in Federated Learning with Unlimited Staleness", AAAI 2025
(arXiv 2309.13536), who call it weight prediction, W-Pred. Prediction along the last direction is that of SpecTrain (Chen, Yang and Cheng,
arXiv 1809.02839) for pipelined training.

    server sends   w_hat = w_t + tau_hat * d_t                      the model in tau_hat updates, if it goes on as it did
    client i       Delta_i = local(w_hat) - w_hat
    server         step = server_lr * sum_i a_i Delta_i / sum_i a_i ;  w_{t+1} = w_t + step
                   d_{t+1} = (1 - momentum) step + momentum d_t           the mean step
                   tau_hat = (1 - momentum) mean(tau_i) + momentum tau_hat   the mean staleness
    a_i = n_i or 1

Without staleness tau_hat stays 0, and this is FedAvg, bit for bit.

Differs: the paper names linear prediction and gives no details that could be found; one horizon for all clients and exponential means are
ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from fedsim.local import Sgd
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.rng import Key
from fedsim.strategy import LocalProgram, Report, WeightedStrategy, Weighting, client_weights
from fedsim.tree import record
from fedsim.types import Arrivals, Job, Total


@record
class Course:
    """The model, where it will be (w_hat), its mean step d, and the mean staleness tau_hat of updates."""

    w: Params
    ahead: Params
    d: Params
    tau: float


@register("weight-prediction")
@dataclass(frozen=True)
class WeightPrediction(WeightedStrategy):
    """Sends clients the model as it will be when their update is back, by linear extrapolation (a baseline of Wang and Gao, AAAI 2025)."""

    local: LocalProgram = Sgd()
    weights: Weighting = "samples"
    server_lr: Annotated[float, Gt(0)] = 1.0
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9

    def init(self, problem: Problem, w: Params) -> Course:
        return Course(w, w, w.zeros(), 0.0)

    def plan(self, problem: Problem, state: Course, ids: np.ndarray, key: Key) -> list[Job]:
        return [Job(ids, state.ahead, self.local)]

    def weigh(self, problem: Problem, state: Course, arrivals: Arrivals) -> Tensor:
        return client_weights(self.weights, arrivals)  # [C]

    def apply(self, problem: Problem, state: Course, total: Total, arrivals: Arrivals, key: Key) -> Course:
        step: Params = self.server_lr * total.mean()
        tau = (1 - self.momentum) * float(arrivals.staleness.double().mean()) + self.momentum * state.tau
        w, d = state.w + step, (1 - self.momentum) * step + self.momentum * state.d
        return Course(w, w.plus(d, tau) if tau else w, d, tau)

    def report(self, problem: Problem, before: Course, state: Course, arrivals: Arrivals) -> Report:
        return {"weight": self.weigh(problem, before, arrivals), "horizon": before.tau, "mean step": float(before.d.norm())}
