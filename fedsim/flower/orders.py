"""What travels: an order to a node, for some of the clients that it holds, and the node's answer. Both as Flower's records, and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedsim.errors import FedsimError
from fedsim.flower import wire
from fedsim.flower.wire import Malformed
from fedsim.params import Params
from fedsim.registry import dump, restore
from fedsim.strategy import LocalProgram

ARRAYS, CONFIG, METRICS, FROZEN = "arrays", "config", "metrics", "frozen"
"""The records of a message, by the names that Flower's own strategies use, and one more."""

TRAIN, EVALUATE, DESCRIBE = "train", "evaluate", "query.describe"
"""Flower's types of messages."""

ENCODING = "encoding"
"""The record in which a node is told how the scenario's data are encoded, and in which it keeps that."""

CALIBRATE = "train.calibrate"
"""An order whose program reads what a client holds back for calibration."""


@dataclass(frozen=True)
class Order:
    """What a node is asked for some of its clients.

    Attributes:
        ids: the clients, `[C]` int64.
        message: what each begins with; for an evaluation, the model, or the state of a strategy that deploys a model of each client's own.
        program: what each runs, or None: it evaluates.
        version: of the model behind the message.
        key: the round's client key.
        phase: of the scenario, from 0.
        clients: N, how many there are.
        frozen: the model that the phase before left, where the node may not have it.
    """

    ids: np.ndarray
    message: Any
    program: LocalProgram | None
    version: int
    key: int
    phase: int
    clients: int
    frozen: Params | None = None

    @property
    def kind(self) -> str:
        """Flower's type of the message."""
        if self.program is None:
            return EVALUATE
        return CALIBRATE if self.program.reads == "calibration" else TRAIN

    def records(self, sent: tuple[ArrayRecord, str] | None = None) -> RecordDict:
        """As Flower's records. Inverse: `of`. `sent` is what `wire.arrays` made of the message, where several orders have the same."""
        arrays, outline = wire.arrays(self.message) if sent is None else sent
        config = ConfigRecord(
            {
                "clients": [int(i) for i in self.ids],
                "outline": outline,
                "program": "" if self.program is None else written(self.program),
                "version": self.version,
                "key": str(self.key),  # 64 bits without a sign
                "phase": self.phase,
                "population": self.clients,
            }
        )
        records: dict[str, Any] = {ARRAYS: arrays, CONFIG: config}
        if self.frozen is not None:
            records[FROZEN] = wire.pack(self.frozen)
        return RecordDict(records)

    @staticmethod
    def of(records: RecordDict) -> Order:
        """The order in a message. Raises `Malformed`."""
        arrays, config, frozen = (
            _part(records, name, kind) for name, kind in ((ARRAYS, ArrayRecord), (CONFIG, ConfigRecord), (FROZEN, None))
        )
        try:
            program = program_of(str(config["program"])) if config["program"] else None
            return Order(
                ids=_whole(config["clients"]),
                message=wire.tree_of(arrays, config["outline"]),
                program=program,
                version=int(config["version"]),
                key=int(config["key"]),
                phase=int(config["phase"]),
                clients=int(config["population"]),
                frozen=None if frozen is None else Params(wire.unpack(frozen)),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise Malformed(f"order cannot be read: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Answer:
    """What a node answers for its clients. A = those who have something to say, in the order of `ids`.

    Attributes:
        ids: of these, `[A]` int64, ascending.
        payload: what they send, stacked `[A, ...]`; None where A = 0, and in an evaluation.
        metrics: `{name: (sum [A], weight [A])}`.
        refused: why the others have nothing to say.
        examples: training examples processed.
        strategy: the name of what the node thinks it takes part in.
        version: echoes the order's.
    """

    ids: np.ndarray
    payload: Any
    metrics: dict[str, tuple[Tensor, Tensor]]
    strategy: str
    version: int
    refused: dict[int, str] = field(default_factory=dict)
    examples: int = 0

    def records(self) -> RecordDict:
        """As Flower's records. Inverse: `of`."""
        config: dict[str, Any] = {
            "strategy": self.strategy,
            "version": self.version,
            "examples": self.examples,
            "clients": [int(i) for i in self.ids],
        }
        config |= {"refused": [int(i) for i in self.refused], "reasons": list(self.refused.values())}
        records: dict[str, Any] = {CONFIG: ConfigRecord(config), METRICS: wire.metrics_record(self.metrics)}
        if self.payload is not None:
            records[ARRAYS] = wire.arrays(self.payload)[0]
        return RecordDict(records)

    @staticmethod
    def of(records: RecordDict, asked: np.ndarray, like: Any, strategy: str, version: int) -> Answer:
        """The answer of the clients `asked`, whose payloads are due in the form of `like` (None: no payload is due). Raises `Malformed`."""
        config, metrics = _part(records, CONFIG, ConfigRecord), _part(records, METRICS, MetricRecord)
        try:
            ids, refused = (_whole(config[name]) for name in ("clients", "refused"))
            reasons, examples = list(config["reasons"]), int(config["examples"])
            which = config["strategy"], config["version"]
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise Malformed(f"answer cannot be read: {type(error).__name__}: {error}") from error
        if which[0] != strategy:
            raise Malformed(f"answer belongs to the strategy {str(which[0])[:40]!r}, not to {strategy!r}")
        if which[1] != version:
            raise Malformed(f"answer belongs to version {which[1]}, not to {version}")
        if not np.array_equal(np.sort(np.concatenate([ids, refused])), np.sort(asked)) or len(reasons) != len(refused) or examples < 0:
            raise Malformed("answer is not that of the clients that were asked")
        payload = None
        if like is not None and len(ids):
            payload = wire.read(wire.unpack(_part(records, ARRAYS, ArrayRecord)), like, len(ids))
        found = wire.metrics_of(metrics, len(ids))
        if len(ids) and (np.diff(ids) < 0).any():
            raise Malformed("answer does not have its clients in order")
        said = {int(i): str(why)[:200] for i, why in zip(refused, reasons, strict=True)}
        return Answer(ids, payload, found, strategy, version, said, examples)


@dataclass(frozen=True)
class Description:
    """What a node says of itself.

    Attributes:
        ids: the clients that it holds, `[C]` int64.
        sizes, calibration, tests: examples that each trains, calibrates and tests on, `[C]` int64.
        own: whether these are data of its own, and not the scenario's.
    """

    ids: np.ndarray
    sizes: np.ndarray
    calibration: np.ndarray
    tests: np.ndarray
    own: bool = False

    def records(self) -> RecordDict:
        """As Flower's records. Inverse: `of`."""
        lists: dict[str, Any] = {name: [int(v) for v in getattr(self, name)] for name in ("ids", "sizes", "calibration", "tests")}
        return RecordDict({CONFIG: ConfigRecord({**lists, "own": self.own})})

    @staticmethod
    def of(records: RecordDict, clients: int) -> Description:
        """The description in a message, of some of `clients` clients. Raises `Malformed`."""
        config = _part(records, CONFIG, ConfigRecord)
        try:
            ids, *counts = (_whole(config[name]) for name in ("ids", "sizes", "calibration", "tests"))
            own = bool(config["own"])
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise Malformed(f"description cannot be read: {type(error).__name__}: {error}") from error
        if any(len(each) != len(ids) for each in counts) or len(set(ids.tolist())) < len(ids) or ((ids < 0) | (ids >= clients)).any():
            raise Malformed(f"node describes clients that the scenario does not have: it has 0 to {clients - 1}")
        if any((each < 0).any() for each in counts):
            raise Malformed("node describes clients with less than no examples")
        return Description(ids, counts[0], counts[1], counts[2], own)


def _whole(values: Any) -> np.ndarray:
    """A list of whole numbers, `[C]` int64. Raises `TypeError`, `ValueError` or `OverflowError` where it is none."""
    if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
        raise TypeError(f"{str(values)[:40]} is not a list of whole numbers")
    return np.array(values, dtype=np.int64)


def written(program: LocalProgram) -> str:
    """A program as JSON: its class, and its fields as YAML would give them. Inverse: `program_of`."""
    fields = {f.name: dump(getattr(program, f.name)) for f in dataclasses.fields(program)}  # type: ignore[arg-type]
    return json.dumps({"class": _title(type(program)), "fields": fields})


def program_of(text: str) -> LocalProgram:
    """The program in an order. Nothing is imported for it: it is one that the node's own strategies brought along."""
    values = json.loads(text)
    known = {_title(cls): cls for cls in _below(LocalProgram)}  # type: ignore[type-abstract]
    if values["class"] not in known:
        raise Malformed(f"order asks for {values['class']}, which this node does not have")
    cls = known[values["class"]]
    hints = get_type_hints(cls, include_extras=True)
    return cls(**{name: restore(hints[name], value) for name, value in values["fields"].items()})


def _title(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _below(cls: type[LocalProgram]) -> Iterator[type[LocalProgram]]:
    for each in cls.__subclasses__():
        yield each
        yield from _below(each)


def held_by(node: dict[str, Any], clients: int) -> np.ndarray:
    """The clients that a node holds, by its `--node-config`: `clients="0,4,7"`, or every `num-partitions`-th from `partition-id` on."""
    if "clients" in node:
        try:
            ids = sorted({int(part) for part in str(node["clients"]).split(",")})
        except ValueError:
            raise FedsimError(f'--node-config clients={node["clients"]!r} is not a list of numbers, as in clients="0,4,7"') from None
    else:
        if "partition-id" not in node:
            raise FedsimError(
                'this node does not know which clients it holds; start it with --node-config "partition-id=0 num-partitions=3"'
            )
        count = int(node.get("num-partitions", clients))
        ids = list(range(int(node["partition-id"]), clients, max(1, min(count, clients))))
    if not ids or ids[0] < 0 or ids[-1] >= clients:
        raise FedsimError(f"--node-config names clients {ids[:5]}, but the scenario has {clients}: 0 to {clients - 1}")
    return np.array(ids, dtype=np.int64)


def _part(records: RecordDict, name: str, kind: type | None) -> Any:
    """A record of a message, of a kind; with None, an `ArrayRecord` that may be missing."""
    found = records.get(name)
    if found is None and kind is None:
        return None
    if not isinstance(found, kind or ArrayRecord):
        raise Malformed(f"message has no {(kind or ArrayRecord).__name__} called {name!r}")
    return found
