"""A node's own world: its clients' data, the scenario's problem, and the programs that it runs for the server.

What trains is the simulation's `Trainer`, on one chunk after the other: the same code, the same keys. One value differs: noise that
protects somebody, and Poisson samples, come from the operating system (`fedsim.entropy.SYSTEM`), whatever the scenario's seed.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsim.data import Lists, Source
from fedsim.data.encoding import Adopting, Encoding
from fedsim.data.flower_partition import Iid
from fedsim.entropy import SYSTEM
from fedsim.errors import FedsimError, ScenarioError
from fedsim.fleet import Fleet
from fedsim.flower import wire
from fedsim.flower.orders import Answer, Description, Order, held_by
from fedsim.flower.wire import Malformed
from fedsim.ledger import refuse_unknown_sizes
from fedsim.pace import Sync
from fedsim.params import Params
from fedsim.registry import restore
from fedsim.scenario import Evaluate, Phase, Scenario
from fedsim.sim.chunk import Chunk, ChunkReply
from fedsim.sim.cohort import Trainer, order
from fedsim.sim.port import default_chunk
from fedsim.tree import concat, rows, stack, tree_map
from fedsim.world import World, build

Store = MutableMapping[str, Any]
"""Records by name that last as long as the run: Flower's `Context.state`."""


