"""Flower's own strategies, and yours that are written for Flower, run by this engine: `{name: flower, cls: FedYogi, args: {eta: 0.01}}`.

Beutel et al., "Flower: A Friendly Federated Learning Research Framework" (arXiv 2007.14390); classes of `flwr.serverapp.strategy`, 1.41 on.

    each round, a fresh object `stock` of the class with what it remembered put back on it:
    clients   are those that fleet and pace choose; they begin with w, and send w_i and their metrics
    server    stock.configure_train(round, w, config, grid) ;  w <- stock.aggregate_train(round, replies)
              reply of client i = ArrayRecord "arrays" {w_i}, MetricRecord "metrics" {num-examples: n_i, train_loss: ..., ...}

Replies come sorted by client. What a class keeps on `self` (moments, the last model) is taken off as plain arrays and numbers after each
round and is the state, so a run resumes to the same bits; whatever it draws (`random`, `numpy.random`) is drawn by key.

`cls` is a name in `flwr.serverapp.strategy`, or `module:Class`. A config that it sends must mean something here: FedProx's `proximal-mu`
sets `proximal` of the local program. Where it aggregates nothing (Bulyan with too few replies), w stays and `server.skipped` is 1.

Differs: who takes part is the scenario's to say, so `fraction_train` and its like are refused. Evaluation is ours. Trees (FedXgb) are not
arrays; Flower's differential privacy is refused because its noise is not in our account: take `dp`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from fedsim.errors import FedsimError, did_you_mean
from fedsim.local import Sgd
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.records import as_numpy, from_arrays, in_flower, remembered, thaw, to_arrays
from fedsim.registry import register
from fedsim.rng import Key
from fedsim.strategy import LocalProgram, Report, Strategy
from fedsim.tree import record
from fedsim.types import Arrivals, Job, Updates

NOT_ARRAYS = ("FedXgbBagging", "FedXgbCyclic")
NOT_STRATEGIES = ("Result", "Strategy")
PRIVATE = "DifferentialPrivacy"
OURS = ("fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes", "min_available_nodes")
"""Arguments that say who takes part."""


@record
class Served:
    """The model, what the class remembers besides, and in how many rounds it aggregated nothing."""

    w: Params
    kept: dict[str, Any]
    skipped: int


@register("flower")
@dataclass(frozen=True)
class Flower(Strategy):
    """Any strategy of Flower that aggregates arrays, stock or your own (Beutel et al., 2020), in this engine."""

    paces: ClassVar[frozenset[str]] = frozenset({"sync"})  # a reply in Flower always answers the model at hand

    cls: str = "FedAvg"
    args: dict[str, bool | int | float | str] = field(default_factory=dict, hash=False)
    local: LocalProgram = Sgd()

    def __post_init__(self) -> None:
        self.stock()

    def stock(self) -> Any:
        """A fresh object of the class."""
        if theirs := sorted(set(self.args) & set(OURS)):
            raise ValueError(f"args: who takes part is said by `fleet` and `pace`, e.g. fleet.participation; leave out {', '.join(theirs)}")
        try:
            with in_flower(0):
                stock = _find(self.cls)(**self.args)
        except TypeError as error:
            raise ValueError(f"args: {self.cls} cannot be made of [{', '.join(self.args)}]: {error}") from error
        for name in OURS:  # everyone who is handed to it
            if hasattr(stock, name):
                setattr(stock, name, 1.0 if name.startswith("fraction") else 1)
        return stock

    def init(self, problem: Problem, w: Params) -> Served:
        return Served(w, {}, 0)

    def plan(self, problem: Problem, state: Served, ids: np.ndarray, key: Key) -> list[Job]:
        arrays = to_arrays(state.w)
        asked: dict[LocalProgram, list[int]] = {}
        with in_flower(key):
            messages = list(_configure(self._restored(state), problem, arrays, ids))
        for message in messages:
            if any(sent is not arrays for sent in message.content.array_records.values()):
                raise FedsimError(f"{self.cls} sends its clients other arrays than the model; run it on a fedsim.flower.SimGrid instead")
            configs = [dict(each) for each in message.content.config_records.values()]
            asked.setdefault(self._program(configs), []).append(message.metadata.dst_node_id)
        return [Job(np.sort(np.array(whose, dtype=np.int64)), state.w, program) for program, whose in asked.items()]

    def server(self, problem: Problem, state: Served, updates: Updates, key: Key) -> Served:
        stock, arrays, ids = self._restored(state), to_arrays(state.w), updates.arrivals.ids.numpy()
        with in_flower(key):
            list(_configure(stock, problem, arrays, ids))
            try:
                new, _ = stock.aggregate_train(int(problem.version) + 1, replies(state.w, updates))
            except Exception as error:  # whatever a class may raise
                raise FedsimError(f"{self.cls} failed in round {int(problem.version) + 1}: {type(error).__name__}: {error}") from error
        kept = remembered(stock, self.stock())
        return Served(state.w, kept, state.skipped + 1) if new is None else Served(from_arrays(new, state.w), kept, state.skipped)

    def report(self, problem: Problem, before: Served, state: Served, arrivals: Arrivals) -> Report:
        return {"skipped": float(state.skipped - before.skipped)}

    def _restored(self, state: Served) -> Any:
        stock = self.stock()
        for name, value in state.kept.items():
            setattr(stock, name, thaw(value))
        return stock

    def _program(self, configs: list[dict[str, Any]]) -> LocalProgram:
        """The local program under what a round's config asks for."""
        program: Any = self.local
        for name, value in (item for config in configs for item in config.items()):
            if name == "proximal-mu" and hasattr(program, "proximal"):
                program = replace(program, proximal=float(value))
            elif name != "server-round":
                raise FedsimError(f"{self.cls} sends its clients '{name}', which {program.registered_name} does not know")
        return program


