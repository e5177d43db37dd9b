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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.pace import Pace
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.rng import CLIENT, PLAN, SERVER, Key, fold
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
        who, by_id = concat(arrivals), None
        if not (who.ids.diff() >= 0).all():
            by_id = torch.argsort(who.ids, stable=True)
            who = rows(who, by_id)
    kept = [part.updates for part in parts if part.updates is not None]
    totals = [part.total for part in parts if part.total is not None]
    return Received(
        arrivals=who,
        updates=Updates(who, *_sorted(kept, by_id)) if kept and who is not None else None,
        total=reduce(add, totals) if totals else None,
        metrics=reduce(add_metrics, (part.metrics for part in parts), {}),
        lost={i: why for part in parts for i, why in part.lost.items()},
        rejected={i: why for part in parts for i, why in part.rejected.items()},
        examples=sum(part.examples for part in parts),
        bytes_down=sum(part.bytes_down for part in parts),
        bytes_up=sum(part.bytes_up for part in parts),
    )


def _sorted(kept: list[Updates], by_id: Tensor | None) -> Iterator[Any]:
    """Payloads, what their clients began with, and their metrics: each as one stack in the order of the clients."""
    for parts in zip(*((part.payload, part.started, part.metrics) for part in kept), strict=True):
        if any(part is None for part in parts):
            yield None
        else:
            yield concat(list(parts)) if by_id is None else rows(concat(list(parts)), by_id)


class Port(ABC):
    """The way to the clients, simulated or real. A client that is lost comes back in `Received.lost`: never dropped in silence.

    One round: `begin`; then `idle`, `send` and `wait` once, or over and over where the pace asks anew whenever somebody is back; perhaps
    `give_up`; then `recv`.
    """

    @property
    @abstractmethod
    def time(self) -> float:
        """Seconds since the run began, virtual in a simulation."""

    @property
    @abstractmethod
    def busy(self) -> int:
        """How many clients are at work."""

    @abstractmethod
    def begin(self) -> None:
        """A round begins."""

    @abstractmethod
    def idle(self) -> np.ndarray:
        """Ids of the clients that could take a job now, sorted. int64. A client takes one job a round."""

    @abstractmethod
    def send(self, job: Job, version: int, key: Key) -> None:
        """Hand a job to its clients. `key` is the round's client key."""

    @abstractmethod
    def wait(self, count: int | None, until: float, step: bool) -> int:
        """Wait until `count` updates are ready (None = those of all who are at work), or until time `until`; say how many are ready.

        With `step`, come back as soon as anything happens.
        """

    @abstractmethod
    def give_up(self, reason: str) -> None:
        """Count those who are still at work as lost, and let them be idle."""

    @abstractmethod
    def recv(self, version: int, weigh: Weigh | None, recall: bool) -> Received:
        """Take what is ready at model `version`. With `weigh`, updates may be summed where they arise; without, each is kept.

        With `recall`, updates say what their clients began with.
        """


class RunPort(Port):
    """A port of a run that may be interrupted."""

    @abstractmethod
    def save(self) -> dict[str, Any]:
        """What a checkpoint needs, as a pytree: of the end of a round, after `recv` and before the next `begin`."""

    @abstractmethod
    def restore(self, saved: dict[str, Any]) -> None:
        """Inverse of `save`."""


@dataclass(frozen=True)
class Round:
    """The world after `version` rounds. `received` is what came in during the last of them, `report` what the strategy says of it.

    `time` is the port's, in seconds since the run began.
    """

    version: int
    state: Any
    received: Received
    report: Report = field(default_factory=dict)
    time: float = 0.0


def run(strategy: Strategy, problem: Problem, w: Params, port: Port, pace: Pace, key: Key, start: Round | None = None) -> Iterator[Round]:
    """Train for ever, one `Round` a step, from model `w` or from the round `start`. Stop by leaving the loop.

    A round in which nobody answers leaves the state as it is, and still counts.
    """
    version, state = (start.version, start.state) if start else (0, strategy.init(problem, w))
    while True:
        seen, before = problem.at(version), state
        _ask(strategy, seen, before, port, pace, version, key)
        received, state = _aggregate(strategy, seen, before, port, version, fold(key, SERVER, version))
        report = strategy.report(seen, before, state, received.arrivals) if received.arrivals is not None else {}
        version += 1
        yield Round(version, state, received, report, port.time)


def _ask(strategy: Strategy, problem: Problem, state: Any, port: Port, pace: Pace, version: int, key: Key) -> None:
    """Hand out jobs and let time pass, until the pace has enough."""
    port.begin()
    until, began, turn = pace.until(), port.time, 0
    while True:
        ids = pace.choose(port.idle(), port.busy, fold(key, PLAN, version, 2 * turn))
        if len(ids):
            for job in strategy.plan(problem, state, ids, fold(key, PLAN, version, 2 * turn + 1)):
                port.send(job, version, fold(key, CLIENT, version))
        ready = port.wait(until.count, began + until.seconds, step=pace.refills)
        turn += 1
        if not pace.refills or ready == until.count or not (port.busy or len(ids)):
            break
    if pace.gives_up is not None and port.busy:
        port.give_up(pace.gives_up)


def _aggregate(strategy: Strategy, problem: Problem, state: Any, port: Port, version: int, key: Key) -> tuple[Received, Any]:
    """Receive a round's answers and let the strategy have them."""
    if isinstance(strategy, WeightedStrategy):
        received = port.recv(version, partial(strategy.weigh, problem, state), strategy.recalls)
        if received.total is not None and received.arrivals is not None:
            state = strategy.apply(problem, state, received.total, received.arrivals, key)
    else:
        received = port.recv(version, None, strategy.recalls)
        if received.updates is not None:
            state = strategy.server(problem, state, received.updates, key)
    return received, state
