"""Conformal client weighting: clients count by how large their calibrated prediction sets are, or by how far shared sets miss. OURS.

There is no paper behind this; it is an extension that asks whether what conformal calibration knows of a client helps to aggregate. What we
measured says hardly: see scenarios/papers/conformal-weights.yaml.

    round 0, and every `every` rounds, client i with calibration data, under the model w:
        q_i    = local split quantile of its scores (the largest, where it has too few);   size_i = mean size of its sets under q_i
        miss_i = share of its examples that the shared threshold q leaves out
    server:  q <- sum_i m_i q_i / sum_i m_i                                    m_i: calibration examples
    other rounds:
        Delta_i = local(w) - w
        w <- w + sum_{i in S} a_i Delta_i / sum_{i in S} a_i,  a_i = n_i f_i
        size:  f_i = (size_i / mean size)^power                                power > 0: clients that the model is unsure of count more
        gap:   f_i = exp(power (miss_i - alpha))                               power > 0: clients that shared sets fail count more

A client that was never gauged has f_i = 1; before the second gauging nobody misses. With power = 0 the training rounds are FedAvg's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Gt
from torch import Tensor

from fedsim.conformal import Alpha, Lac, Score, calibration_sizes, class_count, split_quantile
from fedsim.local import Sgd
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.rng import Key
from fedsim.strategy import NOTHING, Count, LocalProgram, Report, Strategy
from fedsim.tree import record
from fedsim.types import Arrivals, Batch, Draw, Draws, Job, Reply, Updates


@record
class Order:
    """The model, the shared threshold, and alpha."""

    w: Params
    q: Tensor
    alpha: Tensor


@record
class Gauged:
    """What is said of a client's sets: scalars."""

    q: Tensor
    size: Tensor
    miss: Tensor


@dataclass(frozen=True)
class Gauge(LocalProgram):
    """Looks at all calibration data of a client at once, and at the model that it received."""

    reads: ClassVar[Literal["train", "calibration"]] = "calibration"

    score: Score
    epochs: int = 1
    steps: int | None = None
    batch_size: int | None = None

    def begin(self, problem: Problem, message: Order, memory: Any) -> tuple[Order, Gauged]:
        zero = torch.zeros_like(message.q)
        return message, Gauged(zero, zero, zero)

    def step(self, problem: Problem, carry: tuple[Order, Gauged], batch: Batch, draws: Draws, passname: str) -> tuple[Order, Gauged]:
        order, u = carry[0], draws["u"]
        output = problem.output(order.w, batch.x)
        v, n = self.score.of(output, batch.y, u).to(order.q), torch.as_tensor(batch.n, device=u.device)
        largest = v.max() if batch.mask is None else v.where(batch.mask > 0, v.new_full((), -torch.inf)).max()
        enough = ((1 - order.alpha) * (n + 1)).ceil() <= n
        q = split_quantile(v, n, order.alpha).where(enough, largest)
        size = self.score.judge(output, batch.y, u, q.expand(len(v), class_count(problem)))[1]
        return order, Gauged(q, batch.mean(size.to(q)), batch.mean((v > order.q).to(q)))

    def finish(self, problem: Problem, message: Order, carry: tuple[Order, Gauged], n: Tensor) -> Reply:
        return Reply(carry[1], NOTHING, {})

    def draws(self, problem: Problem, batch: int) -> dict[str, Draw]:
        return {"u": Draw("uniform", (batch,))}


@record
class Weighing:
    """The model, the shared threshold, and what is known of each client."""

    w: Params
    q: Tensor  # infinite before the first gauging: nobody misses
    size: Tensor  # [N], 0 where a client was never gauged
    miss: Tensor  # [N]
    known: Tensor  # [N] bool


@register("conformal-weights")
@dataclass(frozen=True)
class ConformalWeights(Strategy):
    """FedAvg whose weights follow the size of clients' prediction sets, or the gap in their coverage (ours, experimental).

    rule, power: f_i, see above.
    every: rounds from one gauging to the next; a gauging round trains nothing.
    """

    paces: ClassVar[frozenset[str]] = frozenset({"sync"})
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    local: LocalProgram = Sgd()
    rule: Literal["size", "gap"] = "size"
    power: float = 1.0
    every: Count = 10
    alpha: Alpha = 0.1
    score: Score = Lac()
    server_lr: Annotated[float, Gt(0)] = 1.0

    def init(self, problem: Problem, w: Params) -> Weighing:
        n = problem.version.new_zeros(problem.clients)
        return Weighing(w, problem.version.new_tensor(torch.inf), n, n, n.bool())

    def gauges(self, problem: Problem) -> bool:
        """Whether this round is for looking."""
        return int(problem.version) % self.every == 0

    def plan(self, problem: Problem, state: Weighing, ids: np.ndarray, key: Key) -> list[Job]:
        if not self.gauges(problem):
            return [Job(ids, state.w, self.local)]
        able = ids[calibration_sizes(problem).cpu().numpy()[ids] > 0]
        return [Job(able, Order(state.w, state.q, state.q.new_tensor(self.alpha)), Gauge(self.score))] if len(able) else []

    def weights(self, problem: Problem, state: Weighing, arrivals: Arrivals) -> Tensor:
        """a_i of the arrivals, `[C]`."""
        mean = state.size[state.known].mean() if bool(state.known.any()) else state.size.new_ones(())
        tiny = 1e-12  # where a model is perfect, all sizes may be 0
        factor = ((state.size + tiny) / (mean + tiny)) ** self.power
        if self.rule == "gap":
            factor = (self.power * (state.miss - self.alpha)).exp() if bool(state.q.isfinite()) else torch.ones_like(factor)
        factor = factor.where(state.known, torch.ones_like(factor))
        return arrivals.n.to(factor) * factor[arrivals.ids.to(factor.device)]

    def server(self, problem: Problem, state: Weighing, updates: Updates, key: Key) -> Weighing:
        if not isinstance(updates.payload, Gauged):
            return replace(state, w=state.w + self.server_lr * updates.mean(self.weights(problem, state, updates.arrivals)))
        ids, seen = updates.arrivals.ids.to(state.size.device), updates.payload
        m = calibration_sizes(problem).to(seen.q)[ids]
        size, miss = (table.index_copy(0, ids, new) for table, new in ((state.size, seen.size), (state.miss, seen.miss)))
        return Weighing(state.w, (m * seen.q).sum() / m.sum(), size, miss, state.known.index_fill(0, ids, value=True))

    def report(self, problem: Problem, before: Weighing, state: Weighing, arrivals: Arrivals) -> Report:
        if self.gauges(problem):
            return {"set_size": float(state.size[state.known].mean()), "miss": float(state.miss[state.known].mean())}
        return {"weight": self.weights(problem, before, arrivals)}
