"""F5. What a person sees in the terminal: progress, results, the shape of a scenario. Reads rows and worlds, decides nothing."""

from __future__ import annotations

import os
import time
from typing import Any, Protocol

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

Row = dict[str, Any]

HEADLINE = tuple(f"{on}.{name}" for on in ("test", "validation") for name in ("accuracy", "perplexity", "r2", "loss"))
"""The metric shown in one word, the first that the task has."""

BARS = "▁▂▃▄▅▆▇█"


def terminal() -> Console:
    """Where to print; a pipe or a file has no width, so tables get room there."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=120)


def headline(row: Row) -> str | None:
    """The name of the metric that sums a row up."""
    return next((name for name in HEADLINE if row.get(name) is not None), None)


class Display(Protocol):
    """Shows rows as they come."""

    def show(self, row: Row) -> None: ...
    def close(self) -> None: ...


class Bar:
    """A progress bar, for a terminal."""

    def __init__(self, console: Console, rounds: int):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        self._progress = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[latest]}"), console=console)
        self._task: TaskID = self._progress.add_task("rounds", total=rounds, rate="", latest="")
        self._latest = ""
        self._progress.start()

    def show(self, row: Row) -> None:
        self._latest = brief(row) or self._latest
        rate = f"{row['examples'] / row['seconds']:,.0f} examples/s" if row.get("seconds") else ""
        self._progress.update(self._task, completed=row["round"], rate=rate, latest=self._latest)

    def close(self) -> None:
        self._progress.stop()


class Lines:
    """A line for each evaluated round, for a log file or a pipe."""

    def __init__(self, console: Console, rounds: int):
        self._console, self._rounds = console, rounds

    def show(self, row: Row) -> None:
        if text := brief(row):
            took = f"  {row['seconds']:.2f} s" if row.get("seconds") else ""
            self._console.print(f"round {row['round']}/{self._rounds}  {text}{took}", highlight=False, soft_wrap=True)

    def close(self) -> None:
        pass


class Verbose:
    """A line for every round, with what came in."""

    def __init__(self, console: Console, rounds: int):
        self._console, self._rounds = console, rounds

    def show(self, row: Row) -> None:
        parts = [f"round {row['round']}/{self._rounds}"]
        for name, unit in (("participants", "clients"), ("lost", "lost"), ("rejected", "rejected")):
            if row.get(name):
                parts.append(f"{row[name]} {unit}")
        if "bytes_up" in row:
            parts.append(f"{size(row['bytes_down'])} down, {size(row['bytes_up'])} up")
        parts += [f"{name} {row[name]:.4f}" for name in ("train.loss", headline(row)) if name and row.get(name) is not None]
        if row.get("seconds"):
            parts.append(f"{row['seconds']:.2f} s")
        self._console.print("  ".join(parts), highlight=False, soft_wrap=True)

    def close(self) -> None:
        pass


class Silent:
    """Nothing, for `--quiet`."""

    def show(self, row: Row) -> None:
        pass

    def close(self) -> None:
        pass


class StudyLines:
    """A line for each run of a study; in a terminal, also where the run at hand is; if `verbose`, a line for each evaluated round."""

    def __init__(self, console: Console, verbose: bool):
        self._console, self._verbose = console, verbose
        self._status = console.status("") if console.is_terminal else None
        self._began = time.monotonic()
        if self._status:
            self._status.start()

    def show(self, event: Any) -> None:
        head = f"[{event.number}/{event.total}] {'tuning ' if event.tuning else ''}{event.cell.place.removeprefix('tuning/')}"
        if event.status == "running":
            if self._verbose and brief(event.row):
                self._print(f"{head}  round {event.row['round']}  {brief(event.row)}")
            if self._status:
                self._status.update(f"{head}  round {event.row['round']}  {brief(event.row)}".replace("[", r"\["))
            self._began = self._began if event.row["round"] else time.monotonic()
            return
        if event.status == "done":
            self._print(f"{head}  {brief(event.row)}  {time.monotonic() - self._began:.1f} s")
        else:
            self._print(f"{head}  " + ("finished before" if event.status == "kept" else f"FAILED: {event.reason}"))

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._status:
            self._status.stop()


class StudySilent:
    """Nothing, for `--quiet`."""

    def show(self, event: Any) -> None:
        pass

    def close(self) -> None:
        pass


def brief(row: Row) -> str:
    """The few numbers one follows during a run; nothing for a round that was not evaluated."""
    name = headline(row)
    if name is None:
        return ""
    parts = [f"{name} {row[name]:.4f}"]
    if row.get("train.loss") is not None:
        parts.append(f"train.loss {row['train.loss']:.4f}")
    if "participants" in row:
        parts.append(f"{row['participants']} clients")
    return "  ".join(parts)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def curve(rows: list[Row]) -> str:
    """The headline metric over the rounds, as a line of bars with its range."""
    evaluated = [row for row in rows if headline(row)]
    if not evaluated:
        return ""
    name = headline(evaluated[-1]) or ""
    values = np.array([row[name] for row in evaluated if row.get(name) is not None])
    picked = values[np.linspace(0, len(values) - 1, min(60, len(values))).round().astype(int)]
    span = max(picked.max() - picked.min(), 1e-12)
    bars = "".join(BARS[int((v - picked.min()) / span * (len(BARS) - 1) + 0.5)] for v in picked)
    return f"{name}  {values.min():.4f} {bars} {values.max():.4f}"


def report(console: Console, rows: list[Row]) -> None:
    """The result of a run: a table of some rounds, totals, and the curve."""
    evaluated = [row for row in rows if headline(row)]
    if not evaluated:
        return
    columns = ("train.loss", "test.loss", headline(evaluated[-1]), "clients.accuracy.mean", "clients.accuracy.worst_10")
    names = [name for name in dict.fromkeys(columns) if name in evaluated[-1]]
    table = Table(title=None, header_style="bold")
    table.add_column("round", justify="right")
    table.add_column("clients", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for i in dict.fromkeys(np.linspace(0, len(evaluated) - 1, min(11, len(evaluated))).round().astype(int).tolist()):
        row = evaluated[i]
        cells = ("" if row.get(n) is None else f"{row[n]:.4f}" for n in names)
        table.add_row(str(row["round"]), str(row.get("participants", "")), *cells)
    console.print(table)
    trained = [row for row in rows if "examples" in row]
    total = {k: sum(row[k] for row in trained) for k in ("examples", "bytes_down", "bytes_up", "rejected", "lost")}
    console.print(
        f"{total['examples']:,} examples, {size(total['bytes_down'])} down, {size(total['bytes_up'])} up, "
        f"{total['rejected']} updates rejected, {total['lost']} clients lost",
        highlight=False,
    )
    console.print(curve(rows), highlight=False)


def overview(console: Console, facts: dict[str, str], skew: list[tuple[str, ...]], header: tuple[str, ...]) -> None:
    """What would run, and how the data are spread over clients."""
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in facts.items():
        table.add_row(name, value)
    console.print(table, highlight=False)
    if skew:
        spread = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=0, collapse_padding=True)
        for name in header:
            spread.add_column(f" {name}", justify="right", no_wrap=True)
        for row in skew:
            spread.add_row(*row)
        console.print(spread)


def plain_table(console: Console, head: list[str], rows: list[list[str]]) -> None:
    """A table of texts: words in the first column, numbers in the others."""
    table = Table(header_style="bold")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
