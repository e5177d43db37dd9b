"""The nodes of a run, seen from the server: who is there, which clients each holds, and messages to and fro over Flower's `Grid`.

Flower's own `send_and_receive` asks for answers every three seconds; here it is every `poll` seconds. A node is known by the clients that
it holds, so results do not depend on Flower's node ids, which are random.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedsim.data import Federation
from fedsim.data.encoding import Encoding
from fedsim.errors import FedsimError
from fedsim.flower import wire
from fedsim.flower.orders import DESCRIBE, ENCODING, Answer, Description, Order
from fedsim.flower.wire import Malformed

LOOK = 2.0
"""Seconds between looks at which nodes are there."""


MOST = 2**31
"""How many examples a client with data of its own may have: nobody but its node knows, and weights follow from it."""

UNREACHED = {3, 4, 5}
"""Flower's error codes for a message that reached nobody, or an answer that did not come back: the node may be gone."""


@dataclass
class Nodes:
    """The nodes behind a grid.

    Attributes:
        grid: Flower's way to them.
        data: the scenario's. A node that says of them what is not so is left alone.
        poll: seconds between looks for answers.
        patience: seconds after which a message without an answer counts as lost.
        stopped: whether the run is to end; whoever looks for nodes or answers then gets a KeyboardInterrupt.
        here: nodes that are connected now, and have said who they are.
        said: what each node that ever said so said of itself.
    """

    grid: Grid
    data: Federation
    poll: float = 0.2
    patience: float = 600.0
    stopped: Callable[[], bool] = lambda: False
    here: set[int] = field(default_factory=set)
    said: dict[int, Description] = field(default_factory=dict)
    _asked: dict[str, int] = field(default_factory=dict)
    _left_alone: dict[int, set[int]] = field(default_factory=dict)
    _said_before: set[str] = field(default_factory=set)
    _looked: float = -1e9

    def __post_init__(self) -> None:
        self.clients = self.data.clients
        self._encoding = ConfigRecord({"text": Encoding.of(self.data).written()})
        self._home = np.full(self.clients, -1, dtype=np.int64)  # which entry of `_order` holds each client
        self._order: list[int] = []
        self.sizes, self.calibration, self.tests = (np.zeros(self.clients, dtype=np.int64) for _ in range(3))

    def look(self, now: bool = False) -> None:
        """See who is there, ask those who are new which clients they hold, and note who has said so."""
        self._go_on()
        if not now and time.monotonic() - self._looked < LOOK:
            return
        self._looked = time.monotonic()
        connected = set(self.grid.get_node_ids())
        self.here &= connected
        self._left_alone = {node: holders for node, holders in self._left_alone.items() if not holders or holders & self.here}
        asked = sorted(connected - set(self.said) - set(self._asked.values()) - set(self._left_alone))
        numbers = self.push([(node, RecordDict({ENCODING: self._encoding}), DESCRIBE) for node in asked], "0")
        self._asked |= {number: node for number, node in zip(numbers, asked, strict=True) if number is not None}
        for number, message in self.pull(self._asked).items():
            self._note(self._asked.pop(number), message)
        self.here = connected & set(self.said)

    def _note(self, node: int, message: Message) -> None:
        """What a node says of itself. One that makes no sense is left alone, and one that claims clients of others until these are gone.

        An error may be over soon.
        """
        if message.has_error():
            self._say(f"a node does not say which clients it holds: {_reason(message)}")
            return
        try:
            description = Description.of(content(message), self.clients)
            self._check(description)
        except FedsimError as error:
            self._leave_alone(node, str(error), set())
            return
        homes = {int(i): self._order[self._home[i]] for i in description.ids if self._home[i] >= 0}
        if taken := {i: home for i, home in homes.items() if home in self.here and home != node}:
            self._leave_alone(node, f"node claims clients {[*taken][:5]}, which another node holds", set(taken.values()))
            return
        self.said[node] = description
        self.here.add(node)
        self._order.append(node)
        ids = description.ids
        self._home[ids] = len(self._order) - 1
        self.sizes[ids], self.calibration[ids], self.tests[ids] = description.sizes, description.calibration, description.tests

    def _check(self, said: Description) -> None:
        """Raise where a node's clients have not the examples that it says."""
        for count, lists in ((said.sizes, self.data.train), (said.calibration, self.data.calibration), (said.tests, self.data.client_test)):
            if said.own and (count > MOST).any():
                raise Malformed(f"node says that it has {count.max()} examples of its own; {MOST} are the most that count")
            if not said.own and (wrong := count != lists.count(said.ids)).any():
                i, n = said.ids[wrong][0], count[wrong][0]
                raise Malformed(f"node says that client {i} has {n} examples, where the scenario's data give it {lists.count(i)}")

    def _leave_alone(self, node: int, why: str, holders: set[int]) -> None:
        """Do not ask a node again before the `holders` of its clients are gone; without these, never."""
        self._say(f"a node is left alone: {why}")
        self._left_alone[node] = holders

    def _say(self, what: str) -> None:
        """Print something, once."""
        if what not in self._said_before:
            self._said_before.add(what)
            print(what, flush=True)

    def doubt(self, node: int) -> None:
        """A node has not answered: it is not here until it says again who it is. Flower itself takes a while to notice that one is gone."""
        self.said.pop(node, None)
        self.here.discard(node)

    @property
    def held(self) -> np.ndarray:
        """Which clients are at a node that is here, `[N]` bool."""
        here = np.array([node in self.here for node in self._order] + [False])
        return here[self._home]

    def by_node(self, ids: np.ndarray) -> dict[int, np.ndarray]:
        """Clients by the node that holds them, in the order of their first clients."""
        homes = self._home[ids]
        _, first = np.unique(homes, return_index=True)
        return {self._order[homes[place]]: ids[homes == homes[place]] for place in np.sort(first) if homes[place] >= 0}

    def gather(self, count: int, seconds: float) -> None:
        """Wait until `count` nodes are here (0 = until all clients are held), at most so long. Raises if nobody came at all."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.look(now=True)
            if len(self.here) >= count if count else self.held.all():
                return
            time.sleep(self.poll)
        if not self.here:
            raise FedsimError(f"no node has come within {seconds:g} seconds; start SuperNodes, see the README of the app")

    def await_data(self, counts: np.ndarray) -> None:
        """Wait until a client with some of these examples, `[N]`, is held by a node. Raises after `patience` seconds."""
        end = time.monotonic() + self.patience
        while not (self.held & (counts > 0)).any():
            if time.monotonic() > end:
                raise FedsimError(
                    f"no node with data has been there for {self.patience:g} seconds; the run can go on: start SuperNodes, "
                    "and run it again with resume=true, or with fedsim deploy --resume"
                )
            time.sleep(self.poll)
            self.look()

    def _go_on(self) -> None:
        if self.stopped():
            raise KeyboardInterrupt

    def push(self, letters: Sequence[tuple[int, RecordDict, str]], group: str) -> list[str | None]:
        """Send messages `(node, content, kind)` in one go; their numbers, None for one that could not be sent."""
        messages = [Message(content, node, kind, group_id=group, ttl=self.patience) for node, content, kind in letters]
        try:
            numbers = [number or None for number in self.grid.push_messages(messages)] if messages else []
        except Exception as error:  # the network's, HTTP's, the SuperLink's: a run outlives them all
            print(f"a message could not be sent: {type(error).__name__}: {error}", flush=True)
            numbers = []
        return numbers + [None] * (len(messages) - len(numbers))

    def pull(self, numbers: Iterable[str]) -> dict[str, Message]:
        """The answers that have come to some messages, by the message's number."""
        self._go_on()
        numbers = list(numbers)
        if not numbers:
            return {}
        try:
            messages = list(self.grid.pull_messages(numbers))
        except Exception as error:
            print(f"answers could not be fetched, and will be asked for again: {type(error).__name__}: {error}", flush=True)
            return {}
        return {m.metadata.reply_to_message_id: m for m in messages if m.metadata.reply_to_message_id in set(numbers)}

    def evaluate(self, order: Order, strategy: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Sums over the test examples of the order's clients `{name: [N]}`, and how many each has, `[N]`; 0 where nobody answered."""
        asked = [(node, ids) for node, ids in self.by_node(order.ids).items() if node in self.here]
        sent = wire.arrays(order.message)
        numbers = self.push([(node, replace(order, ids=ids).records(sent), order.kind) for node, ids in asked], str(order.version))
        out = {number: each for number, each in zip(numbers, asked, strict=True) if number is not None}
        sums: dict[str, np.ndarray] = {}
        counts, end = np.zeros(self.clients), time.monotonic() + self.patience
        while out and time.monotonic() < end:
            for number, message in self.pull(out).items():
                node, ids = out.pop(number)
                if message.has_error() and message.error.code in UNREACHED:
                    self.doubt(node)
                try:
                    answer = Answer.of(content(message), ids, None, strategy, order.version)
                except FedsimError as error:
                    print(f"clients {ids[:5].tolist()} are not evaluated: {error}", flush=True)
                    continue
                for name, (value, weight) in answer.metrics.items():
                    sums.setdefault(name, np.zeros(self.clients))[answer.ids] = value.numpy()
                    counts[answer.ids] = weight.numpy()
            if out:
                time.sleep(self.poll)
        for node, _ in out.values():
            self.doubt(node)
        return sums, counts


def content(message: Message) -> RecordDict:
    """What is in a message. Raises `Malformed` with the reason where it is an error."""
    if message.has_error():
        raise Malformed(_reason(message))
    return message.content


def _reason(message: Message) -> str:
    return f"error {message.error.code}: {' '.join(str(message.error.reason).split())[:300]}"
