"""F5. Trackers: other programs that are told of a run, by entry point (`fedsim.trackers`) and only if the scenario asks for them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedsim.errors import FedsimError, ScenarioError, did_you_mean

if TYPE_CHECKING:
    from fedsim.scenario import Scenario

Row = dict[str, Any]


class Tracker(Protocol):
    """Where rows go."""

    def log(self, row: Row) -> None:
        """Take a row of metrics; `row["round"]` is its step."""

    def close(self, finished: bool) -> None:
        """The run has ended, or was interrupted."""


Open = Callable[[dict[str, Any], Path], Tracker]
"""From the resolved scenario and the run folder to a tracker at work."""


def available() -> dict[str, str]:
    """The trackers that installed packages offer: name, and where each is."""
    return {point.name: point.value for point in sorted(entry_points(group="fedsim.trackers"))}


def faults(names: tuple[str, ...]) -> Iterator[ScenarioError]:
    """What is wrong with a scenario's list of trackers."""
    known = available()
    for i, name in enumerate(names):
        if name not in known:
            yield ScenarioError(f"output.trackers.{i}", f"there is no '{name}'{did_you_mean(name, known)}; there are: {', '.join(known)}")


def tracked(rows: Iterable[Row], scenario: Scenario, folder: Path) -> Iterator[Row]:
    """The rows of a run, each passed on to the scenario's trackers first.

    A tracker that cannot start stops the run before its first round: it was asked for. One that fails later is told of on stderr and
    left out from then on: the run folder has every number, and a server that went away is no reason to lose a night's training.
    """
    if not scenario.output.trackers:
        yield from rows
        return
    from fedsim.scenario import dump_scenario

    values, finished = dump_scenario(scenario), False
    trackers: dict[str, Tracker] = {}
    try:
        for name in scenario.output.trackers:
            trackers[name] = _open(name, values, folder)
        for row in rows:
            for name, tracker in list(trackers.items()):
                if not _told(name, partial(tracker.log, row)):
                    del trackers[name]
            yield row
        finished = True
    finally:
        for name, tracker in trackers.items():
            _told(name, partial(tracker.close, finished))


def _open(name: str, values: dict[str, Any], folder: Path) -> Tracker:
    try:
        return _find(name)(values, folder)
    except FedsimError:
        raise
    except Exception as error:  # whatever another program raises: no server, no account
        raise FedsimError(f"output.trackers: {name} does not start: {type(error).__name__}: {error}") from error


def _told(name: str, tell: Callable[[], None]) -> bool:
    """Whether a tracker took what it was told. It says so on stderr if not."""
    try:
        tell()
    except Exception as error:
        print(f"warning: the tracker {name} failed and is told nothing more: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    return True


def _find(name: str) -> Open:
    module, _, function = available()[name].partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise FedsimError(f"output.trackers: {name} does not import: {error}") from error


def needs(package: str, tracker: str) -> FedsimError:
    """The error for a tracker whose package is not installed."""
    return FedsimError(f"output.trackers: {tracker} needs the package {package}, which is not installed; pip install {package}")


def numbers(row: Row) -> dict[str, float]:
    """What of a row is a number."""
    return {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and k != "round"}


def flat(values: Any, path: str = "") -> dict[str, Any]:
    """Nested values by dotted path."""
    if isinstance(values, dict):
        return {k: v for name, inner in values.items() for k, v in flat(inner, f"{path}.{name}" if path else str(name)).items()}
    return {path: values}
