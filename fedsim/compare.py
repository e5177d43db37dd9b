"""F5. Running a study: every cell of its grid, once, into run folders of their own.

    for event in compare(load_study(path), folder):
        print(event.cell.place, event.status)

Leaving the loop early checkpoints the run in hand; `compare` on the same folder goes on from there. A cell that is finished is kept.
"""

from __future__ import annotations

import json
import platform
import time
import traceback
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import product, takewhile
from pathlib import Path
from typing import Any, Literal

from fedsim import __version__
from fedsim.document import parse, write
from fedsim.errors import FedsimError
from fedsim.experiment import Row, open_executor, start, train
from fedsim.folder import Folder, write_file
from fedsim.grid import Cell, Choices, Plan
from fedsim.manifest import environment
from fedsim.registry import dump
from fedsim.results import higher_is_better, read_run
from fedsim.scenario import Engine, Scenario, dump_scenario
from fedsim.session import explain, warn_of_changes
from fedsim.sim.executor import Executor
from fedsim.sim.pool import Cluster
from fedsim.study import setting_name, short
from fedsim.trackers import tracked
from fedsim.world import World, adapt, build

FREE = ("address", "workers", "retries", "timeout")
"""Fields of `engine` that may change between two halves of a study: no result depends on them."""


@dataclass(frozen=True)
class Event:
    """Something that happened in a study.

    Attributes:
        cell: where.
        number, total: which of how many runs, from 1; tuning runs and cells are counted by themselves.
        status: kept (was finished before), running (`row` is new), done, or failed (`reason` says why).
        tuning: whether it is a tuning run.
    """

    cell: Cell
    number: int
    total: int
    status: Literal["kept", "running", "done", "failed"]
    tuning: bool = False
    row: Row = field(default_factory=dict)
    reason: str = ""


def compare(plan: Plan, path: Path) -> Generator[Event, None, None]:
    """Run a study into the folder `path`. Raises `FedsimError` where the folder holds something else."""
    folder = _open(plan, path)
    folder.lock()
    resident = _Resident()
    try:
        write_file(path / "study.yaml", write(_resolved(plan)).encode())
        tuning = _Tuning(plan, path)
        yield from _run_all(tuning.candidates(), path, resident, tuning=True)
        choices, told = tuning.choose()
        cells = plan.cells(choices)
        write_file(path / "manifest.json", _manifest(cells, told))
        yield from _run_all(cells, path, resident, tuning=False)
    finally:
        resident.close()
        folder.unlock()


def _open(plan: Plan, path: Path) -> Folder:
    path.mkdir(parents=True, exist_ok=True)
    ours = (path / "study.yaml").is_file()
    if not ours and any(child.name not in (".lock",) and not child.name.startswith(".study.yaml") for child in path.iterdir()):
        raise FedsimError(f"{path}: not empty, and not a study folder; choose another --output")
    if ours and (name := parse(path / "study.yaml").values.get("study")) != plan.study.study:
        raise FedsimError(f"{path}: holds the study '{name}'; choose another --output")
    return Folder(path)


def _resolved(plan: Plan) -> dict[str, Any]:
    """The study as plain values that need no other file."""
    values = dump(plan.study) | {"scenario": plan.base.values}
    return {k: v for k, v in values.items() if v not in (None, {})}


