"""F5. A scenario and the catalogue, described: what would run, how skewed the partition is, what can be named."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedsim.errors import FedsimError
from fedsim.registry import Kind, first_line
from fedsim.tree import nbytes

if TYPE_CHECKING:
    from fedsim.rng import Key
    from fedsim.scenario import Phase, Scenario
    from fedsim.world import World

MOST_ROWS = 20
"""Clients listed one by one; of a larger population, evenly chosen ones between the smallest and the largest."""


def facts(scenario: Scenario, world: World) -> dict[str, str]:
    """What would run, in words."""
    from fedsim import rng
    from fedsim.console import size
    from fedsim.data import count_steps
    from fedsim.world import expected_cohort

    data = world.data
    sizes = data.sizes.numpy().astype(int)
    key = rng.fold(scenario.seed, rng.FLEET)
    out = {
        "scenario": f"{scenario.name} (seed {scenario.seed})",
        "clients": f"{data.clients}, with {sizes.min()} to {sizes.max()} training examples "
        f"(median {int(np.median(sizes))}, {sizes.sum():,} in all)",
        "test set": f"{len(data.test_x):,} examples on the server, {data.client_test.sizes.sum():,} on the clients",
        "proxy set": f"{len(data.proxy.x):,} examples on the server" if data.proxy else "none",
        "input": "x".join(map(str, data.input_shape)) + f", {type(data.task).__name__.lower()} with {data.task.outputs} outputs",
        "model": f"{type(scenario.model).registered_name}, {world.whole.size:,} parameters ({size(nbytes(world.whole))})",
    }
    if world.adapt is not None:
        trained = sum(math.prod(shape) for shape in world.problem.network.adapters.values())
        out["adapters"] = f"{type(world.adapt).registered_name}, {trained:,} parameters that are trained and sent"
    for i, stage in enumerate(world.ledger.stages):
        strategy, program = stage.strategy, stage.strategy.local
        steps = count_steps(program, sizes) * len(program.passes)
        label = "strategy" if scenario.phases is None else f"phase {i + 1}"
        out[label] = f"{type(strategy).registered_name} over {type(program).registered_name}, {stage.rounds} rounds"
        w = world.enter(stage, None)[1]
        if names := strategy.owned(world.problem, w):
            own = sum(w[name].numel() for name in names)
            out[f"{label}, own"] = f"{own:,} of {w.size:,} parameters stay with their client: {', '.join(names)}"
        down, up = _message_bytes(stage, world, key)
        cohort = expected_cohort(scenario, data.clients, world.labels, stage)
        out[f"{label}, a round"] = (
            f"{cohort:.1f} clients, {steps.min()} to {steps.max()} steps each (mean {steps.mean():.1f}), "
            f"{size(down * cohort)} down, {size(up * cohort)} up"
        )
    where = f"{world.workers} Ray workers" if world.workers else "in this process"
    out["engine"] = f"{where}, {world.mode}, {world.problem.version.device.type}; about {world.seconds:,.0f} s of training on one core"
    return out


def _message_bytes(stage: Phase, world: World, key: Key) -> tuple[int, int]:
    """What one client receives and sends in a round, by starting its program and ending it without a step."""
    if not stage.strategy.asks:
        return 0, 0
    strategy = stage.strategy
    frozen, w = world.enter(stage, None)
    problem = replace(world.problem, frozen=frozen)
    (job, *_) = strategy.plan(problem, strategy.init(problem, w), np.arange(1), key)
    carry = job.program.begin(problem, job.message, strategy.memory(problem, w))
    reply = job.program.finish(problem, job.message, carry, world.data.sizes[0])
    return nbytes(job.message), nbytes(reply.payload)


def skew(world: World) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """The spread of sizes and labels over clients, as table rows and a header. Rows are sorted by size."""
    data = world.data
    sizes = data.sizes.numpy().astype(int)
    order = np.argsort(-sizes, kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, min(MOST_ROWS, len(order))).round().astype(int)]
    counts = world.labels
    if counts is None or counts.shape[1] > 12:
        return [(data.names[i], str(sizes[i])) for i in chosen], ("client", "examples")
    header = ("client", "examples", *(f"y={k}" for k in range(counts.shape[1])))
    return [(data.names[i], str(sizes[i]), *(str(c) if c else "·" for c in counts[i].astype(int))) for i in chosen], header


def draw(world: World, file: Path) -> None:
    """Draw label counts (or sizes) over clients as stacked bars. Raises `FedsimError` where the file cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    data = world.data
    counts = world.labels
    if counts is None:
        counts = data.sizes.numpy()[:, None]
    clients = np.arange(data.clients)
    figure, axes = plt.subplots(figsize=(min(14, 5 + data.clients / 12), 4), layout="constrained")
    classes = counts.shape[1]
    palette = plt.get_cmap("tab10" if classes <= 10 else "tab20" if classes <= 20 else "turbo")
    colours = [palette(k if classes <= 20 else k / (classes - 1)) for k in range(classes)]
    bottom = np.zeros(data.clients)
    for k in range(classes):
        label = f"label {k}" if 1 < classes <= 20 else None
        axes.bar(clients, counts[:, k], bottom=bottom, width=0.9, color=colours[k], label=label)
        bottom += counts[:, k]
    axes.set(xlabel="client", ylabel="training examples", xlim=(-0.6, data.clients - 0.4), ylim=(0, 1.05 * bottom.max()))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.set_title("How the training data are spread over clients")
    axes.spines[["top", "right"]].set_visible(False)
    if 1 < classes <= 20:
        figure.legend(loc="outside right center", frameon=False)
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise FedsimError(f"{file}: cannot be drawn: {error}") from None
    finally:
        plt.close(figure)


def catalogue(kind: str) -> list[tuple[str, str]]:
    """Names and first docstring lines of what a scenario can name; of scenarios and studies, their first comment."""
    from fedsim.bundle import bundled, bundled_studies
    from fedsim.trackers import available

    if kind in {"scenarios", "studies"}:
        return [(name, _first_comment(path)) for name, path in (bundled() if kind == "scenarios" else bundled_studies()).items()]
    if kind == "trackers":
        return [(name, f"Copies every row of a run there ({where}).") for name, where in available().items()]
    choices = _kinds()[kind].choices
    return [(name, first_line(cls)) for name, cls in sorted(choices.items())]


def _kinds() -> dict[str, type[Kind]]:
    from fedsim.conformal import Score, Target
    from fedsim.data import Partition, Source
    from fedsim.fleet import Modulation, Participation, Rates
    from fedsim.local import Schedule
    from fedsim.models import Model
    from fedsim.pace import Pace
    from fedsim.scenario import load_plugins
    from fedsim.strategy import LocalProgram, Strategy

    load_plugins()
    return {
        "strategies": Strategy,
        "programs": LocalProgram,
        "models": Model,
        "data": Source,
        "partitions": Partition,
        "participation": Participation,
        "rates": Rates,
        "modulations": Modulation,
        "schedules": Schedule,
        "paces": Pace,
        "scores": Score,
        "targets": Target,
    }


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
