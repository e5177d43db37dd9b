"""`python -m tests.bench CASE... [--against flower,grid,pfl,bare,...]`, and `python -m tests.bench profile|memory|scaling CASE`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from tests.bench.cases import CASES
from tests.bench.contest import ROOT, Run, RunFailed, Settings, contest, overheads, scores
from tests.bench.machine import facts
from tests.bench.table import show_case, show_machine

PEERS = ("flower", "grid", "pfl", "bare", "crowded", "central")
NEEDS = {"flower": "flwr", "grid": "flwr", "pfl": "pfl"}


def main() -> int:
    """Entry point."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["profile"]:
        return _profile(arguments[1:])
    if arguments[:1] == ["memory"]:
        return _memory(arguments[1:])
    if arguments[:1] == ["scaling"]:
        return _scaling(arguments[1:])
    return _compare(arguments)


def _profile(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench profile", description="Where a round's time goes, in this process.")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--rounds", type=int, default=5, help="rounds over which the share of the steps is taken (%(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="0 = in this process; else what is profiled is the driver")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="FIELD=VALUE", help="as in `fedsim run`")
    args = parser.parse_args(arguments)
    from tests.bench.profile import profile

    profile(CASES[args.case], args.rounds, args.workers, tuple(args.overrides), Console())
    return 0


def _memory(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench memory", description="Whether memory grows with rounds.")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--rounds", type=int, default=500, help="rounds to run (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="0 = in this process (%(default)s)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="FIELD=VALUE", help="as in `fedsim run`")
    args = parser.parse_args(arguments)
    from tests.bench.memory import memory

    memory(CASES[args.case], args.rounds, args.workers, tuple(args.overrides), Console())
    return 0


def _scaling(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench scaling", description="Rounds an hour on a cluster: a model.")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--cohort", type=int, default=10_000, help="clients a round (%(default)s); the population only costs memory")
    parser.add_argument("--chunk", type=int, default=10, help="clients a chunk (%(default)s)")
    parser.add_argument("--gigabits", type=float, default=25, help="bandwidth of a node a second (%(default)s)")
    parser.add_argument("--chunk-seconds", type=float, help="what a chunk costs on one worker; the default is measured here")
    args = parser.parse_args(arguments)
    from tests.bench.scaling import scaling

    scaling(CASES[args.case], args.cohort, args.chunk, args.gigabits, args.chunk_seconds, Console(width=120))
    return 0


def _compare(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("cases", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--against", default="bare", help=f"comma-separated, of {', '.join(PEERS)} (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="our workers and Flower's actors; 0 = ours in one process (%(default)s)")
    parser.add_argument("--rounds", type=int, help="timed rounds of a run; the default is the case's own")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each contestant (%(default)s)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="FIELD=VALUE", help="ours only, as in `fedsim run`")
    parser.add_argument("--flower-python", default=sys.executable, metavar="PATH", help="an interpreter that has flwr[simulation]")
    parser.add_argument("--pfl-python", default=sys.executable, metavar="PATH", help="an interpreter that has pfl[pytorch]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write everything that was measured")
    args = parser.parse_args(arguments)
    peers = tuple(name for name in args.against.split(",") if name)
    pythons = {"flower": args.flower_python, "pfl": args.pfl_python}
    for name in peers:
        if name not in PEERS:
            parser.error(f"--against {name}: there are {', '.join(PEERS)}")
        if pythons.get(name) == sys.executable and importlib.util.find_spec(NEEDS[name]) is None:
            parser.error(
                f"{NEEDS[name]} is not installed here; give --{name}-python an environment that has it (see tests/bench/README.md)"
            )
    settings = Settings(peers, args.workers, args.repeats, args.rounds, tuple(args.overrides), pythons)
    return _contests(tuple(args.cases), settings, args.json)


def _contests(names: tuple[str, ...], settings: Settings, file: Path | None) -> int:
    console, machine = Console(width=None if sys.stdout.isatty() else 140), facts(ROOT)
    show_machine(console, machine)
    everything: list[Run] = []
    summary = []
    try:
        for name in names:
            runs = []
            for run in contest(CASES[name], settings):
                runs.append(run)
                everything.append(run)
                print(f"{name} {run['contestant']} {run['repeat'] + 1}/{settings.repeats}", file=sys.stderr, flush=True)
            table, extra = scores(runs), overheads(runs)
            show_case(console, CASES[name], runs, table, extra)
            summary.append({"case": name, "scores": [asdict(s) for s in table], "overheads": [asdict(e) for e in extra]})
    except RunFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if file is not None:  # also what was measured before a failure
            options = {key: value for key, value in asdict(settings).items() if key != "pythons"}
            file.write_text(json.dumps({"machine": machine, "settings": options, "summary": summary, "runs": everything}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
