"""F5. A study, compared: means, paired differences to the baseline, their tests, and the cost to a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim import statistics
from fedsim.results import Run, StudyResults, higher_is_better
from fedsim.statistics import Paired, Summary

WORST = "clients.accuracy.worst_10"


@dataclass(frozen=True)
class Target:
    """What it took to reach the target: how many of n seeds did, and the means over those.

    Attributes:
        hits, n: seeds that reached it, of how many.
        rounds: until then.
        bytes: both ways, until then.
        time: virtual seconds until then, where the fleet has a clock.
    """

    hits: int
    n: int
    rounds: float | None = None
    bytes: float | None = None
    time: float | None = None


@dataclass(frozen=True)
class Line:
    """A strategy in a setting.

    Attributes:
        setting, label: which.
        seeds: those whose runs are finished.
        score: of the metric at the end, or None where no run is finished.
        versus: the paired difference to the baseline; None for the baseline itself, and without common seeds.
        p: of that difference, Holm-corrected over all such tests of the study.
        verdict: better or worse than the baseline beyond the noise (p < 0.05), or "".
        area: the mean height of the metric's curve over the rounds.
        target: the cost to the target, where the study has one.
        bytes: both ways, in all.
        time: virtual seconds in all, where the fleet has a clock.
        worst: accuracy of the worst tenth of clients, where clients are evaluated.
        epsilon: the privacy spent, where there is an account of it.
    """

    setting: str
    label: str
    seeds: tuple[int, ...]
    score: Summary | None
    versus: Paired | None = None
    p: float | None = None
    verdict: str = ""
    area: Summary | None = None
    target: Target | None = None
    bytes: Summary | None = None
    time: Summary | None = None
    worst: Summary | None = None
    epsilon: Summary | None = None


@dataclass(frozen=True)
class Comparison:
    """A study with its lines, in the order of settings and strategies."""

    results: StudyResults

    @property
    def higher(self) -> bool:
        """Whether more of the metric is better."""
        return higher_is_better(self.results.metric)

    @cached_property
    def lines(self) -> list[Line]:
        """All lines, with tests corrected together."""
        lines = [self._line(setting, label) for setting in self.results.settings for label in self.results.labels]
        corrected = statistics.holm([line.versus.p if line.versus else None for line in lines])
        return [self._judged(line, p) for line, p in zip(lines, corrected, strict=True)]

    def of(self, setting: str) -> list[Line]:
        """The lines of a setting."""
        return [line for line in self.lines if line.setting == setting]

    def has(self, column: str) -> bool:
        """Whether any line has something in a column."""
        return any(getattr(line, column) is not None for line in self.lines)

    def _judged(self, line: Line, p: float | None) -> Line:
        if not statistics.significant(p):
            return replace(line, p=p)
        assert line.versus is not None
        return replace(line, p=p, verdict="better" if (line.versus.difference > 0) == self.higher else "worse")

    def _line(self, setting: str, label: str) -> Line:
        results, metric = self.results, self.results.metric
        finals = results.finals(setting, label, metric)
        runs = [run for seed, run in results.runs(setting, label).items() if seed in finals]
        return Line(
            setting,
            label,
            tuple(finals),
            _summary(list(finals.values())),
            self._versus(setting, label, finals),
            area=_summary([statistics.area(*run.series(metric)) for run in runs]),
            target=self._target(runs),
            bytes=_summary([run.total("bytes_down") + run.total("bytes_up") for run in runs]),
            time=_summary([run.final("time") for run in runs if run.clock()]),
            worst=_summary([run.final(WORST) for run in runs]),
            epsilon=_summary([run.final("privacy.epsilon") for run in runs]),
        )

    def _versus(self, setting: str, label: str, finals: dict[int, float]) -> Paired | None:
        base = self.results.finals(setting, self.results.baseline, self.results.metric)
        common = [seed for seed in finals if seed in base]
        if label == self.results.baseline or not common:
            return None
        return statistics.paired([finals[s] for s in common], [base[s] for s in common])

    def _target(self, runs: list[Run]) -> Target | None:
        target = self.results.study.get("target")
        if target is None or not runs:
            return None
        costs = [cost for run in runs if (cost := _cost(run, self.results.metric, float(target), self.higher)) is not None]
        if not costs:
            return Target(0, len(runs))
        rounds, traffic, times = zip(*costs, strict=True)
        clock = [t for t in times if t is not None]
        return Target(len(costs), len(runs), _mean(rounds), _mean(traffic), _mean(clock) if clock else None)

    def pairs(self, setting: str) -> dict[tuple[str, str], tuple[Paired, float | None]]:
        """Every two strategies of a setting: their paired difference, and its p-value, Holm-corrected over the pairs of the setting."""
        finals = {label: self.results.finals(setting, label, self.results.metric) for label in self.results.labels}
        found = {}
        for a, b in combinations(finals, 2):
            if common := [seed for seed in finals[a] if seed in finals[b]]:
                found[a, b] = statistics.paired([finals[a][s] for s in common], [finals[b][s] for s in common])
        corrected = statistics.holm([each.p for each in found.values()])
        return {pair: (each, p) for (pair, each), p in zip(found.items(), corrected, strict=True)}

    def blocks(self) -> tuple[list[str], NDArray[np.float64]]:
        """What ranks are taken over, `[m, k]`: settings (means over seeds) where there are several, else seeds; complete ones only."""
        results = self.results
        rows: dict[str, list[float | None]] = {}
        if len(results.settings) > 1:
            for setting in results.settings:
                rows[setting] = [line.score.mean if line.score else None for line in self.of(setting)]
        else:
            finals = [results.finals(results.settings[0], label, results.metric) for label in results.labels]
            rows = {f"seed {seed}": [values.get(seed) for values in finals] for seed in results.seeds}
        whole = {name: row for name, row in rows.items() if None not in row}
        return list(whole), np.array(list(whole.values()), dtype=np.float64).reshape(len(whole), len(results.labels))


def _summary(values: list[Any]) -> Summary | None:
    there = [v for v in values if v is not None]
    return statistics.summary(there) if there else None


def _mean(values: Any) -> float:
    return float(np.mean(values))


def _cost(run: Run, metric: str, target: float, higher: bool) -> tuple[float, float, float | None] | None:
    """Rounds, bytes and virtual time until a run's metric is at the target, or None."""
    rounds, values = run.series(metric)
    at = statistics.reached(values, target, higher)
    if at is None:
        return None
    until = [row for row in run.rows if row["round"] <= rounds[at]]
    traffic = sum((row.get("bytes_down") or 0) + (row.get("bytes_up") or 0) for row in until)
    return float(rounds[at]), float(traffic), run.clock().get(rounds[at])


