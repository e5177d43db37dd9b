"""How rounds would scale on a cluster: a model, from what a chunk costs here. `python -m tests.bench scaling CASE`.

    round = waves x chunk + chunks x dispatch + broadcast + reduction
    waves      ceil(chunks / workers): the last one may be half empty
    chunk      seconds from one chunk's answer to the next on one worker, measured
    dispatch   processor seconds of the driver for each chunk, measured: it hands out and takes in one at a time
    broadcast  model bytes / bandwidth x ceil(log2(nodes + 1)): nodes that have the message pass it on
    reduction  chunks x model bytes / bandwidth: every summed vector comes in through the driver's network

Workers are taken to be as fast as this machine's: with GPUs, put what a chunk costs there in with `--chunk-seconds`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fedsim import rng
from fedsim.sim.chunk import Chunk
from fedsim.sim.pool import RayPool
from fedsim.strategy import NOTHING
from fedsim.world import World, build
from tests.bench.cases import Case
from tests.bench.ours import load_case

WORKERS = (1, 2, 8, 64, 256, 1000)
PER_NODE = 8


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes of the pieces of a round."""

    chunk: float
    dispatch: float
    model: int


def predict(costs: Costs, cohort: int, size: int, workers: int, bandwidth: float) -> dict[str, float]:
    """Seconds of each part of a round of `cohort` clients in chunks of `size`."""
    chunks, nodes = math.ceil(cohort / size), math.ceil(workers / PER_NODE)
    return {
        "training": math.ceil(chunks / workers) * costs.chunk,
        "dispatch": chunks * costs.dispatch,
        "broadcast": costs.model / bandwidth * math.ceil(math.log2(nodes + 1)),
        "reduction": chunks * costs.model / bandwidth,
    }


def scaling(case: Case, cohort: int, size: int, gigabits: float, chunk_seconds: float | None, console: Console) -> None:
    """Measure the costs of a chunk of `size` clients, and print rounds an hour for growing numbers of workers."""
    costs = measure(case, size)
    if chunk_seconds is not None:
        costs = Costs(chunk_seconds, costs.dispatch, costs.model)
    console.print(
        f"{case.name}: a chunk of {size} clients {1000 * costs.chunk:.1f} ms, its dispatch {1000 * costs.dispatch:.2f} ms, "
        f"a model {costs.model / 1e6:.2f} MB; {cohort:,} clients a round, {gigabits:g} Gbit/s, {PER_NODE} workers a node",
        highlight=False,
    )
    table = Table("workers", "rounds an hour", "a round, s", "training", "dispatch", "broadcast", "reduction", "efficiency")
    alone = sum(predict(costs, cohort, size, 1, gigabits * 1e9 / 8).values())
    for workers in WORKERS:
        parts = predict(costs, cohort, size, workers, gigabits * 1e9 / 8)
        whole = sum(parts.values())
        shares = (f"{value:.3g}" for value in parts.values())
        table.add_row(f"{workers:,}", f"{3600 / whole:,.0f}", f"{whole:.3g}", *shares, f"{alone / whole / workers:.0%}")
    console.print(table)


def measure(case: Case, size: int) -> Costs:
    """What a chunk costs a worker, on a pool of one, and what it costs the driver meanwhile."""
    scenario = load_case(case)
    world, program = build(scenario), scenario.stages()[0].strategy.local
    chunks = [_chunk(world, np.arange(k * size, (k + 1) * size) % case.clients) for k in range(20)]
    pool = RayPool(world.trainer(), workers=1)
    try:
        pool.map("train", (program, world.w), chunks[:4])
        start = time.perf_counter()
        pool.map("train", (program, world.w), chunks)
        wall = time.perf_counter() - start
        short: Any = replace(program, steps=1)  # type: ignore[type-var]  # so that the driver has little time for anything else
        start = time.process_time()
        pool.map("train", (short, world.w), chunks)
        busy = time.process_time() - start
    finally:
        pool.close()
    return Costs(wall / len(chunks), busy / len(chunks), world.w.size * 4)


def _chunk(world: World, ids: np.ndarray) -> Chunk:
    return Chunk(np.unique(ids), 0, rng.fold(1), NOTHING, torch.ones(len(np.unique(ids))))
