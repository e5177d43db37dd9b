"""`FlowerPort`: clients on other machines behind the engine's `Port`."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim import rng
from fedsim.engine import Received, RunPort, Weigh, merge
from fedsim.errors import FedsimError
from fedsim.fleet import Participation
from fedsim.flower import wire
from fedsim.flower.device import LACKS_FROZEN
from fedsim.flower.nodes import UNREACHED, Nodes, content
from fedsim.flower.orders import Answer, Order
from fedsim.flower.wire import faults
from fedsim.problem import Problem
from fedsim.strategy import LocalProgram, Strategy
from fedsim.tree import concat, nbytes, rows, tree_map
from fedsim.types import Arrivals, Job, Metrics, Updates


@dataclass(frozen=True)
class _Out:
    """An order that is under way: to whom, in which form payloads are due, and when it counts as lost."""

    order: Order
    node: int
    like: Any
    end: float


@dataclass(frozen=True)
class _In:
    """An update that has come in, and the message that its client began with."""

    client: int
    version: int
    payload: Any  # [1, ...]
    metrics: dict[str, tuple[Tensor, Tensor]]  # of [1]
    message: Any


class FlowerPort(RunPort):
    """Clients on nodes: an order goes to the node that holds its clients, and what comes back is checked before anybody looks at it.

    Whom the server may ask follows the scenario's participation, among those whose nodes are there. Latency and faults are the world's own.
    Updates are sorted by client. What is lost, late or malformed is counted with its reason, and the run goes on; without any node it
    waits, and raises in the end.

    Args:
        nodes: who is there.
        participation, labels, key: whom the server may ask in which round; see `fedsim.fleet`.
        strategy, problem, phase, blank: of the phase at hand: `blank` is the memory of a client that never took part.
        limit: the length above which an update is rejected, or None.
    """

    def __init__(
        self,
        nodes: Nodes,
        participation: Participation,
        labels: np.ndarray | None,
        strategy: Strategy,
        problem: Problem,
        phase: int,
        blank: Any,
        key: rng.Key,
        limit: float | None = None,
    ):
        self._nodes = nodes
        self._participation = participation
        self._key = key
        self._strategy, self._problem, self._phase, self._blank = strategy, problem, phase, blank
        self._limit = limit
        self._t = 0
        self._fleet = participation.start(nodes.clients, labels, key)
        self._available = self._away = np.zeros(nodes.clients, dtype=bool)
        self._began = time.monotonic()
        self._out: dict[str, _Out] = {}
        self._in: list[_In] = []
        self._most: int | None = None  # how many of `_in` the round takes
        self._spent = Received()
        self._has: set[int] = set()  # nodes that have the model of the phase before

    @property
    def time(self) -> float:
        return time.monotonic() - self._began

    @property
    def busy(self) -> int:
        return sum(len(out.order.ids) for out in self._out.values()) + max(0, len(self._in) - self._ready)

    @property
    def _ready(self) -> int:
        return len(self._in) if self._most is None else min(self._most, len(self._in))

    @property
    def _counts(self) -> np.ndarray:
        """Examples of each client that the phase's program reads, `[N]`."""
        return self._nodes.sizes if self._strategy.local.reads == "train" else self._nodes.calibration

    def begin(self) -> None:
        self._nodes.look()
        if not self._out and not self._in:
            self._nodes.await_data(self._counts)
        self._available, self._fleet = self._participation.active(self._fleet, self._t, self._key)
        self._t += 1
        self._away = np.zeros(self._nodes.clients, dtype=bool)
        self._away[[int(i) for out in self._out.values() for i in out.order.ids] + [each.client for each in self._in]] = True

    def idle(self) -> np.ndarray:
        return np.flatnonzero(self._available & ~self._away & self._nodes.held & (self._counts > 0))

    def send(self, job: Job, version: int, key: rng.Key) -> None:
        if not len(job.ids):
            return
        like, weight = self._form(job.program, job.message), nbytes(job.message)
        self._away[job.ids] = True
        orders = [(node, self._order(node, ids, job, version, key)) for node, ids in self._nodes.by_node(job.ids).items()]
        sent, end = wire.arrays(job.message), time.monotonic() + self._nodes.patience
        numbers = self._nodes.push([(node, order.records(sent), order.kind) for node, order in orders], str(version + 1))
        for number, (node, order) in zip(numbers, orders, strict=True):
            if number is None:
                self._lose(order.ids, "the order could not be sent")
                continue
            self._out[number] = _Out(order, node, like, end)
            self._spent = replace(self._spent, bytes_down=self._spent.bytes_down + weight * len(order.ids))

    def _order(self, node: int, ids: np.ndarray, job: Job, version: int, key: rng.Key) -> Order:
        """What a node is asked for some clients; with the model of the phase before, unless it has that."""
        frozen = self._problem.frozen if self._phase and node not in self._has else None
        return Order(ids, job.message, job.program, version, key, self._phase, self._nodes.clients, frozen)

    def _form(self, program: LocalProgram, message: Any) -> Any:
        """The form in which a payload is due: that of a client that takes no step."""
        with torch.no_grad():
            problem = self._problem
            return program.finish(problem, message, program.begin(problem, message, self._blank), problem.version + 1).payload

    def wait(self, count: int | None, until: float, step: bool) -> int:
        self._most = count
        while True:
            happened = self._fetch()
            if not self._out or self.time >= until or (step and happened) or (count is not None and len(self._in) >= count):
                return self._ready
            self._nodes.look()
            time.sleep(min(self._nodes.poll, max(0.0, until - self.time)))

    def _fetch(self) -> bool:
        """Take what has come in; whether anything has happened."""
        answers = self._nodes.pull(self._out)
        for number in sorted(answers, key=lambda number: int(self._out[number].order.ids[0])):
            self._take(self._out.pop(number), answers[number])
        late = [number for number, out in self._out.items() if time.monotonic() > out.end]
        for number in late:
            out = self._out.pop(number)
            self._nodes.doubt(out.node)
            self._lose(out.order.ids, f"no answer within {self._nodes.patience:g} seconds")
        return bool(answers or late)

    def _take(self, out: _Out, message: Any) -> None:
        """An answer: its updates wait for `recv`, except for what does not pass the checks."""
        order = out.order
        if message.has_error():
            why = str(message.error.reason)
            if LACKS_FROZEN in why:
                self._has.discard(out.node)
            if message.error.code in UNREACHED:
                self._nodes.doubt(out.node)
            self._lose(order.ids, _in_words(message.error.code, why))
            return
        try:
            answer = Answer.of(content(message), order.ids, out.like, self._strategy.registered_name, order.version)
            bad = {} if answer.payload is None else faults(answer.payload, self._limit)
        except FedsimError as error:  # whatever it is, it must not stop the run
            self._reject(dict.fromkeys(order.ids.tolist(), str(error)))
            return
        self._has.add(out.node)
        self._reject(answer.refused | {int(answer.ids[c]): why for c, why in bad.items()})
        up = 0 if answer.payload is None else nbytes(answer.payload)
        self._spent = replace(self._spent, examples=self._spent.examples + answer.examples, bytes_up=self._spent.bytes_up + up)
        for c, client in enumerate(answer.ids.tolist()):
            if c not in bad:
                one = slice(c, c + 1)
                metrics = {name: (value[one], weight[one]) for name, (value, weight) in answer.metrics.items()}
                self._in.append(_In(client, order.version, rows(answer.payload, one), metrics, order.message))

    def give_up(self, reason: str) -> None:
        for out in self._out.values():
            self._lose(out.order.ids, reason)
        self._out.clear()  # answers to these are never asked for again
        self._lose(np.array([each.client for each in self._in[self._ready :]], dtype=np.int64), reason)
        del self._in[self._ready :]

    def recv(self, version: int, weigh: Weigh | None, recall: bool) -> Received:
        taken, self._in = sorted(self._in[: self._ready], key=lambda each: each.client), self._in[self._ready :]
        spent, self._spent, self._most = self._spent, Received(), None
        if not taken:
            return spent
        began = torch.tensor([each.version for each in taken])
        ids = torch.tensor([each.client for each in taken])
        arrivals = Arrivals(ids, torch.from_numpy(self._counts[ids.numpy()].astype(np.float32)), began, version - began)
        device = self._problem.version.device
        payload = tree_map(lambda leaf: leaf.to(device), concat([each.payload for each in taken]))
        started = concat([tree_map(lambda leaf: torch.as_tensor(leaf)[None], each.message) for each in taken]) if recall else None
        alike = all(each.metrics.keys() == taken[0].metrics.keys() for each in taken)
        updates = Updates(arrivals, payload, started, concat([each.metrics for each in taken]) if alike else None)
        received = Received(
            arrivals=arrivals,
            updates=None if weigh else updates,
            total=updates.total(weigh(arrivals)) if weigh else None,
            metrics=_summed([each.metrics for each in taken]),
        )
        return merge([spent, received])

    def _lose(self, ids: np.ndarray, why: str) -> None:
        self._spent = replace(self._spent, lost=self._spent.lost | dict.fromkeys(ids.tolist(), why))

    def _reject(self, who: dict[int, str]) -> None:
        self._spent = replace(self._spent, rejected=self._spent.rejected | who)

    def continue_time(self, before: FlowerPort) -> None:
        """Take up time and availability where the port of an earlier phase left them."""
        self._t, self._began = before._t, before._began
        if self._participation == before._participation:
            self._fleet = before._fleet

    def save(self) -> dict[str, Any]:
        """Time, and who may be asked next. What is under way is not kept: Flower gives a run that goes on another number."""
        return {"t": self._t, "now": self.time, "fleet": {name: torch.from_numpy(np.asarray(v)) for name, v in self._fleet.items()}}

    def restore(self, saved: dict[str, Any]) -> None:
        self._t, self._began = saved["t"], time.monotonic() - saved["now"]
        self._fleet = {name: values.numpy() for name, values in saved["fleet"].items()}


def _summed(metrics: list[dict[str, tuple[Tensor, Tensor]]]) -> Metrics:
    names = dict.fromkeys(name for each in metrics for name in each)
    return {name: _sum([each[name] for each in metrics if name in each]) for name in names}


def _sum(pairs: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    value, weight = (float(torch.cat(parts).sum()) for parts in zip(*pairs, strict=True))
    return value, weight


def _in_words(code: int, reason: str) -> str:
    """What Flower's error codes mean here."""
    words = {
        1: "the node could not load the app",
        2: "the client program failed",
        3: "the order expired",
        4: "the answer expired",
        5: "the node is gone",
        7: "the node does not trust the app",
        8: "the client program crashed",
    }.get(code, "the node reports an error")
    detail = " ".join(reason.split()).removeprefix("<class '").strip()
    return f"{words}: {detail[:200]}" if code in (0, 2) and detail else words
