"""MIFA: every client counts in every round, the absent by the last update that they sent.

Gu, Huang, Zhang, Huang, "Fast Federated Learning in the Presence of Arbitrary Device Unavailability", NeurIPS 2021 (arXiv 2106.04159).

    client i:  Delta_i = local(w) - w
    server:    h_i <- Delta_i for i in S                                     h_i = 0 before i first takes part
               w <- w + server_lr * (1/N) sum_{i=1..N} h_i

The sum over all clients is kept up to date (in float64), so a round costs a pass over the cohort, not over N.

Differs: the paper lets everybody take part in the first round; here who was never heard of counts as one that did not move (so do the
codes of FedAU and FedAWE), or with `wait` the model stays where it is until everybody was heard of. A round in which nobody takes part
leaves the model as it is; the paper's would repeat the last mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

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
from fedsim.tree import record, weighted_sum
from fedsim.types import Arrivals, Updates


@record
class Memories:
    """The model, and every client's last update."""

    w: Params
    h: Table  # h_i, [N, P]
    total: Params  # sum_i h_i, float64


@register("mifa")
@dataclass(frozen=True)
class Mifa(Strategy):
    """Average the last update of every client, present or not (Gu et al., NeurIPS 2021).

    wait: do not move before every client that has data was heard of.
    """

    paces: ClassVar[frozenset[str]] = frozenset({"sync"})  # the table has one update a client and round

    local: LocalProgram = Sgd()
    server_lr: Annotated[float, Gt(0)] = 1.0
    wait: bool = False

    def init(self, problem: Problem, w: Params) -> Memories:
        return Memories(w, Table.of(w.zeros(), problem.clients, problem.storage), w.zeros().to(torch.float64))

    def server(self, problem: Problem, state: Memories, updates: Updates, key: Key) -> Memories:
        ids, one = updates.arrivals.ids, torch.ones_like(updates.arrivals.n)  # [C]
        total = state.total + weighted_sum(updates.payload, one) - weighted_sum(state.h.get(ids), one)
        h = state.h.put(ids, updates.payload)
        if self.wait and not h.written[problem.sizes.numpy() > 0].all():
            return Memories(state.w, h, total)
        mean = (total / problem.clients).map(Tensor.to, state.w)
        return Memories(state.w + self.server_lr * mean, h, total)

    def report(self, problem: Problem, before: Memories, state: Memories, arrivals: Arrivals) -> Report:
        return {"heard": float(state.h.written.mean())}
