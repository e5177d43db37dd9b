"""FedOpt: the mean change is a pseudo-gradient for an optimiser on the server. FedAvgM, FedAdagrad, FedAdam, FedYogi.

Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan, "Adaptive Federated Optimization", ICLR 2021 (arXiv 2003.00295),
Algorithm 2; FedAvgM: Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification"
(arXiv 1909.06335).

    Delta = sum_{i in S} a_i Delta_i / sum_{i in S} a_i
    fedavgm:     m <- beta m + Delta ;                              w <- w + server_lr * m
    the others:  m <- beta1 m + (1 - beta1) Delta ;                 w <- w + server_lr * m / (sqrt(v) + tau)
      fedadagrad   v <- v + Delta^2
      fedadam      v <- beta2 v + (1 - beta2) Delta^2
      fedyogi      v <- v - (1 - beta2) Delta^2 sign(v - Delta^2)
    m = 0 and v = tau^2 at the start.

Differs: the paper weights clients uniformly in theory and by examples in its experiments; `weights` chooses, examples by default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Lt
from torch import Tensor

from fedsim.local import Sgd
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.rng import Key
from fedsim.staleness import Staleness
from fedsim.strategy import FRESH, LocalProgram, WeightedStrategy, Weighting, client_weights
from fedsim.tree import record
from fedsim.types import Arrivals, Total

Rate = Annotated[float, Gt(0)]
Decay = Annotated[float, Ge(0), Lt(1)]


@record
class Momentum:
    """The model and the running sum of changes."""

    w: Params
    m: Params


@record
class Moments:
    """The model, and running first and second moments of the change."""

    w: Params
    m: Params
    v: Params


def start(w: Params, tau: float) -> Moments:
    """Moments before the first round."""
    return Moments(w, w.zeros(), w.zeros() + tau**2)


def adapt(rule: FedAdagrad | FedAdam | FedYogi, state: Moments, total: Total, second: Callable[[Params, Params], Params]) -> Moments:
    """One adaptive round: `second` gives the new v from the old one and Delta^2."""
    delta: Params = total.mean()
    m = rule.beta1 * state.m + (1 - rule.beta1) * delta
    v = second(state.v, delta * delta)
    return Moments(state.w + rule.server_lr * (m / (v.sqrt() + rule.tau)), m, v)


@register("fedavgm")
@dataclass(frozen=True)
class FedAvgM(WeightedStrategy):
    """FedAvg with momentum on the server (Hsu et al., 2019)."""

    local: LocalProgram = Sgd()
    server_lr: Rate = 1.0
    beta: Decay = 0.9
    weights: Weighting = "samples"
    staleness: Staleness = FRESH

    def init(self, problem: Problem, w: Params) -> Momentum:
        return Momentum(w, w.zeros())

    @property
    def uniform(self) -> bool:
        return self.weights == "uniform"

    def weigh(self, problem: Problem, state: Momentum, arrivals: Arrivals) -> Tensor:
        return client_weights(self.weights, arrivals, self.staleness)  # [C]

    def apply(self, problem: Problem, state: Momentum, total: Total, arrivals: Arrivals, key: Key) -> Momentum:
        m = self.beta * state.m + total.mean()
        return Momentum(state.w + self.server_lr * m, m)


@register("fedadagrad")
@dataclass(frozen=True)
class FedAdagrad(WeightedStrategy):
    """Adagrad on the server, with the mean change as pseudo-gradient (Reddi et al., ICLR 2021)."""

    local: LocalProgram = Sgd()
    server_lr: Rate = 0.1
    beta1: Decay = 0.0
    tau: Rate = 1e-3
    weights: Weighting = "samples"
    staleness: Staleness = FRESH

    def init(self, problem: Problem, w: Params) -> Moments:
        return start(w, self.tau)

    @property
    def uniform(self) -> bool:
        return self.weights == "uniform"

    def weigh(self, problem: Problem, state: Moments, arrivals: Arrivals) -> Tensor:
        return client_weights(self.weights, arrivals, self.staleness)  # [C]

    def apply(self, problem: Problem, state: Moments, total: Total, arrivals: Arrivals, key: Key) -> Moments:
        return adapt(self, state, total, lambda v, square: v + square)


@register("fedadam")
@dataclass(frozen=True)
class FedAdam(WeightedStrategy):
    """Adam on the server, with the mean change as pseudo-gradient (Reddi et al., ICLR 2021)."""

    local: LocalProgram = Sgd()
    server_lr: Rate = 0.01
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    tau: Rate = 1e-3
    weights: Weighting = "samples"
    staleness: Staleness = FRESH

    def init(self, problem: Problem, w: Params) -> Moments:
        return start(w, self.tau)

    @property
    def uniform(self) -> bool:
        return self.weights == "uniform"

    def weigh(self, problem: Problem, state: Moments, arrivals: Arrivals) -> Tensor:
        return client_weights(self.weights, arrivals, self.staleness)  # [C]

    def apply(self, problem: Problem, state: Moments, total: Total, arrivals: Arrivals, key: Key) -> Moments:
        return adapt(self, state, total, lambda v, square: self.beta2 * v + (1 - self.beta2) * square)


@register("fedyogi")
@dataclass(frozen=True)
class FedYogi(WeightedStrategy):
    """Yogi on the server, with the mean change as pseudo-gradient (Reddi et al., ICLR 2021)."""

    local: LocalProgram = Sgd()
    server_lr: Rate = 0.01
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    tau: Rate = 1e-3
    weights: Weighting = "samples"
    staleness: Staleness = FRESH

    def init(self, problem: Problem, w: Params) -> Moments:
        return start(w, self.tau)

    @property
    def uniform(self) -> bool:
        return self.weights == "uniform"

    def weigh(self, problem: Problem, state: Moments, arrivals: Arrivals) -> Tensor:
        return client_weights(self.weights, arrivals, self.staleness)  # [C]

    def apply(self, problem: Problem, state: Moments, total: Total, arrivals: Arrivals, key: Key) -> Moments:
        return adapt(self, state, total, lambda v, square: v - (1 - self.beta2) * (square * (v - square).sign()))
