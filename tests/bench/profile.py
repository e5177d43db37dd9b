"""Where a round's time goes: steps against everything else, by function (cProfile) and by operator (torch.profiler)."""

from __future__ import annotations

import cProfile
import io
import pstats
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from statistics import median
from typing import Any

from rich.console import Console
from torch.profiler import ProfilerActivity
from torch.profiler import profile as trace

from fedsim.local import Sgd
from fedsim.sim import cohort
from tests.bench.cases import Case
from tests.bench.ours import rows

TOP = 15


class Stopwatch:
    """Seconds spent inside a function, while it is being watched."""

    seconds = 0.0
    calls = 0


@contextmanager
def watched(*functions: tuple[Any, str]) -> Iterator[Stopwatch]:
    """Count the time spent in functions, each given as its owner (a class or a module) and its name."""
    watch, before = Stopwatch(), [(owner, name, getattr(owner, name)) for owner, name in functions]
    for owner, name, inner in before:
        setattr(owner, name, _timed(inner, watch))
    try:
        yield watch
    finally:
        for owner, name, inner in before:
            setattr(owner, name, inner)


def _timed(inner: Any, watch: Stopwatch) -> Any:
    @wraps(inner)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            watch.seconds += time.perf_counter() - start
            watch.calls += 1

    return timed


def profile(case: Case, rounds: int, workers: int, settings: tuple[str, ...], console: Console) -> None:
    """Run a case three times: for the share of the steps, under cProfile, and under torch's profiler."""
    _shares(case, rounds, workers, settings, console)
    _functions(case, workers, settings, console)
    _operators(case, workers, settings, console)


def _shares(case: Case, rounds: int, workers: int, settings: tuple[str, ...], console: Console) -> None:
    whole, inside, calls = [], [], 0
    with rows(case, rounds + 3, workers, settings) as (training, about):
        _skip(training, 2)
        for _ in range(rounds):
            with watched((Sgd, "step"), (cohort, "descend"), (cohort, "descend_alone")) as watch:
                start = time.perf_counter()
                next(training)
                whole.append(time.perf_counter() - start)
            inside.append(watch.seconds)
            calls = watch.calls
    total, steps = 1000 * median(whole), 1000 * median(inside)
    console.rule(f"{case.name}, mode {about['mode']}, {workers} workers: one round")
    if calls == 0:
        console.print(f"round {total:.1f} ms; no step was taken in this process, so their share is unknown", highlight=False)
        return
    rest = total - steps
    console.print(
        f"round {total:.1f} ms = {steps:.1f} ms of steps in {calls} calls + {rest:.1f} ms outside "
        f"({100 * rest / total:.0f} %, {rest / case.cohort:.3f} ms a client, {rest / case.cohort / case.steps:.4f} ms a client-step)",
        highlight=False,
    )


def _functions(case: Case, workers: int, settings: tuple[str, ...], console: Console) -> None:
    profiler = cProfile.Profile()
    with rows(case, 4, workers, settings) as (training, _):
        _skip(training, 2)
        profiler.enable()
        next(training)
        profiler.disable()
    for order, title in (("cumulative", "by time including callees"), ("tottime", "by own time")):
        text = io.StringIO()
        pstats.Stats(profiler, stream=text).strip_dirs().sort_stats(order).print_stats(TOP)
        table = text.getvalue().split("ncalls", 1)[-1].rstrip()
        console.rule(f"cProfile {title} (Python functions look slower than they are)")
        console.print("   ncalls" + table, highlight=False, markup=False, soft_wrap=True)


def _operators(case: Case, workers: int, settings: tuple[str, ...], console: Console) -> None:
    with rows(case, 4, workers, settings) as (training, _):
        _skip(training, 2)
        with trace(activities=[ProfilerActivity.CPU]) as tracer:
            next(training)
    console.rule("torch.profiler by own CPU time")
    report = tracer.key_averages().table(sort_by="self_cpu_time_total", row_limit=TOP, max_name_column_width=40)
    console.print(report, highlight=False, markup=False, soft_wrap=True)


def _skip(training: Iterator[Any], rounds: int) -> None:
    """Row 0 and the first rounds: warm-up."""
    for _ in range(1 + rounds):
        next(training)
