"""F5. Running a scenario: train, evaluate, log, checkpoint, resume.

    world = build(scenario)                          # data, model, first parameters: a function of the scenario
    for row in train(scenario, world, folder):       # one row of metrics a round
        print(row["round"], row.get("test.accuracy"))

Leaving the loop early, for whatever reason, checkpoints the last finished round; `train` on the same folder goes on from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from fedsim import rng
from fedsim.conformal import ConformalStrategy, OfClient
from fedsim.engine import Received, Round, RunPort, run
from fedsim.errors import ScenarioError
from fedsim.folder import Folder
from fedsim.manifest import manifest
from fedsim.metrics import Judged, coverage, mean, of_client, under_law
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.runtime import Runtime, Simulated
from fedsim.scenario import Phase, Scenario, dump_scenario
from fedsim.sim.evaluate import evaluate, judge_sets
from fedsim.sim.executor import Executor, Inline, Patience
from fedsim.sim.pool import Cluster, RayPool
from fedsim.world import World

Row = dict[str, Any]

PHASE = 1000
"""Folded after the seed, with the phase's number, for everything that happens in a phase; domains of `rng` are below it."""


MOST_SCORED = 10_000
"""Clients up to which each one's scores are logged."""

SCORE = "accuracy"
"""What the share of correct answers is called in a log."""


def start(scenario: Scenario, world: World, folder: Folder, runtime: str = "simulation") -> None:
    """Write what a run folder begins with. `runtime`: where its clients are, one of `manifest.RUNTIMES`."""
    folder.write_scenario(dump_scenario(scenario))
    folder.write_manifest(manifest(scenario, world, runtime))


def train(
    scenario: Scenario,
    world: World,
    folder: Folder,
    executor: Executor | None = None,
    runtime: Callable[[Executor], Runtime] | None = None,
) -> Generator[Row, None, None]:
    """Run the scenario, from the last checkpoint in `folder` if there is one. Yields a row of metrics a round; row 0 is the first model.

    An `executor` that is given was opened for a scenario of this world, and stays open. A `runtime` says where the clients are, where they
    are not simulated.
    """
    own = open_executor(scenario, world) if executor is None else executor
    where = Simulated(scenario, world, own, folder.storage) if runtime is None else runtime(own)
    try:
        if executor is not None:
            own.freeze(world.problem.frozen)  # an earlier run may have left the model of a phase there
        yield from _Training(scenario, world, folder, where).rounds()
    finally:
        if executor is None:
            own.close()
        folder.close()


def open_executor(scenario: Scenario, world: World, cluster: Cluster | None = None) -> Executor:
    """Workers, or this process, with the world's data resident. To be closed. A `cluster` stays for the next."""
    engine, trainer = scenario.engine, world.trainer(scenario.engine.compile)
    patience = Patience(engine.retries, engine.timeout, engine.on_failure == "lose")
    if world.workers:
        return RayPool(trainer, world.workers, engine.threads, patience, engine.address, cluster, engine.precision)
    return Inline(trainer, engine.threads, patience)


@dataclass(frozen=True)
class _Progress:
    """How far a run has come: what a checkpoint holds.

    Attributes:
        phase: which one is at hand, from 0.
        done: rounds of the phases before it.
        frozen: the model that the phase before left.
        counts: what the privacy account counts.
        start: where in the phase to go on, or None at its beginning.
        port: the port's saved state, with `start`.
    """

    phase: int = 0
    done: int = 0
    frozen: Params | None = None
    counts: dict[str, Tensor] = field(default_factory=dict)
    start: Round | None = None
    port: Any = None

    def save(self) -> dict[str, Any]:
        assert self.start is not None
        return {"phase": self.phase, "done": self.done, "frozen": self.frozen, "port": self.port} | {
            "counts": self.counts,
            "version": self.start.version,
            "state": self.start.state,
        }

    @staticmethod
    def load(saved: dict[str, Any]) -> _Progress:
        start = Round(saved["version"], saved["state"], Received())
        return _Progress(saved["phase"], saved["done"], saved["frozen"], saved["counts"], start, saved["port"])