@dataclass(frozen=True)
class Pairing:
    """Whether what should be shared within a seed is shared: the partition, the first model, who took part.

    Attributes:
        groups: sets of cells of one seed and setting that were looked at.
        broken: what differs, in words.
    """

    groups: int
    broken: list[str]


def check_pairing(results: StudyResults) -> Pairing:
    """Compare, within each seed and setting, partition and first model (by hash), first scores, and the participation trace."""
    broken, groups = [], 0
    looks: dict[str, Callable[[Run], Any]] = {
        "partition": lambda run: run.manifest.get("partition"),
        "initial model": lambda run: run.manifest.get("initial_model"),
        "first scores": lambda run: run.rows[0] if run.rows else None,
        "participation": lambda run: [row["ids"] for row in run.clients] if run.finished else None,
    }
    for setting in results.settings:
        for seed in results.seeds:
            runs = {c.label: c.run for c in results.cells if (c.setting, c.seed) == (setting, seed) and c.run}
            groups += len(runs) > 1
            for what, look in looks.items():
                seen = [value for run in runs.values() if (value := look(run)) is not None]
                if any(value != seen[0] for value in seen[1:]):
                    broken.append(f"{what} under seed {seed}" + (f", {setting}" if setting else ""))
    return Pairing(groups, broken)


def as_json(results: StudyResults) -> dict[str, Any]:
    """The comparison as plain values."""
    comparison = Comparison(results)
    return {
        "study": results.name,
        "metric": results.metric,
        "higher_is_better": comparison.higher,
        "baseline": results.baseline,
        "cells": {status: results.count(status) for status in ("finished", "failed", "unfinished", "waiting")},
        "lines": [asdict(line) for line in comparison.lines],
        "failures": {c.place: c.run.failure for c in results.cells if c.run and c.status == "failed"},
    }
