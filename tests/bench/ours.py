"""The contestant that this is about: a case as a fedsim scenario, run as `fedsim run` runs it."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import fedsim
import strategies
from fedsim import experiment, rng
from fedsim.data import Dataset, Examples, Source
from fedsim.folder import Folder
from fedsim.problem import Classification
from fedsim.registry import register
from fedsim.scenario import Scenario, load
from fedsim.world import build
from tests.bench.cases import CASES, CLASSES, Case, Clock, images, module, parameters


@register("bench-images")
@dataclass(frozen=True)
class BenchImages(Source):
    """A benchmark case's images, made in memory."""

    case: str

    def load(self, root: Path, key: rng.Key) -> Dataset:
        case = CASES[self.case]
        data = images(case)
        owners = np.repeat(np.arange(case.clients), case.examples)
        train, test = Examples(data.x, data.y), Examples(data.test_x, data.test_y)
        return Dataset(Classification(CLASSES), train, test, owners, tuple(f"client {i}" for i in range(case.clients)))


def scenario_of(case: Case, rounds: int, workers: int) -> dict[str, Any]:
    """The case as a scenario: evaluated and checkpointed at the start and the end only."""
    never = 10**6
    participation = {"name": "uniform", "clients": case.cohort} if case.cohort < case.clients else {"name": "full"}
    return {
        "name": case.name,
        "seed": 1,
        "data": {"source": {"name": "bench-images", "case": case.name}, "partition": "natural"},
        "model": case.model,
        "fleet": {"participation": participation},
        "strategy": {"name": "fedavg", "local": {"name": "sgd", "lr": case.lr, "steps": case.steps, "batch_size": case.batch}},
        "rounds": rounds,
        "evaluate": {"every": never},
        "engine": {"workers": workers, "device": "cpu"},
        "output": {"checkpoint": never},
    }


def load_case(case: Case, rounds: int = 1, workers: int = 0, settings: tuple[str, ...] = ()) -> Scenario:
    """The case as a validated scenario."""
    with tempfile.TemporaryDirectory(prefix="fedsim-bench-") as place:
        file = Path(place, "scenario.yaml")
        file.write_text(json.dumps(scenario_of(case, rounds, workers)))
        return load(file, settings)[0]


@contextmanager
def rows(case: Case, rounds: int, workers: int, settings: tuple[str, ...] = ()) -> Generator[tuple[Any, dict[str, Any]]]:
    """The rows that a run yields, and what is to be known about it. Row 0 is the first model."""
    scenario = load_case(case, rounds, workers, settings)
    with tempfile.TemporaryDirectory(prefix="fedsim-bench-") as place:
        world = build(scenario)
        if world.w.size != parameters(module(case)):
            raise ValueError(f"{case.name}: fedsim's network has {world.w.size} parameters, the others' {parameters(module(case))}")
        folder = Folder.create(Path(place, "run"), scenario.name)
        folder.lock()
        experiment.start(scenario, world, folder)
        with closing(experiment.train(scenario, world, folder)) as training:
            yield training, {"mode": str(world.mode), "scenario": scenario}


def measure(case: Case, rounds: int, workers: int, clock: Clock, settings: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run `rounds` rounds on `workers` workers (0 = in this process); the clock is told when each one ends."""
    clock.note("imports")
    last: dict[str, Any] = {}
    with rows(case, rounds, workers, settings) as (training, about):
        clock.note("world")
        for last in training:
            if last["round"]:
                clock.tick()
            else:
                clock.note("executor and first evaluation")
    cores = max(1, workers) * about["scenario"].engine.threads
    return {"cores": cores, "loss": last["test.loss"], "mode": about["mode"], "settings": list(settings), "code": code()}


def code() -> str:
    """A hash of fedsim's source, so that runs before and after an edit are not taken for one."""
    digest = hashlib.sha256()
    for package in (fedsim, strategies):
        for file in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
