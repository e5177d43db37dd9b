"""F5. What run folders and study folders say, read back: the only source of reports. Nothing is trained, loaded or unpickled here."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fedsim.console import headline
from fedsim.errors import FedsimError
from fedsim.folder import Folder

Row = dict[str, Any]

LOWER: tuple[str, ...] = ("loss", "perplexity", "ece", "mse", "mae", "std", "epsilon", "bytes", "time", "width")
LOWER += ("set_size", "set_size_client_mean", "target_set_size", "client_gap", "class_gap", "clients_below", "empty")
"""Last words of metrics of which less is better."""


def higher_is_better(metric: str) -> bool:
    """Whether one wants more of a metric."""
    return not any(part in LOWER for part in metric.split("."))


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        path: the folder.
        scenario: the resolved scenario, as plain values.
        manifest: versions, machine and so on; empty where the run failed before it began.
        rows: metrics, a row a round.
        failure: why it failed, or None.
    """

    path: Path
    scenario: dict[str, Any]
    manifest: dict[str, Any]
    rows: list[Row]
    failure: str | None = None

    @property
    def finished(self) -> bool:
        return Folder(self.path).finished

    @property
    def status(self) -> str:
        """finished, failed, or unfinished."""
        return "finished" if self.finished else "failed" if self.failure else "unfinished"

    @cached_property
    def clients(self) -> list[Row]:
        """Who took part, a row a round."""
        return Folder(self.path).rows("clients")

    @cached_property
    def scores(self) -> list[Row]:
        """Each client's own scores, a row an evaluation."""
        return Folder(self.path).rows("scores")

    @cached_property
    def timings(self) -> list[Row]:
        """Wall-clock seconds, a row a round."""
        return Folder(self.path).rows("timings")

    @property
    def rounds(self) -> int:
        """Rounds that the scenario asks for."""
        phases = self.scenario.get("phases")
        return sum(p["rounds"] for p in phases) if phases else int(self.scenario.get("rounds") or 0)

    def strategies(self) -> list[str]:
        """The names of what ran, phase by phase."""
        stages = self.scenario.get("phases") or [self.scenario]
        return [str(stage["strategy"]["name"]) for stage in stages]

    def metric(self) -> str | None:
        """The headline of the last evaluated row."""
        return next((name for row in reversed(self.rows) if (name := headline(row))), None)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The rounds in which a metric has a value, and the values."""
        pairs = [(row["round"], row[name]) for row in self.rows if isinstance(row.get(name), (int, float))]
        return [r for r, _ in pairs], [float(v) for _, v in pairs]

    def clock(self) -> dict[int, float]:
        """The virtual time of each round, where anything takes time; else nothing."""
        times = dict(zip(*self.series("time"), strict=True))
        return times if any(times.values()) else {}

    def final(self, name: str) -> float | None:
        """The last value of a metric, of a run that is finished."""
        values = self.series(name)[1]
        return values[-1] if values and self.finished else None

    def total(self, name: str) -> float:
        """The sum of a number over all rounds."""
        return float(sum(row.get(name) or 0 for row in self.rows))

    def names(self, prefix: str) -> list[str]:
        """Names of metrics that begin with a prefix, in the order in which they appear."""
        return list(dict.fromkeys(k for row in self.rows for k, v in row.items() if k.startswith(prefix) and isinstance(v, (int, float))))


@dataclass(frozen=True)
class CellResult:
    """A cell of a study: its place in the grid, and its run, or None if it has not begun."""

    label: str
    seed: int
    setting: str
    values: dict[str, Any]
    place: str
    run: Run | None

    @property
    def status(self) -> str:
        """finished, failed, unfinished or waiting."""
        return self.run.status if self.run else "waiting"


@dataclass(frozen=True)
class StudyResults:
    """A study folder.

    Attributes:
        path: the folder.
        study: the study's fields, as plain values.
        cells: the grid.
        tuning: what was tried for each strategy and setting, and what was chosen.
    """

    path: Path
    study: dict[str, Any]
    manifest: dict[str, Any]
    cells: list[CellResult]
    tuning: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.study["study"])

    @property
    def labels(self) -> list[str]:
        return list(self.study["strategies"])

    @property
    def baseline(self) -> str:
        return str(self.study.get("baseline") or self.labels[0])

    @property
    def settings(self) -> list[str]:
        return list(dict.fromkeys(cell.setting for cell in self.cells))

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(cell.seed for cell in self.cells))

    @cached_property
    def metric(self) -> str:
        """What is compared: the study's metric, or the headline of its runs."""
        if self.study.get("metric"):
            return str(self.study["metric"])
        return next((name for cell in self.cells if cell.run and (name := cell.run.metric())), "test.loss")

    def runs(self, setting: str, label: str) -> dict[int, Run]:
        """The runs that have begun, by seed."""
        return {c.seed: c.run for c in self.cells if c.run and (c.setting, c.label) == (setting, label)}

    def finals(self, setting: str, label: str, metric: str) -> dict[int, float]:
        """The last value of a metric by seed, of runs that are finished."""
        values = {seed: run.final(metric) for seed, run in self.runs(setting, label).items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def count(self, status: str) -> int:
        """How many cells have a status."""
        return sum(cell.status == status for cell in self.cells)


def is_run(path: Path) -> bool:
    """Whether a folder is a run's."""
    return (path / "scenario.yaml").is_file()


def is_study_folder(path: Path) -> bool:
    """Whether a folder is a study's."""
    return (path / "study.yaml").is_file() and (path / "manifest.json").is_file()


def read_run(path: Path) -> Run:
    """A run folder, read. Raises `FedsimError` where it is none."""
    folder = Folder.open(path)
    manifest = folder.manifest() if (path / "manifest.json").exists() else {}
    failure = None
    if (path / "failure.json").exists():
        failure = str(_json(path / "failure.json").get("reason"))
    return Run(path, _yaml(path / "scenario.yaml"), manifest, folder.rows(), failure)


def read_study(path: Path) -> StudyResults:
    """A study folder, read, with all runs in it that its manifest lists."""
    if not is_study_folder(path):
        raise FedsimError(f"{path}: not a study folder (it needs study.yaml and manifest.json)")
    manifest = _json(path / "manifest.json")
    cells = []
    for cell in manifest["cells"]:
        place = path / cell["place"]
        run = read_run(place) if is_run(place) else None
        cells.append(CellResult(cell["label"], cell["seed"], cell["setting"], cell["values"], cell["place"], run))
    return StudyResults(path, _yaml(path / "study.yaml"), manifest, cells, manifest.get("tuning", []))


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise FedsimError(f"{path}: cannot be read: {error}") from None


def _yaml(path: Path) -> dict[str, Any]:
    from fedsim.document import parse

    return parse(path).values
