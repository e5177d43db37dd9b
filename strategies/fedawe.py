"""FedAWE: who was away takes a step as long as its absence, from the model that it left with.

Xiang et al., "Efficient Federated Learning against Heterogeneous and Non-stationary Client Unavailability", NeurIPS 2024. Established from
its authors' code (mingxiang12/FedAWE, varying_awe.py), because the paper was not at hand.

    client i:  Delta_i = local(x_i) - x_i                              x_i: the model after the last round in which i took part
    server:    w <- 1/|S| sum_{i in S} (x_i + server_lr * (t - tau_i) Delta_i)
               x_i <- w for i in S                                     tau_i: that round; -1 at first, when x_i is the first model

Differs: the server keeps the x_i and sends each client its own, which is what the client would have kept; a message is sent all the same.
Clients that left in the same round share a job, the others train apart, so a round takes longer than FedAvg's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from annotated_types import Gt
from torch import Tensor

from fedsim.local import Sgd
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.rng import Key
from fedsim.strategy import LocalProgram, Report, Strategy
from fedsim.table import Table
from fedsim.tree import record, rows
from fedsim.types import Arrivals, Job, Updates


@record
class Echo:
    """The model, the models that clients left with, and when."""

    w: Params
    x: Table  # x_i, [N, P]
    since: Tensor  # tau_i + 1, [N]


def absence(problem: Problem, state: Echo, ids: Tensor) -> Tensor:
    """t - tau_i, `[C]` float32."""
    return (problem.version.cpu() + 1 - state.since[ids]).to(torch.float32)


@register("fedawe")
@dataclass(frozen=True)
class FedAWE(Strategy):
    """Make up for absence by longer steps from the model that a client left with (Xiang et al., NeurIPS 2024)."""

    paces: ClassVar[frozenset[str]] = frozenset({"sync"})  # absence is counted in rounds

    local: LocalProgram = Sgd()
    server_lr: Annotated[float, Gt(0)] = 1.0

    def init(self, problem: Problem, w: Params) -> Echo:
        return Echo(w, Table.of(w, problem.clients, problem.storage), torch.zeros(problem.clients, dtype=torch.int64))

    def plan(self, problem: Problem, state: Echo, ids: np.ndarray, key: Key) -> list[Job]:
        since = state.since.numpy()[ids]
        together = [ids[since == left] for left in np.unique(since)]  # who left in the same round left with the same model
        return [Job(group, rows(state.x.get(group[:1]), 0), self.local) for group in together]

    def server(self, problem: Problem, state: Echo, updates: Updates, key: Key) -> Echo:
        ids = updates.arrivals.ids
        x, long = state.x.get(ids), self.server_lr * absence(problem, state, ids)  # [C, P], [C]
        w = (x + updates.payload * long.to(next(iter(state.w.values())))).map(lambda v: v.mean(0))
        kept = w.map(lambda v: v.expand(len(ids), *v.shape))
        return Echo(w, state.x.put(ids, kept), state.since.index_fill(0, ids, int(problem.version) + 1))

    def report(self, problem: Problem, before: Echo, state: Echo, arrivals: Arrivals) -> Report:
        return {"weight": absence(problem, before, arrivals.ids)}
