"""`python -m tests.bench.unstale error|effort`: how well stale updates become fresh ones, and what it costs.

    error    cosine error of what stands in for a true update, over staleness: the stale update itself, its first-order compensation, and
             its inversion; and E2 / E1, above 1 where inversion is nearer than the stale update, in the distance that `unstale` switches by
    effort   iterations and seconds to a tolerance, by the share of entries that is matched, from a random start and from the last result

A run of FedAvg is recorded, as in scenarios/papers/unstale.yaml with `--set`, and some of the ten clients with the largest share of class 5
are looked at, at the versions `--at`. With `--late L` updates of those ten arrive L rounds late during the run, as in the paper; without,
they are fresh. The error of an estimate `a` of a change `b` is 1 - cos(a, b). One thread; seconds are those of the processor.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsim import rng
from fedsim.inversion import Search, Sent, distance, draw, invert, replay, sent_by
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.scenario import load
from fedsim.sim.executor import Inline
from fedsim.sim.port import SimPort
from fedsim.statistics import summary
from fedsim.strategy import NOTHING
from fedsim.tree import stack
from fedsim.types import Job
from fedsim.world import World, build
from strategies.compensation import compensate
from strategies.unstale import Unstale

FILE = Path(__file__).parents[2] / "scenarios" / "papers" / "unstale.yaml"
AFFECTED = 5


class Recording:
    """A run of FedAvg, all its models, and the clients that are looked at."""

    def __init__(self, assignments: tuple[str, ...], clients: int, late: int, rounds: int):
        self.scenario, _ = load(FILE, assignments)
        assert isinstance(self.scenario.strategy, Unstale)
        self.strategy = self.scenario.strategy
        self.world: World = build(self.scenario)
        self.problem: Problem = replace(self.world.problem, taped=False)
        self.program = self.strategy.local
        world, seed = self.world, self.scenario.seed
        assert world.labels is not None
        share = world.labels[:, AFFECTED] / world.labels.sum(1).clip(min=1) * (world.labels[:, AFFECTED] >= 20)
        holders = np.argsort(-share, kind="stable")[:10]
        self.clients = np.sort(holders[:clients])
        self.port = SimPort(
            Inline(world.trainer()),
            self.scenario.fleet,
            world.labels,
            world.data.sizes,
            NOTHING,
            None,
            rng.fold(seed, rng.FLEET),
        )
        self.path = [world.w]
        for t in range(rounds):
            self.port.begin()
            ids = self.port.idle()
            behind = np.isin(ids, holders) & (t >= late > 0)
            parts = [self.change(ids[~behind], t), self.change(ids[behind], t - late)] if behind.any() else [self.change(ids, t)]
            changes = torch.cat([part.flat() for part in parts if part is not None])
            self.path.append(world.w.from_flat(self.path[-1].vector() + changes.mean(0)))

    def change(self, ids: np.ndarray, version: int) -> Params | None:
        """What clients make of the model of a version, `[C, ...]`."""
        if not len(ids):
            return None
        self.port.send(Job(ids, self.path[version], self.program), version, rng.fold(self.scenario.seed, rng.CLIENT, version))
        self.port.wait(None, math.inf, step=False)
        updates = self.port.recv(version, None, recall=False).updates
        assert updates is not None
        changes: Params = updates.payload
        return changes

    def changes(self, versions: list[int]) -> Params:
        """What the chosen clients make of some models, `[versions * clients, ...]`."""
        parts = [self.change(self.clients, version) for version in versions]
        return Params({name: torch.cat([part[name] for part in parts if part is not None]) for name in self.world.w})

    def correct(self, version: int) -> tuple[float, float]:
        """Accuracy of a model on the affected class and overall."""
        x, y = self.world.data.test_x, self.world.data.test_y
        with torch.no_grad():
            right = (self.problem.output(self.path[version], x).argmax(1) == y).float()
        return float(right[y == AFFECTED].mean()), float(right.mean())


def error(a: Params, b: Params) -> Tensor:
    """`1 - cos` of each row. `[U]`."""
    return 1 - torch.nn.functional.cosine_similarity(a.flat(), b.flat(), dim=1)


def searches(rec: Recording, pairs: list[tuple[int, int]]) -> tuple[Params, Params, Params, Sent]:
    """Of pairs (version began with, version now): models began with, models now, stale changes, and what a server knows; all stacked."""
    count = len(rec.clients)
    began, now = ([version for pair in pairs for version in [pair[i]] * count] for i in (0, 1))
    started, current = (Params(stack([rec.path[v] for v in versions])) for versions in (began, now))
    stale = rec.changes([pair[0] for pair in pairs])
    n = rec.world.data.sizes[torch.from_numpy(rec.clients)].repeat(len(pairs))
    return started, current, stale, sent_by(rec.program, started, torch.tensor(began), n, stale)


Row = dict[str, float]


def fates(rec: Recording, tau: int, args: argparse.Namespace) -> Row:
    """Means over clients and versions, of one seed and staleness."""
    search = Search(args.iterations, args.lr, args.tolerance, args.keep, args.norm)
    started, current, stale, sent = searches(rec, [(t - tau, t) for t in args.at])
    true = rec.changes(list(args.at))
    count = len(sent.steps)
    keys = rng.fold_each(rng.fold(rec.scenario.seed, rng.SERVER, tau), np.arange(count))
    clock = time.process_time()
    found = invert(rec.problem, rec.program, search, sent, draw(rec.problem, rec.world.w, args.examples, keys))
    seconds = (time.process_time() - clock) / count
    versions = torch.tensor(args.at).repeat_interleave(len(rec.clients))
    estimate = replay(rec.problem, rec.program, replace(sent, started=current, version=versions), found.guess)
    direct, first, inverted = (error(each, true) for each in (stale, compensate(stale, started, current, args.lam), estimate))
    return {
        "direct": float(direct.mean()),
        "first order": float(first.mean()),
        "inversion": float(inverted.mean()),
        "mismatch": float(found.lowest.mean()),
        "E2/E1": float(distance(stale, true).sum() / distance(estimate, true).sum()),
        "better": float((inverted < direct).float().mean()),
        "iterations": float(found.iterations.float().mean()),
        "seconds": seconds,
    }


def efforts(rec: Recording, keep: float, args: argparse.Namespace) -> Row:
    """Iterations and seconds of a search from a random start, and of one from its result, for each client's update `gap` rounds later."""
    search = Search(args.iterations, args.lr, args.tolerance, keep, args.norm)
    (tau,) = args.staleness[:1]
    _, _, _, before = searches(rec, [(t - tau - args.gap, t) for t in args.at])
    _, current, _, sent = searches(rec, [(t - tau, t) for t in args.at])
    count = len(sent.steps)
    guess = draw(rec.problem, rec.world.w, args.examples, rng.fold_each(rng.fold(rec.scenario.seed, rng.SERVER), np.arange(count)))
    earlier = invert(rec.problem, rec.program, search, before, guess).guess
    true, versions = rec.changes(list(args.at)), torch.tensor(args.at).repeat_interleave(len(rec.clients))
    row: Row = {}
    for name, start in (("cold", guess), ("warm", earlier)):
        clock = time.process_time()
        found = invert(rec.problem, rec.program, search, sent, start)
        estimate = replay(rec.problem, rec.program, replace(sent, started=current, version=versions), found.guess)
        row |= {
            f"{name} iterations": float(found.iterations.float().mean()),
            f"{name} reached": float((found.lowest <= args.tolerance).float().mean()),
            f"{name} seconds": (time.process_time() - clock) / count,
            f"{name} error": float(error(estimate, true).mean()),
        }
    return row


