"""Ditto: a whole model of one's own, held near the shared one.

Li, Hu, Beirami, Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021 (arXiv 2012.04221), Algorithm 1, with
FedAvg as the shared objective's solver:

    server sends w
    client i:  v_i <- v_i - personal_lr * (grad f_i(v_i) + lam * (v_i - w))      a pass; w is what it received
               w_i <- w_i - lr * grad f_i(w_i)                                   a pass, from w
               keeps v_i, sends w_i - w
    server:    w <- w + server_lr * sum_{i in S} a_i (w_i - w) / sum_{i in S} a_i,   a_i = n_i or 1

lam = 0 is local training, a large one FedAvg (personal_lr * lam must stay below 2). A client that has never taken part runs w.

Differs: the paper's v_i starts as the first w; here as the w of the client's first round, so that a client that comes late, or after a
phase that trained w, does not start behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from fedsim.local import Constant, Schedule, clip, tally
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.rng import Key
from fedsim.staleness import Staleness
from fedsim.strategy import FRESH, Count, LocalProgram, ModelState, WeightedStrategy, Weighting, client_weights
from fedsim.tree import record
from fedsim.types import Arrivals, Batch, Draws, Reply, Total


@record
class Kept:
    """A client's own model, once it `has` one: 1, else 0."""

    v: Params
    has: Tensor

    def model(self, w: Params) -> Params:
        """The own model, or w where there is none yet."""
        return self.v.map(lambda v, w: torch.where(self.has > 0, v, w), w)


@record
class Pair:
    """A client on its way: its own model and the shared one, what it received, and the losses of the shared one's steps."""

    v: Params
    w: Params
    received: Params
    loss: Tensor  # summed over examples
    seen: Tensor  # examples


@register("ditto-sgd")
@dataclass(frozen=True)
class DittoSgd(LocalProgram):
    """SGD on a client's own model, pulled towards the received one by `lam`, then on the received one: runs under `ditto` only."""

    passes: ClassVar[tuple[str, ...]] = ("personal", "shared")
    remembers: ClassVar[bool] = True

    lr: Annotated[float, Gt(0)] = 0.05
    personal_lr: Annotated[float, Gt(0)] | None = None  # null: lr
    lam: Annotated[float, Ge(0)] = 0.1
    epochs: Count = 1
    steps: Count | None = None
    batch_size: Count | None = 32
    clip: Annotated[float, Gt(0)] | None = None
    schedule: Schedule = Constant()

    def begin(self, problem: Problem, message: Params, memory: Kept) -> Pair:
        zero = tally(message)
        return Pair(memory.model(message), message, message, zero, zero)

    def step(self, problem: Problem, carry: Pair, batch: Batch, draws: Draws, passname: str) -> Pair:
        factor = self.schedule.factor(problem.version)
        v, w, received, loss, seen = carry.v, carry.w, carry.received, carry.loss, carry.seen
        if passname == "personal":
            g = clip(problem.grad(v, batch, draws)[0], self.clip) + self.lam * (v - received)
            return Pair(v.plus(g, -(self.personal_lr or self.lr) * factor), w, received, loss, seen)
        g, mean = problem.grad(w, batch, draws)
        return Pair(v, w.plus(clip(g, self.clip), -self.lr * factor), received, loss + batch.n * mean, seen + batch.n)

    def finish(self, problem: Problem, message: Params, carry: Pair, n: Tensor) -> Reply:
        return Reply(carry.w - message, Kept(carry.v, torch.ones_like(carry.loss)), {"loss": (carry.loss, carry.seen)})

    def ages(self) -> bool:
        return self.schedule != Constant()


@register("ditto")
@dataclass(frozen=True)
class Ditto(WeightedStrategy):
    """FedAvg, and for each client a model of its own that is held near it (Li et al., ICML 2021)."""

    personal: ClassVar[bool] = True

    local: DittoSgd = DittoSgd()
    weights: Weighting = "samples"
    server_lr: Annotated[float, Gt(0)] = 1.0
    staleness: Staleness = FRESH

    @property
    def uniform(self) -> bool:
        return self.weights == "uniform"

    def init(self, problem: Problem, w: Params) -> ModelState:
        return ModelState(w)

    def memory(self, problem: Problem, w: Params) -> Kept:
        return Kept(w.zeros(), torch.zeros_like(tally(w)))

    def deploy(self, state: ModelState, memory: Kept) -> Params:
        return memory.model(state.w)

    def weigh(self, problem: Problem, state: ModelState, arrivals: Arrivals) -> Tensor:
        return client_weights(self.weights, arrivals, self.staleness)  # [C]

    def apply(self, problem: Problem, state: ModelState, total: Total, arrivals: Arrivals, key: Key) -> ModelState:
        return ModelState(state.w + self.server_lr * total.mean())
