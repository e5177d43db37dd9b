"""Whether memory grows with rounds: resident bytes of the driver and of each worker, over a long run."""

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
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        for row in training:
            if row["round"] == WARM:
                first = _resident()
            if row["round"] == rounds - 1:
                last = _resident()
    console.rule(f"{case.name}, mode {about['mode']}, {workers} workers: resident MiB after {WARM} and after {rounds - 1} rounds")
    for name, before in first.items():
        after = last.get(name, float("nan"))
        console.print(f"{name:<12} {before:8.1f} {after:8.1f}  {100 * (after / before - 1):+.1f} %", highlight=False)


def _resident() -> dict[str, float]:
    """MiB of this process and of its Ray workers that train."""
    driver = psutil.Process()
    workers = [p for p in driver.children(recursive=True) if p.name().startswith("ray::Worker")]
    named = {"driver": driver} | {f"worker {i + 1}": p for i, p in enumerate(sorted(workers, key=lambda p: p.pid))}
    return {name: process.memory_info().rss / 2**20 for name, process in named.items()}