def show(title: str, values: list[object], rows: list[list[Row]]) -> None:
    """A table: a line for each value, means over seeds with half of the 95 % interval."""
    names = list(rows[0][0])
    print(" | ".join([f"{title:>9}", *(f"{name:>15}" for name in names)]))
    for value, row in zip(values, rows, strict=True):
        cells = []
        for name in names:
            found = summary([each[name] for each in row])
            cells.append(f"{found.mean:.3f}" + (f" ± {(found.interval[1] - found.interval[0]) / 2:.3f}" if found.interval else ""))
        print(" | ".join([f"{value!s:>9}", *(f"{cell:>15}" for cell in cells)]))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.unstale", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", choices=("error", "effort"))
    numbers = lambda kind: lambda text: [kind(value) for value in text.split(",")]  # noqa: E731
    parser.add_argument("--staleness", type=numbers(int), default=[5, 10, 20, 50], help="effort: the first of them")
    parser.add_argument("--at", type=numbers(int), default=[100, 160], help="versions at which updates arrive")
    parser.add_argument("--seeds", type=numbers(int), default=[1, 2, 3])
    parser.add_argument("--clients", type=int, default=3, help="how many are looked at (%(default)s)")
    parser.add_argument("--late", type=int, default=0, help="rounds by which holders of the class are late in the run itself (%(default)s)")
    parser.add_argument("--gap", type=int, default=10, help="effort: rounds between a client's updates (%(default)s)")
    parser.add_argument("--keeps", type=numbers(float), default=[1.0, 0.05], help="effort: shares that are matched")
    parser.add_argument("--lam", type=float, default=4.0, help="of first-order compensation (%(default)s)")
    for name in ("examples", "iterations", "lr", "norm", "tolerance", "keep"):
        default = Unstale.__dataclass_fields__[name].default
        parser.add_argument(f"--{name}", type=type(default), default=default, help="as the field of unstale (%(default)s)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="FIELD=VALUE", help="as in `fedsim run`")
    args = parser.parse_args()
    torch.set_num_threads(1)
    values: list[object] = list(args.staleness if args.part == "error" else args.keeps)
    rows: list[list[Row]] = [[] for _ in values]
    for seed in args.seeds:
        rec = Recording((*args.overrides, f"seed={seed}"), args.clients, args.late, max(args.at))
        known = ", ".join(f"{t}: {affected:.3f} of {overall:.3f}" for t in args.at for affected, overall in [rec.correct(t)])
        print(f"seed {seed}: clients {rec.clients.tolist()}; accuracy on class {AFFECTED} of overall, at {known}", flush=True)
        for value, row in zip(values, rows, strict=True):
            row.append(fates(rec, value, args) if args.part == "error" else efforts(rec, value, args))  # type: ignore[arg-type]
            print(f"  {value}: " + ", ".join(f"{name} {each:.4f}" for name, each in row[-1].items()), flush=True)
    show("staleness" if args.part == "error" else "keep", values, rows)


if __name__ == "__main__":
    main()