@dataclass(frozen=True)
class _Training:
    """One run at work."""

    scenario: Scenario
    world: World
    folder: Folder
    runtime: Runtime

    @property
    def executor(self) -> Executor:
        return self.runtime.executor

    def rounds(self) -> Generator[Row, None, None]:
        saved = self.folder.latest(self.world.device)
        self.folder.rewind(saved[0] if saved else -1)
        progress = _Progress.load(saved[1]) if saved else _Progress(counts=self.world.ledger.start())
        stages = self.world.ledger.stages
        if not saved:
            if self.world.problem.frozen is not None:
                self.executor.freeze(self.world.problem.frozen)
            row: Row = {"round": 0, "time": 0.0} | self._scores(0, 0, self.world.problem, None, self.world.w, None)
            self.folder.log("metrics", row)
            yield row
        port: RunPort | None = None
        for stage in stages[progress.phase :]:
            frozen, first = self.world.enter(stage, progress.frozen)
            problem = replace(self.world.problem, frozen=frozen, storage=self.folder.storage)
            if frozen is not None:
                self.executor.freeze(frozen)
            port = self.runtime.port(progress.phase, stage, problem, first, port)
            if progress.start is not None:
                port.restore(progress.port)
            last, counts = yield from self._phase(stage, problem, first, port, progress)
            if last is not None:
                left = self.world.leave(stage, frozen, stage.strategy.deploy(last.state, stage.strategy.memory(problem, first)))
                progress = _Progress(progress.phase + 1, progress.done + last.version, left, counts)
            if last is None or last.version < stage.rounds:  # the privacy budget is spent
                break
        assert progress.frozen is not None  # there is at least one phase
        self.world.export(progress.frozen, self.folder.path / "adapter")
        self.folder.write_model(self.world.final(progress.frozen))  # last: it says that the run is finished

    def _phase(
        self, stage: Phase, problem: Problem, first: Params, port: RunPort, progress: _Progress
    ) -> Generator[Row, None, tuple[Round | None, dict[str, Tensor]]]:
        """The rounds of one phase, logged and checkpointed; returns the last (None: there was none) and the privacy account."""
        last, ledger = progress.start, self.world.ledger
        unsaved: _Progress | None = None  # whatever a round that is broken off has done is not in it
        if last is not None and last.version >= stage.rounds:
            return last, progress.counts
        if ledger.exhausted(progress.counts, progress.phase):
            if last is None and progress.frozen is None:
                raise ScenarioError("privacy", "a single round would pass the budget; raise it, or the noise")
            return last, progress.counts
        key = rng.fold(self.scenario.seed, PHASE, progress.phase)
        try:
            clock = time.perf_counter()
            for last in run(stage.strategy, problem, first, port, self.scenario.pace, key, progress.start):
                trained = time.perf_counter()
                progress = replace(progress, counts=ledger.enter(progress.counts, progress.phase, last.received))
                spent = last.version < stage.rounds and ledger.exhausted(progress.counts, progress.phase)
                row = self._row(stage, problem, last, first, port, progress, spent)
                end = time.perf_counter()
                self.folder.log("metrics", row)
                self.folder.log("clients", _client_row(row["round"], last))
                self.folder.log("timings", {"round": row["round"], "train": trained - clock, "evaluate": end - trained})
                unsaved = replace(progress, start=last, port=port.save())
                if row["round"] % self.scenario.output.checkpoint == 0 or last.version == stage.rounds or spent:
                    self._checkpoint(unsaved)
                    unsaved = None
                yield row | {"seconds": end - clock}
                if last.version == stage.rounds or spent:
                    return last, progress.counts
                clock = time.perf_counter()
        finally:
            if unsaved is not None:
                self._checkpoint(unsaved)
        raise AssertionError("run() never ends by itself")

    def _checkpoint(self, reached: _Progress) -> None:
        assert reached.start is not None
        self.folder.save(reached.done + reached.start.version, reached.save(), self.scenario.output.keep)

    def _row(self, stage: Phase, problem: Problem, last: Round, first: Params, port: RunPort, progress: _Progress, spent: bool) -> Row:
        """Everything to be said of a round. `spent`: it is the last one, because the privacy budget does not allow another."""
        received, number = last.received, progress.done + last.version
        row: Row = {"round": number, "time": last.time}
        if self.scenario.phases is not None:
            row["phase"] = progress.phase
        row["participants"] = 0 if received.arrivals is None else len(received.arrivals)
        row |= {"lost": len(received.lost), "rejected": len(received.rejected), "examples": received.examples}
        row |= {"bytes_down": received.bytes_down, "bytes_up": received.bytes_up}
        for kind, who in (("lost", received.lost), ("rejected", received.rejected)):
            if who:
                row[f"{kind}_clients"] = _by_reason(who)
        if received.arrivals is not None and bool(received.arrivals.staleness.any()):
            staleness = received.arrivals.staleness.double()
            row |= {"staleness.mean": float(staleness.mean()), "staleness.max": int(staleness.max())}
        row |= {f"train.{name}": _plain(value) for name, value in mean(received.metrics).items()}
        for name, value in last.report.items():
            if not _per_client(value):
                row[name if "." in name else f"server.{name}"] = _plain(float(value))
        row |= {name: _plain(value) for name, value in self.world.ledger.row(progress.counts, progress.phase).items()}
        if spent:
            row["stopped"] = "the privacy budget is spent"
        if number % self.scenario.evaluate.every == 0 or last.version == stage.rounds or spent:
            row |= self._scores(number, progress.phase, problem, last.state, first, port)
        return row

    def _scores(self, number: int, phase: int, problem: Problem, state: Any, first: Params, port: RunPort | None) -> Row:
        """Scores of what is deployed: on the test set what a client gets that never took part, on each client's test data its own model.

        `first` is the model at the start of the phase. Before the first round there is no state. Clients' scores are logged one by one.
        """
        stage = self.world.ledger.stages[phase]
        data, strategy, batch = self.world.data, stage.strategy, self.scenario.evaluate.batch
        shared = first if state is None else strategy.deploy(state, strategy.memory(problem, first))
        on = "validation" if self.scenario.data.validation else "test"
        scores = evaluate(self.executor, problem, shared, len(data.test_x), batch, self.scenario.evaluate.classes)
        row = {f"{on}.{name}": _plain(value) for name, value in scores.items()}
        means: dict[str, np.ndarray] = {}
        if self.scenario.evaluate.clients:
            spreads, means = self.runtime.score_clients(phase, stage, problem, state, shared, port)
            for name, spread in spreads.items():
                # Best and worst, and fairness, are said of what one wants more of.
                label, kinds = (SCORE, tuple(spread)) if name == "correct" else (name, ("mean", "weighted_mean", "std"))
                row |= {f"clients.{label}.{kind}": _plain(spread[kind]) for kind in kinds}
        if isinstance(strategy, ConformalStrategy) and state is not None:
            judged = judge_sets(self.executor, problem, strategy, state, data, batch, self.scenario.seed)
            row |= {f"coverage.{name}": _plain(value) for name, value in self._coverage(judged, strategy.alpha).items()}
            means |= dict(zip(("coverage", "set_size"), judged.by_client()[:2], strict=True))
            means |= {"class_coverage": judged.by_class()[0]} if judged.classes > 1 else {}
        if means and data.clients <= MOST_SCORED:
            self.folder.log("scores", _score_row(number, means))
        return row

    def _coverage(self, judged: Judged, alpha: float) -> dict[str, float]:
        """What prediction sets are worth, also for the label law that the scenario asks for."""
        target, counts = self.scenario.evaluate.target, self.world.data.label_counts(self.world.data.calibration)
        if isinstance(target, OfClient):
            return coverage(judged, alpha) | of_client(judged, target.id)
        laws = np.zeros((0, 0)) if target is None or counts is None else target.laws(torch.from_numpy(counts)).numpy()
        return coverage(judged, alpha) | (under_law(judged, laws[0]) if len(laws) == 1 else {})


def _score_row(number: int, means: dict[str, np.ndarray]) -> Row:
    """Each client's scores at an evaluation, `[N]`, and each class's, `[K]`, to six digits; null where there are no test data."""
    return {"round": number} | {
        SCORE if name == "correct" else name: [round(v, 6) if math.isfinite(v) else None for v in values.tolist()]
        for name, values in means.items()
    }


def _client_row(number: int, last: Round) -> Row:
    """Who took part in a round, and what is to be said of each: columns in the order of `ids`."""
    arrivals = last.received.arrivals
    row: Row = {"round": number, "ids": [] if arrivals is None else arrivals.ids.tolist()}
    if arrivals is not None and bool(arrivals.staleness.any()):
        row["staleness"] = arrivals.staleness.tolist()
    return row | {name: list(map(_plain, value.tolist())) for name, value in last.report.items() if _per_client(value)}


def _by_reason(who: dict[int, str]) -> dict[str, list[int]]:
    """Clients by what happened to them."""
    reasons: dict[str, list[int]] = {}
    for client, why in sorted(who.items()):
        reasons.setdefault(why, []).append(client)
    return dict(sorted(reasons.items()))


def _per_client(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim > 0


def _plain(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None