@dataclass(frozen=True, eq=False)
class Device:
    """What a node has in memory.

    Attributes:
        scenario: what is run.
        world: built from it; the data are the scenario's, or the node's own.
        held: the clients of this node, `[C]` int64.
        own: whether the data are the node's own; they are then those of its one client.
        clients: N, in the scenario.
    """

    scenario: Scenario
    world: World
    held: np.ndarray
    own: bool
    clients: int
    _trainers: dict[int, Trainer] = field(default_factory=dict)

    @staticmethod
    def of(scenario: Scenario, node: dict[str, Any], encoding: Encoding | None = None) -> Device:
        """The device that a `--node-config` describes. Data of its own are read in the `encoding` of the scenario's."""
        torch.set_num_threads(scenario.engine.threads)
        if "data" not in node:
            world = build(scenario)
            clients = world.data.clients
            return Device(scenario, _protected(world), held_by(node, clients), False, clients)
        if scenario.data.clients is None:
            raise ScenarioError("data.clients", "nodes bring data of their own; say how many clients there are")
        held = held_by(node, scenario.data.clients)
        if len(held) != 1:
            raise FedsimError("a node with data of its own holds one client; give it num-partitions = the number of clients")
        refuse_unknown_sizes(scenario)
        source = own_source(scenario.data.source, str(node["data"]))
        source = source if encoding is None else Adopting(source, encoding)
        mine = replace(scenario.data, source=source, partition=Iid(), clients=1, proxy=None)
        world = build(replace(scenario, data=mine, fleet=Fleet(), pace=Sync(), evaluate=Evaluate()))
        return Device(scenario, _protected(_as_client(world, int(held[0]), scenario.data.clients)), held, True, scenario.data.clients)

    def describe(self) -> Description:
        """Who is here."""
        data = self.world.data
        sizes, calibration, tests = (lists.count(self.held) for lists in (data.train, data.calibration, data.client_test))
        return Description(self.held, sizes, calibration, tests, self.own)

    def train(self, order: Order, store: Store) -> Answer:
        """Run the order's program for its clients. Their memories are taken from `store`, and left there."""
        order = self._received(order)
        stage, trainer, blank = self._enter(order, store)
        assert order.program is not None
        due = stage.strategy.local
        if due.protects() is not None and order.program != due:
            raise Malformed("order asks for another program than the scenario's, which protects this node's examples")
        parts = [self._train(trainer, order, ids, blank, store) for ids in self._cut(order)]
        refused = {int(ids[c]): why for ids, reply in parts for c, why in reply.refusals.items()}
        full = [(ids[reply.accepted], reply) for ids, reply in parts if reply.accepted.any()]
        examples = sum(reply.examples for _, reply in parts)
        name = stage.strategy.registered_name
        if not full:
            return Answer(order.ids[:0], None, {}, name, order.version, refused, examples)
        ids = np.concatenate([each for each, _ in full])
        by_id = torch.from_numpy(np.argsort(ids))
        payload, metrics = rows(concat([(reply.payload, reply.metrics) for _, reply in full]), by_id)
        return Answer(np.sort(ids), payload, metrics, name, order.version, refused, examples)

    def evaluate(self, order: Order, store: Store) -> Answer:
        """The order's model on the test data of its clients: sums over each one's examples."""
        order = self._received(order)
        stage, trainer, blank = self._enter(order, store)
        lists, strategy = self.world.data.client_test, stage.strategy
        ids = np.sort(order.ids)
        scores = []
        for i in ids:
            w = strategy.deploy(order.message, self._memory(order, int(i), blank, store)) if strategy.personal else order.message
            if not isinstance(w, Params):
                raise Malformed(f"there is a {type(w).__name__} to evaluate, not a model")
            each = trainer.score(w, lists.of(int(i)))
            scores.append({name: value.double().cpu().sum() for name, value in each.items()})
        counts = torch.from_numpy(lists.count(ids)).double()
        metrics = {name: (torch.stack([score[name] for score in scores]), counts) for name in scores[0]}
        return Answer(ids, None, metrics, strategy.registered_name, order.version)

    def _received(self, order: Order) -> Order:
        """The order, with its message where this node computes."""
        return replace(
            order, message=tree_map(lambda leaf: leaf.to(self.world.device) if isinstance(leaf, torch.Tensor) else leaf, order.message)
        )

    def _enter(self, order: Order, store: Store) -> tuple[Phase, Trainer, Any]:
        """The phase of an order, what trains in it, and the memory of a client that never took part."""
        stages = self.world.ledger.stages
        if not 0 <= order.phase < len(stages):
            raise Malformed(f"order is of phase {order.phase}; the scenario has {len(stages)}")
        if strangers := sorted(set(order.ids.tolist()) - set(self.held.tolist())):
            raise Malformed(f"order is for clients {strangers[:5]}, which this node does not hold")
        stage, name = stages[order.phase], f"frozen.{order.phase}"
        if order.frozen is not None:
            store[name] = wire.pack(order.frozen)
            self._trainers.pop(order.phase, None)
        if order.phase and name not in store:
            raise Malformed(LACKS_FROZEN)
        before = Params(wire.unpack(store[name])).to(self.world.device) if order.phase else None
        frozen, first = self.world.enter(stage, before)
        if order.phase not in self._trainers:
            self._trainers[order.phase] = self.world.trainer(self.scenario.engine.compile).freeze(frozen)
        trainer = self._trainers[order.phase]
        return stage, trainer, stage.strategy.memory(trainer.problem, first)

    def _cut(self, asked: Order) -> list[np.ndarray]:
        """The clients of an order, in chunks."""
        assert asked.program is not None
        lists = self.world.data.calibration if asked.program.reads == "calibration" else self.world.data.train
        ids, engine = order(asked.program, lists.sizes, asked.ids), self.scenario.engine
        size = default_chunk(len(ids), self.world.mode, self.world.device) if engine.chunk == "auto" else engine.chunk
        return np.array_split(ids, -(-len(ids) // size))

    def _train(self, trainer: Trainer, order: Order, ids: np.ndarray, blank: Any, store: Store) -> tuple[np.ndarray, ChunkReply]:
        """One chunk; its clients remember."""
        memory = stack([self._memory(order, int(i), blank, store) for i in ids])
        reply = trainer.train((order.program, order.message), Chunk(ids, order.version, order.key, memory, None))  # type: ignore[arg-type]
        for row, i in enumerate(ids[reply.accepted]):
            arrays, _ = wire.arrays(rows(reply.memory, row))
            if len(arrays):
                store[f"memory.{order.phase}.{i}"] = arrays
        return ids, reply

    def _memory(self, order: Order, client: int, blank: Any, store: Store) -> Any:
        """What one client remembers: since it last took part, or what it kept of the model in the phases before."""
        if (name := f"memory.{order.phase}.{client}") in store:
            return wire.read(wire.unpack(store[name]), blank)
        stages, phase = self.world.ledger.stages, order.phase
        while isinstance(blank, Params) and phase and stages[phase].strategy.keeps and stages[phase - 1].strategy.keeps:
            phase -= 1
            if (name := f"memory.{phase}.{client}") in store:
                return blank | Params(wire.unpack(store[name])).to(self.world.device)
        return blank


LACKS_FROZEN = "this node lacks the model of the phase before"
"""What a node says that must be sent it again."""


def own_source(source: Source, text: str) -> Source:
    """Data of a node's own: a file (read as the scenario reads its file, or by its ending), or `module:function`."""
    text = text.removeprefix("python:").strip() if text.startswith("python:") else text
    if ":" in text and not Path(text).exists():
        return restore(Source, {"name": "python", "function": text})
    path = Path(text).expanduser().absolute()
    if not path.is_file():
        raise FedsimError(f'--node-config data="{text}": there is no such file')
    if hasattr(source, "path") and path.suffix == Path(str(source.path)).suffix:
        return replace(source, path=str(path))  # type: ignore[type-var]
    kinds = {".npz": "npz", ".jsonl": "jsonl"}
    if path.suffix not in kinds:
        like = f"a scenario whose own data.source is a {path.suffix or 'file'} says how to read it"
        raise FedsimError(f'--node-config data="{text}": read are {", ".join(kinds)} and module:function; {like}')
    return restore(Source, {"name": kinds[path.suffix], "path": str(path)})


def _protected(world: World) -> World:
    """The world with noise from the operating system."""
    return replace(world, problem=replace(world.problem, entropy=SYSTEM))


def _as_client(world: World, client: int, clients: int) -> World:
    """A world of one client, whose data are those of client number `client` of `clients`."""

    def moved(lists: Lists) -> Lists:
        offset = np.zeros(clients + 1, dtype=np.int64)
        offset[client + 1 :] = len(lists.index)
        return Lists(lists.index, offset)

    data = world.data
    names = tuple(f"client {i}" for i in range(clients))
    data = replace(
        data, train=moved(data.train), client_test=moved(data.client_test), calibration=moved(data.calibration), names=names, optimum=None
    )
    calibration = None if world.problem.calibration is None else torch.from_numpy(data.calibration.sizes.astype(np.float32))
    return replace(world, data=data, problem=replace(world.problem, sizes=data.sizes, calibration=calibration))
