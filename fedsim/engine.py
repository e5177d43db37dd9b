"""F2. The only training loop in the house: `run`, over a `Port` (who does the work) and a `Pace` (whom to ask, when to aggregate).

    for round in run(strategy, problem, w, port, pace, key):
        ...                                        # evaluate, log, checkpoint, stop: ordinary code, no callbacks

Simulated or deployed is one seam, the port; a strategy never knows which.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from annotated_types import Gt
from torch import Tensor

from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.registry import Kind, register
from fedsim.rng import CLIENT, PLAN, SERVER, Key, fold, generator
from fedsim.strategy import Report, Strategy, WeightedStrategy
from fedsim.tree import add, concat, rows
from fedsim.types import Arrivals, Job, Metrics, Total, Updates, add_metrics

Weigh = Callable[[Arrivals], Tensor]


@dataclass(frozen=True)
class Received:
    """What a port gives back: exactly one of `updates` and `total`, or neither if nobody came back.

    Attributes:
        arrivals: the clients whose updates were accepted.
        updates: their payloads one by one.
        total: their payloads summed, where `recv` was given weights.
        metrics: training metrics summed over clients, `{name: (sum, weight)}`.
        lost: clients that were asked and did not answer, with the reason.
        rejected: clients whose update failed a check, with the reason.
        examples: training examples processed, every pass counted.
        bytes_down, bytes_up: what messages and payloads weigh, over all clients.
    """

    arrivals: Arrivals | None = None
    updates: Updates | None = None
    total: Total | None = None
    metrics: Metrics = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)
    rejected: dict[int, str] = field(default_factory=dict)
    examples: int = 0
    bytes_down: int = 0
    bytes_up: int = 0


def merge(parts: list[Received]) -> Received:
    """Answers that came in parts, as one: sums in the order of the parts; payloads sorted by client, so arrival order is forgotten."""
    arrivals = [part.arrivals for part in parts if part.arrivals is not None]
    if not arrivals:
        who, by_id = None, None
    else:
        together = concat(arrivals)
        by_id = torch.argsort(together.ids, stable=True)
        who = rows(together, by_id)
    payloads = [part.updates.payload for part in parts if part.updates is not None]
    totals = [part.total for part in parts if part.total is not None]
    return Received(
        arrivals=who,
        updates=Updates(who, rows(concat(payloads), by_id)) if payloads and who is not None else None,
        total=reduce(add, totals) if totals else None,
        metrics=reduce(add_metrics, (part.metrics for part in parts), {}),
        lost={i: why for part in parts for i, why in part.lost.items()},
        rejected={i: why for part in parts for i, why in part.rejected.items()},
        examples=sum(part.examples for part in parts),
        bytes_down=sum(part.bytes_down for part in parts),
        bytes_up=sum(part.bytes_up for part in parts),
    )


class Port(ABC):
    """The way to the clients, simulated or real. A client that is lost comes back in `Received.lost`: never dropped in silence."""

    @abstractmethod
    def idle(self) -> np.ndarray:
        """Ids of the clients that could take a job now, sorted. int64."""

    @abstractmethod
    def send(self, job: Job, version: int, key: Key) -> None:
        """Hand a job to its clients. `key` is the round's client key."""

    @abstractmethod
    def recv(self, weigh: Weigh | None) -> Received:
        """Wait for the answers. With `weigh`, updates may be summed where they arise; without, each is kept."""


class Pace(Kind, ABC):
    """When to ask whom, and when the server aggregates."""

    paced: ClassVar[str]  # what a strategy lists in `paces`

    @abstractmethod
    def choose(self, idle: np.ndarray, key: Key) -> np.ndarray:
        """Whom to ask among the idle clients. Sorted ids, int64."""


@register("sync")
@dataclass(frozen=True)
class Sync(Pace):
    """Rounds: ask the available clients (at most `cohort` of them, at random), wait for all, aggregate."""

    paced: ClassVar[str] = "sync"
    cohort: Annotated[int, Gt(0)] | None = None

    def choose(self, idle: np.ndarray, key: Key) -> np.ndarray:
        if self.cohort is None or len(idle) <= self.cohort:
            return idle
        return np.sort(generator(key).choice(idle, self.cohort, replace=False))


@dataclass(frozen=True)
class Round:
    """The world after `version` rounds. `received` is what came in during the last of them, `report` what the strategy says of it."""

    version: int
    state: Any
    received: Received
    report: Report = field(default_factory=dict)


def run(strategy: Strategy, problem: Problem, w: Params, port: Port, pace: Pace, key: Key, start: Round | None = None) -> Iterator[Round]:
    """Train for ever, one `Round` a step, from model `w` or from the round `start`. Stop by leaving the loop.

    A round in which nobody answers leaves the state as it is, and still counts.
    """
    version, state = (start.version, start.state) if start else (0, strategy.init(problem, w))
    while True:
        seen = problem.at(version)
        ids = pace.choose(port.idle(), fold(key, PLAN, version, 0))
        if len(ids):
            for job in strategy.plan(seen, state, ids, fold(key, PLAN, version, 1)):
                port.send(job, version, fold(key, CLIENT, version))
        before = state
        received, state = _aggregate(strategy, seen, before, port, fold(key, SERVER, version))
        report = strategy.report(seen, before, state, received.arrivals) if received.arrivals is not None else {}
        version += 1
        yield Round(version, state, received, report)


def _aggregate(strategy: Strategy, problem: Problem, state: Any, port: Port, key: Key) -> tuple[Received, Any]:
    """Receive a round's answers and let the strategy have them."""
    if isinstance(strategy, WeightedStrategy):
        received = port.recv(partial(strategy.weigh, problem, state))
        if received.total is not None and received.arrivals is not None:
            state = strategy.apply(problem, state, received.total, received.arrivals, key)
    else:
        received = port.recv(None)
        if received.updates is not None:
            state = strategy.server(problem, state, received.updates, key)
    return received, state
