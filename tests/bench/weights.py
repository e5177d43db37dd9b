"""`python -m tests.bench.weights [PART...]`: what the strategies that weigh clients cost on the server. Parts: server, proxy, many, table.

    server   one round of FedAU beside FedAvg: 50 updates of 1.6 million parameters
    proxy    FedLAW's 40 proxy steps beside 40 plain forward-backward passes on the same batches; 50 clients, pfl's CNN
    many     FedAU's bookkeeping for a million clients, a thousand of them in a round
    table    FedVARP with 10,000 clients x 1.6 million parameters (64 GB if all take part): time and memory of rounds of 50, a checkpoint

One thread. Times are medians; alternatives take turns. `--rounds` is how many are timed.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fedsim.folder import Folder
from fedsim.params import Params
from fedsim.problem import Classification, Network, Problem
from fedsim.proxy import epoch
from fedsim.registry import lookup
from fedsim.rng import fold
from fedsim.scenario import load_plugins
from fedsim.strategy import Strategy
from fedsim.table import Storage
from fedsim.types import Arrivals, Batch, Updates
from tests.bench.cases import CASES, module

COHORT = 50


def problem_of(clients: int) -> tuple[Problem, Params]:
    """pfl's CNN (1,626,442 parameters), 200 images as proxy data."""
    net = module(CASES["pfl-cifar10"]).eval()
    w = Params({name: value.detach() for name, value in net.named_parameters()})
    proxy = Batch(torch.randn(200, 3, 32, 32), torch.arange(200) % 10)
    return Problem(Network(net), Classification(10), torch.full((clients,), 50.0), proxy=proxy), w


def arrivals(ids: torch.Tensor) -> Arrivals:
    """Clients with 50 examples each."""
    return Arrivals(ids, torch.full((len(ids),), 50.0), torch.zeros_like(ids), torch.zeros_like(ids))


def updates_of(w: Params, ids: torch.Tensor) -> Updates:
    """Small random changes."""
    return Updates(arrivals(ids), w.map(lambda v: 0.01 * torch.randn(len(ids), *v.shape)))


def alternate(rounds: int, **tasks: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each task; they take turns, and each has a run before it counts."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for r in range(rounds + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if r:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def server(rounds: int) -> None:
    """FedAU beside FedAvg."""
    problem, w = problem_of(1000)
    updates = updates_of(w, torch.arange(COHORT))
    strategies = {name: lookup(Strategy, name)() for name in ("fedavg", "fedau", "fedvarp", "mifa")}
    states = {name: s.init(problem, w) for name, s in strategies.items()}
    tasks = {name: (lambda n=name: strategies[n].server(problem, states[n], updates, 0)) for name in strategies}
    seconds = alternate(rounds, **tasks)
    for name, value in seconds.items():
        print(f"server  {name:8} {1e3 * value:7.1f} ms   {value / seconds['fedavg']:.2f} x fedavg")


def proxy(rounds: int) -> None:
    """FedLAW's steps beside plain passes."""
    problem, w = problem_of(1000)
    problem = replace(problem, taped=True)
    assert problem.proxy is not None
    data = problem.proxy
    law = lookup(Strategy, "fedlaw")()
    updates, state = updates_of(w, torch.arange(COHORT)), law.init(problem, w)

    def plain() -> None:
        for e in range(law.epochs):
            for batch in epoch(data, law.batch_size, fold(0, e)):
                problem.grad(w, batch)

    seconds = alternate(rounds, plain=plain, fedlaw=lambda: law.server(problem, state, updates, 0))
    print(f"proxy   plain {seconds['plain']:.2f} s, the whole of fedlaw's round {seconds['fedlaw']:.2f} s: ", end="")
    print(f"{seconds['fedlaw'] / seconds['plain']:.2f} x")


def many(rounds: int) -> None:
    """FedAU's bookkeeping."""
    clients = 1_000_000
    w = Params({"w": torch.zeros(10)})
    problem = Problem(Network(torch.nn.Linear(10, 1)), Classification(2), torch.full((clients,), 2.0))
    known = replace(problem, rates=torch.full((clients,), 0.001))
    strategy = lookup(Strategy, "fedau")()
    state, weigh, apply, report = strategy.init(problem, w), [], [], []
    for t in range(rounds + 1):
        who, at = arrivals(torch.randperm(clients)[:1000].sort().values), problem.at(t)
        marks = [time.perf_counter()]
        total = Updates(who, Params({"w": torch.zeros(1000, 10)})).total(strategy.weigh(at, state, who))
        marks.append(time.perf_counter())
        before, state = state, strategy.apply(at, state, total, who, 0)
        marks.append(time.perf_counter())
        strategy.report(known.at(t), before, state, who)
        marks.append(time.perf_counter())
        for kept, a, b in zip((weigh, apply, report), marks, marks[1:], strict=False):
            kept.append(1e3 * (b - a))
    w_, a_, r_ = (statistics.median(kept[1:]) for kept in (weigh, apply, report))
    print(f"many    weigh {w_:.2f} ms, apply {a_:.2f} ms a round; the report on all million estimates {r_:.1f} ms")


def table(rounds: int) -> None:
    """FedVARP whose memories do not fit."""
    clients = 10_000
    problem, w = problem_of(clients)
    strategy = lookup(Strategy, "fedvarp")()
    with tempfile.TemporaryDirectory(dir=".") as place:
        folder = Folder(Path(place))
        problem = replace(problem, storage=Storage(folder=folder.path))
        state, seconds = strategy.init(problem, w), []
        for t in range(rounds):
            ids = torch.randperm(clients)[:COHORT].sort().values
            updates = updates_of(w, ids)
            start = time.perf_counter()
            state = strategy.server(problem.at(t), state, updates, 0)
            seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        folder.save(rounds, {"state": state}, keep=2)
        saving = time.perf_counter() - start
        checkpoint = sum(file.stat().st_size for file in (folder.path / "checkpoints").iterdir())
        on_disk = sum(file.stat().st_blocks * 512 for file in (folder.path / "tables").iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"table   {int(state.h.written.sum())} of {clients:,} clients written: {on_disk / 1e9:.1f} GB on disk, peak {peak:.2f} GiB of RAM"
    )
    print(
        f"table   {1e3 * statistics.median(seconds):.0f} ms a round on the server; checkpoint {checkpoint / 1e6:.0f} MB in {saving:.1f} s"
    )


PARTS = {"server": (server, 11), "proxy": (proxy, 3), "many": (many, 21), "table": (table, 20)}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.weights", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--rounds", type=int, help="timed rounds; the default is each part's own")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    load_plugins()
    for name in args.parts or PARTS:
        part, rounds = PARTS[name]
        part(args.rounds or rounds)


if __name__ == "__main__":
    main()
