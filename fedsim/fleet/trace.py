"""F3. Availability as it was recorded: a file of intervals, one a row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.errors import ScenarioError
from fedsim.fleet import files
from fedsim.fleet.participation import Mask, Participation, State
from fedsim.fleet.rates import Labels, Vector
from fedsim.registry import register
from fedsim.rng import Key

COLUMNS = ("client", "from", "to")
FIELD = "fleet.participation.file"
_LAST = 2**53  # rounds above this are a mistake


@register("trace")
@dataclass(frozen=True)
class Trace(Participation):
    """Clients are available in the rounds that a file lists: CSV with a header, or JSON lines, with client, from, to.

    Client numbers start at 0; an interval is half open, from <= t < to, in rounds; a client may have any number of intervals, and one
    without any is never available. Files end in `.csv`, or in `.jsonl` / `.ndjson`. A relative path starts at the current directory.
    With `repeat` the trace starts again after its last `to`; without it, nobody is available from there on.
    """

    file: str
    repeat: bool = False

    def start(self, clients: int, labels: Labels | None, key: Key) -> State:
        rows = merge(read(Path(self.file), clients))
        client, begin, end = np.array(rows, dtype=np.int64).reshape(-1, 3).T.copy()
        return {"clients": np.array(clients, dtype=np.int64), "client": client, "from": begin, "to": end}

    def active(self, state: State, t: int, key: Key) -> tuple[Mask, State]:
        now = t % int(state["to"].max()) if self.repeat else t
        mask = np.zeros(int(state["clients"]), dtype=np.bool_)
        mask[state["client"][(state["from"] <= now) & (now < state["to"])]] = True
        return mask, state

    def probability(self, state: State, t: int) -> Vector | None:
        """The share of rounds that a client is available in, where the trace repeats; else None."""
        if not self.repeat:
            return None
        rounds = np.bincount(state["client"], weights=state["to"] - state["from"], minlength=int(state["clients"]))
        return np.asarray(rounds / state["to"].max())


def read(path: Path, clients: int) -> list[tuple[int, int, int]]:
    """The rows (client, from, to) of a trace file. Raises ScenarioError with file and line for the first bad one."""
    return files.read(path, COLUMNS, FIELD, lambda record, where: _row(record, clients, where))


def merge(rows: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The same availability, sorted by client and time, with intervals that overlap or touch made one."""
    merged: list[tuple[int, int, int]] = []
    for client, begin, end in sorted(rows):
        if merged and merged[-1][0] == client and begin <= merged[-1][2]:
            merged[-1] = (client, merged[-1][1], max(end, merged[-1][2]))
        else:
            merged.append((client, begin, end))
    return merged


def _row(record: dict[str, Any], clients: int, where: str) -> tuple[int, int, int]:
    client = files.client(record, clients, FIELD, where)
    begin, end = (files.number(record, name, FIELD, where, int) for name in ("from", "to"))
    if not 0 <= begin < end <= _LAST:
        raise ScenarioError(FIELD, f"{where}: rounds must be 0 <= from < to, not from {begin} to {end}")
    return client, begin, end
