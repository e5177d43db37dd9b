"""FedAMD: some of the clients are anchors, which send a gradient; the others are miners, which move the model.

Wu, Guo, Qu, He, Liu, Gao, "Anchor Sampling for Federated Learning with Partial Client Participation", ICML 2023
(arXiv 2206.05891). The server keeps v_i, the last large-batch gradient of client i. M clients, A of them sampled:

    vbar = (1/M) sum_i v_i                              at the start of a round
    each sampled client is an anchor with probability p, else a miner
    anchor i:  v_i <- grad F_i(x), over a large batch or all its data ;  sends it ; does not move the model
    miner i:   y_0 = x ;  g_0 = vbar ;  K times, on a batch xi:
                   g_{k+1} = g_k - grad f(y_{k-1}; xi) + grad f(y_k; xi)      y_{-1} = y_0, so the first step goes along vbar
                   y_{k+1} = y_k - lr g_{k+1}
               sends y_K - x
    server:    x <- x + server_lr * mean over miners (y_K - x)      v_i count from the next round on; without miners x stays

    p: a number, or optimal:  opta = argmin_p 1/(1 - p^A) + 2 M / (A p sqrt(1 - p^A))
                              optb = sqrt(4 (M/A)^2 + 2 M/A) - 2 M/A           optc = (2/(A + 2))^(1/A)
    period: all sampled clients are anchors in every so many rounds, else miners (the authors' code, for integers)
    coin: round = one coin for all, as in FedPAGE (Zhao, Li, Richtarik, 2021, arXiv 2108.04755)

Differs: the paper asks all M clients for v_i at x_0. A server here may ask only who is there: in its first round, all of them are anchors,
and vbar is the mean over the clients that it has heard of. Under full participation in that round this is the paper's. Its authors' files
do not run together, so there is no code to compare with. FedPAGE's anchor rounds ask everyone and move the model; `coin: round` does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Gt, Le
from torch import Tensor

from fedsim.local import Constant, Schedule, tally
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.rng import Key, fold_each, units
from fedsim.strategy import NOTHING, Count, LocalProgram, Report, Strategy
from fedsim.table import Table
from fedsim.tree import record
from fedsim.types import Arrivals, Batch, Draws, Job, Reply, Updates


@record
class ToAnchor:
    """What an anchor is sent."""

    x: Params


@record
class ToMiner:
    """What a miner is sent."""

    x: Params
    vbar: Params


@record
class Sent:
    """What both send: a gradient with `anchor` 1, or a change of the model with `anchor` 0."""

    vector: Params
    anchor: Tensor


@record
class Gathering:
    """An anchor on its way: where it stands, and sums over its examples."""

    x: Params
    gradient: Params
    loss: Tensor
    seen: Tensor


@record
class Mining:
    """A miner on its way."""

    y: Params
    before: Params  # y_{k-1}
    g: Params
    loss: Tensor
    seen: Tensor


@register("fedamd-anchor")
@dataclass(frozen=True)
class Anchor(LocalProgram):
    """The mean gradient at the model that was sent, over all data or `steps` batches; runs under the `fedamd` strategy only."""

    receives: ClassVar[type] = ToAnchor

    epochs: Count = 1
    steps: Count | None = None
    batch_size: Count | None = None

    def begin(self, problem: Problem, message: ToAnchor, memory: Any) -> Gathering:
        zero = tally(message.x)
        return Gathering(message.x, message.x.zeros(), zero, zero)

    def step(self, problem: Problem, carry: Gathering, batch: Batch, draws: Draws, passname: str) -> Gathering:
        g, loss = problem.grad(carry.x, batch, draws)
        return Gathering(carry.x, carry.gradient + g * batch.n, carry.loss + batch.n * loss, carry.seen + batch.n)

    def finish(self, problem: Problem, message: ToAnchor, carry: Gathering, n: Tensor) -> Reply:
        return Reply(Sent(carry.gradient / carry.seen, torch.ones_like(carry.seen)), NOTHING, {"loss": (carry.loss, carry.seen)})

    def ages(self) -> bool:
        return False


@register("fedamd-miner")
@dataclass(frozen=True)
class Miner(LocalProgram):
    """Local steps along a gradient that is corrected as in SARAH, two gradients a step; runs under the `fedamd` strategy only."""

    receives: ClassVar[type] = ToMiner

    lr: Annotated[float, Gt(0)] = 0.01
    epochs: Count = 1
    steps: Count | None = 10
    batch_size: Count | None = 64
    schedule: Schedule = Constant()

    def begin(self, problem: Problem, message: ToMiner, memory: Any) -> Mining:
        zero = tally(message.x)
        return Mining(message.x, message.x, message.vbar, zero, zero)

    def step(self, problem: Problem, carry: Mining, batch: Batch, draws: Draws, passname: str) -> Mining:
        old, _ = problem.grad(carry.before, batch, draws)
        new, loss = problem.grad(carry.y, batch, draws)
        g = carry.g - old + new
        y = carry.y.plus(g, -self.lr * self.schedule.factor(problem.version))
        return Mining(y, carry.y, g, carry.loss + batch.n * loss, carry.seen + batch.n)

    def finish(self, problem: Problem, message: ToMiner, carry: Mining, n: Tensor) -> Reply:
        return Reply(Sent(carry.y - message.x, torch.zeros_like(carry.seen)), NOTHING, {"loss": (carry.loss, carry.seen)})


@record
class Anchored:
    """The model, v_i of each client that has been an anchor, their sum (float64), and how many anchors the last round had."""

    w: Params
    v: Table
    total: Params
    anchors: Tensor

    @property
    def vbar(self) -> Params:
        """The mean of the known v_i; zero at the start."""
        return (self.total / max(1, int(self.v.written.sum()))).map(Tensor.to, self.w)


def best_chance(rule: str, clients: int, sampled: int) -> float:
    """The anchor probability that a `rule` takes for best, with M = `clients` and A = `sampled`; `opta` to four digits."""
    m, a = clients, sampled
    if rule == "optb":
        return float(np.sqrt(4 * (m / a) ** 2 + 2 * m / a) - 2 * m / a)
    if rule == "optc":
        return float((2 / (a + 2)) ** (1 / a))
    p = np.arange(1, 10_000) / 10_000
    return float(p[np.argmin(1 / (1 - p**a) + 2 * m / (a * p * np.sqrt(1 - p**a)))])


@register("fedamd")
@dataclass(frozen=True)
class FedAmd(Strategy):
    """Anchors send large-batch gradients, miners take variance-reduced local steps along their mean (Wu et al., ICML 2023).

    p: probability of being an anchor, or the rule that makes it. period: instead of p, every so many rounds have nothing but anchors.
    coin: whether each client is an anchor by a coin of its own, or all of a round by one.
    """

    sends: ClassVar[type] = ToMiner
    paces: ClassVar[frozenset[str]] = frozenset({"sync"})  # A is the size of the cohort, and vbar belongs to a round

    local: Miner = Miner()
    anchor: Anchor = Anchor()
    server_lr: Annotated[float, Gt(0)] = 1.0
    p: Annotated[float, Gt(0), Le(1)] | Literal["opta", "optb", "optc"] = 0.2
    period: Count | None = None
    coin: Literal["client", "round"] = "client"

    def init(self, problem: Problem, w: Params) -> Anchored:
        v = Table.of(w.zeros(), problem.clients, problem.storage)
        return Anchored(w, v, w.zeros().to(torch.float64), torch.zeros_like(problem.version))

    def plan(self, problem: Problem, state: Anchored, ids: np.ndarray, key: Key) -> list[Job]:
        anchor = self._anchors(problem, state, ids, key)  # [C] bool
        jobs = Job(ids[anchor], ToAnchor(state.w), self.anchor), Job(ids[~anchor], ToMiner(state.w, state.vbar), self.local)
        return [job for job in jobs if len(job.ids)]

    def _anchors(self, problem: Problem, state: Anchored, ids: np.ndarray, key: Key) -> np.ndarray:
        if not state.v.written.any():
            return np.ones(len(ids), dtype=bool)
        if self.period is not None:
            return np.full(len(ids), int(problem.version) % self.period == 0)
        p = best_chance(self.p, problem.clients, len(ids)) if isinstance(self.p, str) else self.p
        coins = ids if self.coin == "client" else np.zeros_like(ids)
        return np.asarray(units(fold_each(key, coins), 1)[:, 0] < p)

    def server(self, problem: Problem, state: Anchored, updates: Updates, key: Key) -> Anchored:
        anchor = updates.payload.anchor.cpu() > 0  # [C]
        fresh, miners = updates.take(anchor), updates.take(~anchor)
        w, v, total = state.w, state.v, state.total
        if len(miners):
            w = w + self.server_lr * miners.mean().vector
        if len(fresh):
            ids, new = fresh.arrivals.ids, fresh.payload.vector  # [C, ...]
            total = total + new.map(lambda new, old: (new.double() - old.double()).sum(0), v.get(ids))  # who is new had a zero
            v = v.put(ids, new)
        return Anchored(w, v, total, anchor.sum().to(state.anchors))

    def report(self, problem: Problem, before: Anchored, state: Anchored, arrivals: Arrivals) -> Report:
        return {"anchors": float(state.anchors), "heard": float(state.v.written.sum())}
