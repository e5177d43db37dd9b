"""F5. A run as a person starts it: with a display, trackers, and a Ctrl-C that loses nothing."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from fedsim.console import Bar, Display, Lines, Row, Silent, StudyLines, StudySilent, Verbose, terminal
from fedsim.document import Document
from fedsim.errors import FedsimError
from fedsim.folder import Folder
from fedsim.grid import Plan
from fedsim.manifest import RUNTIMES, as_began, differences, manifest
from fedsim.scenario import Scenario
from fedsim.trackers import tracked
from fedsim.world import World, build, keep_loaded

INTERRUPTED = 130
"""The exit code of what was interrupted and can go on."""


def begin(scenario: Scenario, output: Path | None, runtime: str = "simulation") -> tuple[World, Folder]:
    """Build a scenario's world, and make its run folder. `runtime`: where its clients are, one of `manifest.RUNTIMES`."""
    from fedsim import experiment

    world = build(scenario)
    folder = Folder.create(output or (Path(scenario.output.folder) if scenario.output.folder else None), scenario.name)
    folder.lock()
    experiment.start(scenario, world, folder, runtime)
    return world, folder


def take_up(scenario: Scenario, folder: Folder, runtime: str = "simulation") -> World:
    """Build the world of a run that is to be continued; warn of what has changed since. Raises where it began in another runtime."""
    same_runtime(folder, runtime)
    world = build(as_began(scenario, folder.manifest()))
    folder.lock()
    warn_of_changes(folder, scenario, world)
    return world


def same_runtime(folder: Folder, runtime: str) -> None:
    """Raise where a run that is to be continued in a runtime began in another."""
    if (began := folder.manifest().get("runtime", runtime)) != runtime:
        command = RUNTIMES[began].format(folder.path)
        fix = f"go on with: {command}" if command else "its nodes forget, so it cannot be continued; run its scenario again"
        raise FedsimError(f"{folder.path}: this run began with the runtime '{began}'; {fix}")


def warn_of_changes(folder: Folder, scenario: Scenario, world: World) -> None:
    """Say on stderr what would make the rest of a run differ from its beginning. Raises if the data are not the same."""
    for change in differences(folder.manifest(), manifest(scenario, world)):
        print(f"warning: {change} since this run started; the last bits may differ", file=sys.stderr)


def train(scenario: Scenario, world: World, folder: Folder, quiet: bool = False, verbose: bool = False) -> int:
    """Train with a display. Returns the exit code. A first Ctrl-C finishes the round in hand, a second one does not."""
    from fedsim import experiment

    rounds = sum(stage.rounds for stage in scenario.stages())
    display = display_of(rounds, quiet, verbose)
    keep_loaded()
    row: Row = {}
    try:
        with interruptible("round") as interrupted, closing(experiment.train(scenario, world, folder)) as trained:
            for row in tracked(trained, scenario, folder.path):
                display.show(row)
                if interrupted() and row["round"] < rounds and "stopped" not in row:
                    break
    except KeyboardInterrupt:
        print(f"\nDropped the round in hand. Go on with:\n  fedsim run --resume {folder.path}", file=sys.stderr)
        return INTERRUPTED
    finally:
        display.close()
        folder.unlock()
    if row.get("round", rounds) < rounds and not folder.finished:
        print(f"\nInterrupted after round {row['round']} of {rounds}. Go on with:\n  fedsim run --resume {folder.path}", file=sys.stderr)
        return INTERRUPTED
    return 0


def train_in_flower(scenario: Scenario, world: World, folder: Folder, quiet: bool = False, verbose: bool = False) -> int:
    """The same in Flower's own simulation, which cannot be taken up again: nodes forget what devices remember."""
    from fedsim.flower.simulation import simulate

    display = display_of(sum(stage.rounds for stage in scenario.stages()), quiet, verbose)
    try:
        with interruptible("work") as interrupted:
            simulate(scenario, world, folder, display, interrupted)
    except KeyboardInterrupt:
        print("\nInterrupted. Flower's simulation begins anew.", file=sys.stderr)
        return INTERRUPTED
    finally:
        display.close()
        folder.unlock()
    return 0


def compare(plan: Plan, folder: Path, quiet: bool = False, verbose: bool = False) -> int:
    """Run a study with a display. Returns the exit code: 0 also where cells failed. A first Ctrl-C finishes the round in hand."""
    from fedsim.compare import compare as run_study

    display = StudySilent() if quiet else StudyLines(terminal(), verbose)
    interrupted_by = False
    try:
        with interruptible("round") as interrupted, closing(run_study(plan, folder)) as events:
            for event in events:
                display.show(event)
                if interrupted_by := interrupted():
                    break
    except KeyboardInterrupt:
        interrupted_by = True
    finally:
        display.close()
    if interrupted_by:
        print(f"\nInterrupted; finished cells and checkpoints are in {folder}. The same command goes on.", file=sys.stderr)
        return INTERRUPTED
    return 0


def display_of(rounds: int, quiet: bool, verbose: bool) -> Display:
    """The display that fits what was asked for, and the terminal."""
    console = terminal()
    if quiet:
        return Silent()
    if verbose:
        return Verbose(console, rounds)
    return (Bar if console.is_terminal else Lines)(console, rounds)


@contextmanager
def interruptible(what: str) -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come. The second one raises KeyboardInterrupt at once. `what` is in hand, and will be finished."""
    came: list[int] = []

    def note(signum: int, frame: Any) -> None:
        came.append(signum)
        if len(came) > 1:
            raise KeyboardInterrupt
        print(f"\nFinishing the {what} in hand; press Ctrl-C again to drop it.", file=sys.stderr)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def explain(document: Document | None, error: Exception) -> str:
    """An error in words, with the place in the document that it concerns."""
    from fedsim.errors import ScenarioError

    return document.explain(error) if document is not None and isinstance(error, ScenarioError) else str(error)