def _manifest(cells: list[Cell], tuning: list[dict[str, Any]]) -> bytes:
    rows = [{"place": c.place, "label": c.label, "seed": c.seed, "setting": setting_name(c.setting), "values": c.setting} for c in cells]
    values = {
        "fedsim": __version__,
        "versions": environment(),
        "machine": platform.platform(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "cells": rows,
        "tuning": tuning,
    }
    return json.dumps(values, indent=2).encode() + b"\n"


def _run_all(cells: list[Cell], path: Path, resident: _Resident, tuning: bool) -> Iterator[Event]:
    for cell in cells:
        _has(Folder(path / cell.place), cell.scenario)  # a folder that holds something else stops the study before it begins
    for number, cell in enumerate(cells, 1):
        event = Event(cell, number, len(cells), "kept", tuning)
        folder = Folder(path / cell.place)
        if _has(folder, cell.scenario) and folder.finished:
            yield event
            continue
        try:
            later = [c.scenario for c in cells[number - 1 :] if not Folder(path / c.place).finished]
            for row in _run(cell.scenario, folder, resident, later):
                yield replace(event, status="running", row=row)
        except Exception as error:  # whatever a strategy or a data set raises: the other cells are worth having
            resident.close()
            reason = explain(cell.document, error) if isinstance(error, FedsimError) else f"{type(error).__name__}: {error}"
            folder.write_failure(reason, traceback.format_exc())
            yield replace(event, status="failed", reason=reason)
        else:
            yield replace(event, status="done", row=folder.rows()[-1])


def _run(scenario: Scenario, folder: Folder, resident: _Resident, later: list[Scenario]) -> Iterator[Row]:
    """Run one cell, or go on with it."""
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.lock()
    try:
        folder.forget_failure()
        folder.write_scenario(dump_scenario(scenario))  # first: a cell that fails to build says what it was
        world, executor = resident.prepare(scenario, later)
        if (folder.path / "manifest.json").is_file() and folder.checkpoints():
            warn_of_changes(folder, scenario, world)
        else:
            start(scenario, world, folder)
        with closing(train(scenario, world, folder, executor)) as rows:
            yield from tracked(rows, scenario, folder.path)
    finally:
        folder.unlock()


def _has(folder: Folder, scenario: Scenario) -> bool:
    """Whether a folder holds this scenario, begun or finished. Raises if it holds another."""
    if not (folder.path / "scenario.yaml").is_file():
        return False
    there, wanted = (_essence(v) for v in (parse(folder.path / "scenario.yaml").values, dump_scenario(scenario)))
    if there != wanted:
        changed = ", ".join(sorted(k for k in there.keys() | wanted.keys() if there.get(k) != wanted.get(k)))
        if not folder.checkpoints() and not folder.finished:
            return False  # nothing was reached under the other scenario
        raise FedsimError(f"{folder.path}: ran with another {changed}; choose another --output, or delete this folder to run it again")
    return True


def _essence(values: dict[str, Any]) -> dict[str, Any]:
    """What of a scenario decides its result."""
    engine = {k: v for k, v in values["engine"].items() if k not in FREE}
    return {k: v for k, v in values.items() if k != "output"} | {"engine": engine}


class _Resident:
    """The world and the workers of the cell at hand; both are kept while the next cell has the same data, model, seed and engine.

    How many workers `auto` means is decided by the first of such cells, for all of them.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._world: World | None = None
        self._engine: Engine | None = None
        self._executor: Executor | None = None
        self._workers = 0
        self._cluster = Cluster()

    def prepare(self, scenario: Scenario, later: list[Scenario]) -> tuple[World, Executor]:
        """World and executor for a scenario, the first of those to come, `later`."""
        key = _world_key(scenario)
        if key != self._key or self._world is None:
            self.drop()
            self._key, self._world = key, build(scenario)
        alike = takewhile(lambda other: other.engine == scenario.engine and _world_key(other) == key, later)
        world = adapt(self._world, scenario, len(list(alike)))
        if scenario.engine != self._engine:
            self._dismiss()
        if self._executor is None:
            self._engine, self._workers = scenario.engine, world.workers
            self._executor = open_executor(scenario, world, self._cluster)
        return replace(world, workers=self._workers), self._executor

    def drop(self) -> None:
        """Give back workers and data; a Ray that was started stays."""
        self._dismiss()
        self._world = self._key = None

    def _dismiss(self) -> None:
        if self._executor is not None:
            self._executor.close()
        self._executor = None

    def close(self) -> None:
        """Give everything back."""
        self.drop()
        self._cluster.close()


def _world_key(scenario: Scenario) -> Any:
    engine = scenario.engine
    return scenario.seed, dump(scenario.data), dump(scenario.model), engine.device, engine.dtype, engine.precision, engine.mode


@dataclass(frozen=True)
class _Tuning:
    """The choice of hyper-parameters, for each strategy and setting, from the folders of tuning runs."""

    plan: Plan
    path: Path

    def groups(self) -> Iterator[tuple[str, str, list[Cell]]]:
        """Label, name of the setting, and the runs that decide."""
        study = self.plan.study
        for setting, label in product(self.plan.settings(), study.strategies):
            values = {p: study.over[p][at] for p, at in setting.items()}
            yield label, setting_name(values), self.plan.candidates(label, setting)

    def candidates(self) -> list[Cell]:
        """All tuning runs."""
        return [cell for _, _, cells in self.groups() for cell in cells]

    def choose(self) -> tuple[Choices, list[dict[str, Any]]]:
        """The best values, and an account of what was tried; the first of equals, and nothing where every run failed."""
        choices: Choices = {}
        account: list[dict[str, Any]] = []
        for label, setting, cells in self.groups():
            if not cells:
                continue
            tried = [self._trial(cell) for cell in cells]
            scored = [t for t in tried if t["score"] is not None]
            if scored:
                up = higher_is_better(scored[0]["metric"])
                best = max(scored, key=lambda t: t["score"] if up else -t["score"])
                choices[label, setting] = best["values"]
            rounds = sum(stage.rounds for cell in cells for stage in cell.scenario.stages())
            chosen = choices.get((label, setting), {})
            account.append({"label": label, "setting": setting, "chosen": chosen, "runs": len(cells), "rounds": rounds, "tried": tried})
        return choices, account

    def _trial(self, cell: Cell) -> dict[str, Any]:
        run = read_run(self.path / cell.place)
        metric = self.plan.study.metric or run.metric() or ""
        metric = metric.replace("test.", "validation.", 1) if metric.startswith("test.") else metric
        values = {p: v for p, v in cell.setting.items() if p not in self.plan.study.over}
        name = ", ".join(f"{short(p)}={v}" for p, v in values.items())
        return {"values": values, "name": name, "metric": metric, "score": run.final(metric), "place": cell.place}
