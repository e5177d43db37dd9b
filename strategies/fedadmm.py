"""Consensus ADMM: clients pull their own models together by dual variables, over links that add noise.

Baseline of Lari, Arablouei, Gogineni, Werner, "Noise-Robust and Resource-Efficient ADMM-based Federated Learning", Signal Processing 2025
(arXiv 2409.13451). min sum_k alpha_k f_k(w_k), w_k = w; in the paper f_k = 1/2 ||y_k - X_k w_k||^2_{W_k}, with H_k = X_k' W_k X_k and
b_k = X_k' W_k y_k.

    client k has v_k, z_k = 0, receives w (with noise); the first time only the second line, with its z_k = 0:
        z_k <- z_k + rho (v_k - w)                                                                     `dual`
        v_k <- argmin f_k(v) + z_k.v + rho/2 ||v - w||^2  =  (H_k + rho I)^-1 (b_k - z_k + rho w)
      or, by the stationarity of its last solution,
        v_k <- v_k + rho (H_k + rho I)^-1 (2 w - w_before - v_k)                                       `eliminated`
        v_k <- v_k + rho (H_k + rho I)^-1 (w - v_k)                                                    `last`
      sends u_k = v_k + z_k / rho  (`share: sum`; without a dual variable that is w - grad f_k(v_k) / rho),  or u_k = v_k  (`share: model`)
    server:  w <- sum_k alpha_k u_k / sum_k alpha_k, over the last u_k received (with noise) of everyone heard of

`admm-solve` solves exactly, by one Newton step on its quadratic f_k. `admm-sgd` is inexact and for any network: SGD along
grad f_k(v) + z_k + rho (v - w), from v = w. `continues`: a client that is not asked goes on with the last w that it received, up to so many
times; nobody can tell when, so it makes up for them when it is next asked.

Differs: no code and no full text were at hand, only the abstract. UNVERIFIED are the single model in place of 2 w - w_before (`last` is the
obvious reading; with `share: model`, as one would take it, it converges to a wrong point), what an unscheduled client does, and what the
server makes of those who were not scheduled: so nothing here claims to be the paper's own algorithm. A dual variable moves when the next
model is received, which is the same under full participation. alpha_k weighs clients at the server, so that rho_k = alpha_k rho. Where f_k
is not quadratic, `admm-solve` is one Newton step. A client sends u_k and not a change, because noise on changes would add up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from fedsim.errors import ScenarioError
from fedsim.local import tally
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.rng import Key
from fedsim.strategy import Count, LocalProgram, Report, Strategy, Weighting
from fedsim.table import Table
from fedsim.tree import record, weighted_sum
from fedsim.types import Arrivals, Batch, Draws, Job, Reply, Updates

MOST = 4096
"""Parameters up to which `admm-solve` takes a problem: its matrix has their square."""


@record
class Consensus:
    """The message: the global model."""

    w: Params


@record
class Own:
    """What a device remembers."""

    v: Params  # v_k
    z: Params  # z_k, as of its last solution
    heard: Params  # the last global model that it received; empty where nobody asks
    version: Tensor  # of that model; -1 before the first


@record
class Working:
    """A client at work. What it sends is there when it has solved."""

    own: Own
    w: Params  # received
    u: Params
    loss: Tensor  # summed over examples
    seen: Tensor  # examples


class Admm(LocalProgram, ABC):
    """What both programs share."""

    receives: ClassVar[type] = Consensus
    rho: float

    def begin(self, problem: Problem, message: Consensus, memory: Own) -> Working:
        zero = tally(message.w)
        return Working(memory, message.w, message.w, zero, zero)

    def finish(self, problem: Problem, message: Consensus, carry: Working, n: Tensor) -> Reply:
        return Reply(carry.u, carry.own, {"loss": (carry.loss, carry.seen)})

    @abstractmethod
    def blank(self, problem: Problem, w: Params) -> Own:
        """What a device remembers that never took part."""


@register("admm-solve")
@dataclass(frozen=True)
class AdmmSolve(Admm):
    """The exact local solution of ADMM for a quadratic loss, on all of a client's data; runs under `fedadmm` only."""

    rho: Annotated[float, Gt(0)] = 1.0
    form: Literal["dual", "eliminated", "last"] = "dual"
    share: Literal["sum", "model"] = "sum"
    continues: Annotated[int, Ge(0), Le(1000)] = 0
    epochs: Literal[1] = 1
    steps: None = None
    batch_size: None = None

    def blank(self, problem: Problem, w: Params) -> Own:
        if w.size > MOST:
            what = f"admm-solve inverts a matrix of {w.size} x {w.size} numbers, and takes {MOST} at most; take admm-sgd"
            raise ScenarioError("strategy.local", what)
        return Own(w, w.zeros(), w, torch.full_like(problem.version, -1))

    def step(self, problem: Problem, carry: Working, batch: Batch, draws: Draws, passname: str) -> Working:
        own, form, w = carry.own, carry.w, carry.w.vector()
        start, z, heard = own.v.vector(), own.z.vector(), own.heard.vector()
        met, v = own.version >= 0, start

        def f(v: Tensor) -> Tensor:
            return problem.loss(form.from_flat(v), batch, draws)

        slope, h = torch.func.grad(f)(start), torch.func.jacrev(torch.func.grad(f))(start)
        inverse = torch.linalg.inv(h + self.rho * torch.eye(len(v), dtype=v.dtype, device=v.device))

        def gradient(v: Tensor) -> Tensor:
            return slope + h @ (v - start)

        def solve(v: Tensor, z: Tensor, w: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
            if self.form == "dual":
                z = torch.where(met, z + self.rho * (v - w), z)
            solved = v - inverse @ (gradient(v) + z + self.rho * (v - w))
            if self.form == "dual":
                return solved, z
            toward = 2 * w - before if self.form == "eliminated" else w
            return torch.where(met, v + self.rho * inverse @ (toward - v), solved), z

        for s in range(self.continues):
            missed = met & (own.version + s + 1 < problem.version)
            v, z = (torch.where(missed, new, old) for new, old in zip(solve(v, z, heard, heard), (v, z), strict=True))
        v, z = solve(v, z, w, heard)
        total = v + z / self.rho if self.form == "dual" else w - gradient(v) / self.rho
        u = total if self.share == "sum" else v
        own = Own(form.from_flat(v), form.from_flat(z), carry.w, problem.version)
        return Working(own, carry.w, form.from_flat(u), carry.loss + batch.n * f(w), carry.seen + batch.n)


@register("admm-sgd")
@dataclass(frozen=True)
class AdmmSgd(Admm):
    """SGD on ADMM's augmented Lagrangian, from the received model; runs under `fedadmm` only."""

    rho: Annotated[float, Gt(0)] = 1.0
    lr: Annotated[float, Gt(0)] = 0.05
    epochs: Count = 1
    steps: Count | None = None
    batch_size: Count | None = 32

    def blank(self, problem: Problem, w: Params) -> Own:
        return Own(w, w.zeros(), Params({}), torch.full_like(problem.version, -1))

    def begin(self, problem: Problem, message: Consensus, memory: Own) -> Working:
        carry = super().begin(problem, message, memory)
        z = memory.z + self.rho * (memory.v - message.w) * (memory.version >= 0)
        return replace(carry, own=Own(message.w, z, memory.heard, problem.version))

    def step(self, problem: Problem, carry: Working, batch: Batch, draws: Draws, passname: str) -> Working:
        own = carry.own
        g, loss = problem.grad(own.v, batch, draws)
        v = own.v.plus(g + own.z + self.rho * (own.v - carry.w), -self.lr)
        u = v + own.z / self.rho
        return Working(replace(own, v=v), carry.w, u, carry.loss + batch.n * loss, carry.seen + batch.n)


@record
class Known:
    """The server's state."""

    w: Params
    u: Table  # the last u_k of each client, [N, P]
    total: Params  # sum_k alpha_k u_k, float64


@register("fedadmm")
@dataclass(frozen=True)
class FedAdmm(Strategy):
    """Consensus ADMM over links that add noise: exact for least squares, inexact for networks (after Lari et al., 2025)."""

    sends: ClassVar[type] = Consensus
    paces: ClassVar[frozenset[str]] = frozenset({"sync"})  # the table has one u_k a client and round

    local: Admm = AdmmSgd()
    weights: Weighting = "uniform"

    def init(self, problem: Problem, w: Params) -> Known:
        return Known(w, Table.of(w.zeros(), problem.clients, problem.storage), w.zeros().to(torch.float64))

    def memory(self, problem: Problem, w: Params) -> Own:
        return self.local.blank(problem, w)

    def plan(self, problem: Problem, state: Known, ids: np.ndarray, key: Key) -> list[Job]:
        return [Job(ids, Consensus(state.w), self.local)]

    def server(self, problem: Problem, state: Known, updates: Updates, key: Key) -> Known:
        ids, sizes = updates.arrivals.ids, problem.sizes.to(torch.float64)  # [C], [N]
        alpha = sizes if self.weights == "samples" else torch.ones_like(sizes)
        total = state.total + weighted_sum(updates.payload, alpha[ids]) - weighted_sum(state.u.get(ids), alpha[ids])
        u = state.u.put(ids, updates.payload)
        heard = alpha[torch.from_numpy(u.written)].sum()
        return Known((total / heard).map(Tensor.to, state.w), u, total)

    def report(self, problem: Problem, before: Known, state: Known, arrivals: Arrivals) -> Report:
        return {"heard": float(state.u.written.mean())}
