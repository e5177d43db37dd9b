"""Whether memory grows with rounds: resident bytes of the driver and of each worker, over a long run.

Pages of Ray's object store count with every process that ever touched them, up to the size of the store; `own` leaves them out.
"""

from __future__ import annotations

import psutil
from rich.console import Console

from tests.bench.cases import Case
from tests.bench.ours import rows

WARM = 50
"""Rounds before the first reading: caches fill, allocators settle."""


def memory(case: Case, rounds: int, workers: int, settings: tuple[str, ...], console: Console) -> None:
    """Run a case and print what its processes hold after `WARM` rounds and at the end, in MiB."""
    with rows(case, rounds, workers, settings) as (training, about):
        first: dict[str, tuple[float, float]] = {}
        last: dict[str, tuple[float, float]] = {}
        for row in training:
            if row["round"] == WARM:
                first = _resident()
            if row["round"] == rounds - 1:
                last = _resident()
    console.rule(f"{case.name}, mode {about['mode']}, {workers} workers: resident MiB after {WARM} and after {rounds - 1} rounds")
    for name, before in first.items():
        for kind, early, late in zip(("all", "own"), before, last[name], strict=True):
            console.print(f"{name:<10} {kind}  {early:8.1f} {late:8.1f}  {100 * (late / early - 1):+.1f} %", highlight=False)


def _resident() -> dict[str, tuple[float, float]]:
    """MiB of this process and of its Ray workers that train: all, and without what they share."""
    driver = psutil.Process()
    workers = [p for p in driver.children(recursive=True) if p.name().startswith("ray::Worker")]
    named = {"driver": driver} | {f"worker {i + 1}": p for i, p in enumerate(sorted(workers, key=lambda p: p.pid))}
    infos = {name: process.memory_info() for name, process in named.items()}
    return {name: (info.rss / 2**20, (info.rss - info.shared) / 2**20) for name, info in infos.items()}
