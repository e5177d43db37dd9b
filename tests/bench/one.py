"""One contestant, one case, one run, in a process of its own: `python -m tests.bench.one CONTESTANT CASE --rounds R --out FILE`.

Runs in any environment that has the contestant; imports nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.bench.cases import CASES, Clock

CONTESTANTS = {
    "ours": ("tests.bench.ours", "measure"),
    "flower": ("tests.bench.flower", "measure"),
    "grid": ("tests.bench.grid", "measure"),
    "pfl": ("tests.bench.pfl", "measure"),
    "bare": ("tests.bench.bare", "measure"),
    "crowded": ("tests.bench.bare", "measure_crowded"),
    "central": ("tests.bench.bare", "measure_central"),
}
PACKAGES = ("fedsim", "torch", "numpy", "ray", "flwr", "pfl")


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--rounds", type=int, required=True, help="timed rounds; two more are run, one before and one after")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--spawned", type=float, default=time.time(), help="when the spawning process started this one")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    clock = Clock(args.spawned)
    clock.note("interpreter")
    name, function = CONTESTANTS[args.contestant]
    measure: Callable[..., dict[str, Any]] = getattr(importlib.import_module(name), function)
    result = measure(CASES[args.case], args.rounds + 2, args.workers, clock, tuple(args.settings))
    first, rounds = clock.seconds()
    result |= {"first": first, "rounds": rounds, "start_up": clock.notes, "python": platform.python_version(), "versions": versions()}
    args.out.write_text(json.dumps(result))
    sys.stdout.flush()


def versions() -> dict[str, str]:
    """Versions of the packages that matter, where they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
