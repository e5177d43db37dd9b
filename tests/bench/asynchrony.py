"""`python -m tests.bench.asynchrony`: training examples per wall-clock second of asynchronous rounds, beside synchronous ones.

The scenario papers/fedbuff (a perceptron on Fashion-MNIST, devices with a heavy tail) with the same strategy and three paces: ten clients a
round, and twenty always at work with a buffer of ten and of one. The runs take turns, a slice of rounds each, in one process or on
`--workers` Ray workers; what is timed is training and aggregation, not evaluation. Laziness is what the ratio is about: jobs train
together when the first of them is due, also those of several rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedsim.bundle import find
from fedsim.experiment import train
from fedsim.folder import Folder
from fedsim.scenario import load
from fedsim.world import build

PACES = {
    "sync, 10 a round": ("{name: sync, cohort: 10}", 1),
    "buffered, 20 at work, buffer 10": ("{name: buffered, concurrency: 20, buffer: 10}", 1),
    "buffered, 20 at work, buffer 1": ("{name: buffered, concurrency: 20, buffer: 1}", 10),
}
"""Paces, and how many of their rounds have about as many updates as one of the first."""


def main() -> None:
    """Time the paces and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--slices", type=int, default=10, help="how often the paces take turns (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of ten updates in a slice (%(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="Ray workers; 0 = in this process (%(default)s)")
    args = parser.parse_args()
    speeds: dict[str, list[float]] = {name: [] for name in PACES}
    with ExitStack() as stack:
        runs = {}
        for name, (pace, many) in PACES.items():
            total = many * args.rounds * (args.slices + 2)
            changes = (f"pace={pace}", f"rounds={total}", f"evaluate.every={10**6}", f"output.checkpoint={10**6}")
            scenario, _ = load(find("papers/fedbuff"), (*changes, f"engine.workers={args.workers}"))
            folder = Folder(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            runs[name] = stack.enter_context(closing(train(scenario, build(scenario), folder)))
            list(islice(runs[name], 1 + many * args.rounds))  # not counted: queues fill
        for _ in range(args.slices):
            for name, (_, many) in PACES.items():
                begin = time.perf_counter()
                examples = sum(row["examples"] for row in islice(runs[name], many * args.rounds))
                speeds[name].append(examples / (time.perf_counter() - begin))
    table = Table("pace", "examples per second", "÷ sync (median of slices)")
    base = speeds[next(iter(PACES))]
    for name, each in speeds.items():
        ratio = [a / b for a, b in zip(each, base, strict=True)]
        table.add_row(name, f"{statistics.median(each):,.0f}", f"{statistics.median(ratio):.2f} ({min(ratio):.2f}..{max(ratio):.2f})")
    Console().print(table)


if __name__ == "__main__":
    main()