def stock_classes() -> list[str]:
    """The strategies in `flwr.serverapp.strategy` that aggregate arrays."""
    from flwr.serverapp import strategy

    left_out = (*NOT_ARRAYS, *NOT_STRATEGIES)
    return sorted(name for name in strategy.__all__ if name not in left_out and not name.startswith(PRIVATE))


def _find(cls: str) -> Any:
    """The class of that name."""
    if ":" in cls:
        module, _, name = cls.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"cls: '{cls}' names no class: {error}") from error
    from flwr.serverapp import strategy

    if cls.startswith(PRIVATE):
        raise ValueError(f"cls: the noise of {cls} would not be in the privacy account; take {{name: dp, inner: ...}}")
    known = stock_classes()
    if cls not in known:
        raise ValueError(
            f"cls: '{cls}' is no strategy of Flower that aggregates arrays{did_you_mean(cls, known)}; there are: {', '.join(known)}"
        )
    return getattr(strategy, cls)


@dataclass(frozen=True)
class _Asked:
    """All of Flower's `Grid` that a strategy needs to make its messages."""

    ids: list[int]

    def get_node_ids(self) -> list[int]:
        return self.ids


def _configure(stock: Any, problem: Problem, arrays: Any, ids: np.ndarray) -> Any:
    """The messages by which a class begins a round."""
    from flwr.app import ConfigRecord

    return stock.configure_train(int(problem.version) + 1, arrays, ConfigRecord(), _Asked(ids.tolist()))


def replies(w: Params, updates: Updates) -> list[Any]:
    """What the clients would have sent in Flower: each one's model, its number of examples, and the means of its metrics."""
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

    stacked = {name: as_numpy(value) for name, value in updates.payload.map(lambda change, old: old + change, w).items()}  # [C, ...]
    means = {f"train_{name}": (total / weight.clamp(min=1e-12)).tolist() for name, (total, weight) in (updates.metrics or {}).items()}
    made = []
    for c, (client, n) in enumerate(zip(updates.arrivals.ids.tolist(), updates.arrivals.n.tolist(), strict=True)):
        arrays = ArrayRecord({name: Array(value[c, ...]) for name, value in stacked.items()})
        metrics = MetricRecord({"num-examples": int(n), **{name: value[c] for name, value in means.items()}})
        asked = Message(RecordDict(), client, "train")
        made.append(Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=asked))
    return made
