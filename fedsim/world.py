"""F5. What a scenario builds before anything trains: data, model, first parameters, and an estimate of the work."""

from __future__ import annotations

import gc
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from fedsim import rng
from fedsim.conformal import ConformalStrategy
from fedsim.data import Federation, count_steps
from fedsim.errors import FedsimError, ScenarioError
from fedsim.fleet import Full, Uniform
from fedsim.ledger import Ledger, open_ledger
from fedsim.models import Adapt, Fitted, realise, trained, vmappable
from fedsim.pace import Buffered, Sync
from fedsim.params import Params
from fedsim.problem import Classification, Inputs, Network, Problem
from fedsim.scenario import Phase, Scenario
from fedsim.sim.chunk import Chunk
from fedsim.sim.cohort import Mode, Trainer, choose_mode, order
from fedsim.sim.footprint import Flops, footprint
from fedsim.sim.port import default_chunk
from fedsim.sim.process import settle
from fedsim.tree import stack
from fedsim.types import Batch

LONG = 30.0
"""Estimated seconds of training beyond which `workers: auto` starts Ray, which costs about ten seconds itself."""


WORKER = 500 << 20
"""Bytes that a worker takes up before it trains: the interpreter, PyTorch, and on a GPU its context."""

ADAPTERS = 1
"""Folded after the model's key, for initial adapters."""


@dataclass(frozen=True)
class World:
    """What a scenario builds before anything trains.

    Attributes:
        data: the federation, on the device and in the type of the engine.
        labels: training examples of each client and class, `[N, K]`, where there are classes.
        problem: what is learned.
        w: what the first phase trains, at the start: the model, or its adapters.
        whole: all parameters at the start, adapters included.
        ledger: the phases, with their noise, and the account of what they spend.
        mode: how chunks are executed.
        seconds: about how long all training would take on one core; for planning, no result depends on it.
        adapt: the adapters, or None.
        workers: Ray workers that the run gets; 0 = none, it stays in this process. No result depends on it either.
    """

    data: Federation
    labels: np.ndarray | None
    problem: Problem
    w: Params
    whole: Params
    ledger: Ledger
    adapt: Adapt | None
    mode: Mode
    seconds: float = 0.0
    workers: int = 0

    @property
    def device(self) -> str:
        """cpu or cuda."""
        return str(self.problem.version.device.type)

    def enter(self, stage: Phase, before: Params | None) -> tuple[Params | None, Params]:
        """What a phase has frozen, and what it trains at first, from the model that the phase before it left (None: it is the first)."""
        network = self.problem.network
        if self.adapt is None:
            return before, self.whole if before is None else before
        whole = self.whole if before is None else self.whole | before
        if stage.adapt:
            if before is None or not network.adapters.keys() <= before.keys():
                whole = self.adapt.begin(network.module, whole)
            return whole, trained(network.adapters, whole)
        dense = self.adapt.merged(network.module, whole)
        return None if before is None else dense, dense

    def leave(self, stage: Phase, frozen: Params | None, deployed: Params) -> Params:
        """The model that a phase leaves, from what it deployed."""
        return frozen | deployed if self.adapt is not None and stage.adapt and frozen is not None else deployed

    def final(self, model: Params) -> Params:
        """The model that a run ends with: adapters merged or kept, as the scenario says."""
        network = self.problem.network
        if self.adapt is not None and self.adapt.merge and network.adapters.keys() <= model.keys():
            return self.adapt.merged(network.module, model)
        return model

    def export(self, model: Params, folder: Path) -> None:
        """Write the adapters that a run ends with, where they are kept."""
        network = self.problem.network
        if self.adapt is not None and not self.adapt.merge and network.adapters.keys() <= model.keys():
            self.adapt.export(folder, network.module, model)

    def trainer(self, compile: bool = False) -> Trainer:
        """What trains and evaluates, in this process or on a worker."""
        data = self.data
        return Trainer(self.problem, data.x, data.y, data.train, self.mode, Batch(data.test_x, data.test_y), compile, data.calibration)


def build(scenario: Scenario) -> World:
    """Load and partition the data, make the model. Raises `ScenarioError` where the scenario asks for what the data do not give."""
    device = _device(scenario)
    dtype: torch.dtype = getattr(torch, scenario.engine.dtype)
    data = scenario.data.load(rng.fold(scenario.seed, rng.DATA))
    labels = data.label_counts()
    x, y, test_x, test_y = (_cast(t, device, dtype) for t in (data.x, data.y, data.test_x, data.test_y))
    data = replace(data, x=x, y=y, test_x=test_x, test_y=test_y)
    key = rng.fold(scenario.seed, rng.MODEL)
    vocabulary = len(data.vocabulary) or None
    adapter = scenario.model.adapt
    module, w, draws = realise(scenario.model, data.input_shape, data.x.dtype, data.task.outputs, vocabulary, key, data.task)
    fitted = Fitted(w, (), draws)
    if adapter is not None:
        zeros = torch.zeros((2, *data.input_shape), dtype=data.x.dtype)
        fitted = adapter.fit(module, w, zeros, rng.fold(key, ADAPTERS))
    module = module.to(device=device, dtype=dtype)
    whole = fitted.whole.to(device, dtype)
    proxy = None if data.proxy is None else Batch(_cast(data.proxy.x, device, dtype), _cast(data.proxy.y, device, dtype))
    version = torch.zeros((), device=device, dtype=torch.promote_types(dtype, torch.float32))
    calibration = torch.from_numpy(data.calibration.sizes.astype(np.float32)) if scenario.data.calibration else None
    network = Network(module, fitted.shapes)
    problem = Problem(network, data.task, data.sizes, fitted.draws, proxy, calibration, version=version, inputs=Inputs.of(x))
    size = problem.size if adapter is None else sum(whole[name].numel() for name in fitted.trained)
    mode = choose_mode(module, size, device) if scenario.engine.mode == "auto" else scenario.engine.mode
    ledger = Ledger(scenario.stages(), scenario.privacy, data.train.sizes, None, ())  # until `adapt` opens it
    return adapt(World(data, labels, problem, whole, whole, ledger, adapter, mode), scenario)


def adapt(world: World, scenario: Scenario, runs: int = 1) -> World:
    """The world of a scenario that has the same data, model, seed and engine as this one's: nothing is loaded again.

    `runs`: how many are to come in this world, this one among them. Workers that start once serve them all.
    """
    rates = _rates(scenario, world.data.clients, world.labels)
    ledger = open_ledger(scenario, world.data.train.sizes)
    for i, stage in enumerate(ledger.stages):
        if stage.strategy.local.protects() is not None and not vmappable(world.problem.network.module):
            raise ScenarioError("model", "recurrent layers give no gradient for each example, which the program clips; take a transformer")
        if "rates" in stage.strategy.needs and rates is None:
            where = "strategy" if scenario.phases is None else f"phases.{i}.strategy"
            raise ScenarioError(where, f"{stage.strategy.registered_name} {_UNKNOWN_RATES}")
        where = "strategy" if scenario.phases is None else f"phases.{i}.strategy"
        _check_owned(world, ledger.stages[: i + 1], where)
        if isinstance(stage.strategy, ConformalStrategy):  # before anything trains
            stage.strategy.check(world.problem, f"phases.{i}.strategy")
    target = scenario.evaluate.target
    if target is not None and (fault := target.fault(world.problem)):
        raise ScenarioError("evaluate.target", fault)
    scenario.fleet.latency.draw(world.data.clients, world.labels, rng.fold(scenario.seed, rng.FLEET))  # complains of what does not fit
    if isinstance(scenario.pace, Buffered) and scenario.pace.buffer > world.data.clients:
        few = f"{scenario.pace.buffer} updates, but there are only {world.data.clients} clients, and a buffer holds a client once"
        raise ScenarioError("pace.buffer", few)
    if scenario.evaluate.classes and not isinstance(world.data.task, Classification):
        raise ScenarioError("evaluate.classes", f"only a classification has classes, and this task is {type(world.data.task).__name__}")
    frozen, w = world.enter(ledger.stages[0], None)
    world = replace(world, problem=replace(world.problem, rates=rates, frozen=frozen), ledger=ledger, w=w)
    world = replace(world, seconds=_estimate(scenario, world))
    return replace(world, workers=_count_workers(scenario, world, runs))


def _check_owned(world: World, stages: tuple[Phase, ...], where: str) -> None:
    """Raise where the last of these phases wants parameters that there are not, or forgets what clients keep from the one before."""
    before, last = stages[-2] if len(stages) > 1 else None, stages[-1]
    try:
        names = last.strategy.owned(world.problem, world.enter(last, None)[1])
    except FedsimError as error:
        raise ScenarioError(f"{where}.own", str(error)) from None
    if before is None or not (before.strategy.keeps and last.strategy.keeps):
        return
    lost = sorted(set(before.strategy.owned(world.problem, world.enter(before, None)[1])) - set(names))
    if lost:
        raise ScenarioError(f"{where}.own", f"leaves out {lost[0]}, which clients keep from the phase before; let it cover that")


def _count_workers(scenario: Scenario, world: World, runs: int) -> int:
    """How many Ray workers `auto` means: none for little work, else as many as there are cores (or GPUs) and memory for."""
    engine = scenario.engine
    if engine.workers != "auto":
        return engine.workers
    if world.seconds * runs <= LONG:
        return 0
    each = WORKER + _chunk_bytes(scenario, world)
    if world.device == "cuda":
        free = [torch.cuda.mem_get_info(card)[0] for card in range(torch.cuda.device_count())]
        fitting = sum(0.9 * room >= each for room in free)  # one a card: two took 61 ms a round where one process took 27
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        fitting = min(cores // engine.threads, int(0.8 * psutil.virtual_memory().available) // each)
    return fitting if fitting > 1 else 0


def _chunk_bytes(scenario: Scenario, world: World) -> int:
    """What the largest clients take up while they train as one chunk, measured."""
    stage, key = next((stage for stage in world.ledger.stages if stage.strategy.asks), None), rng.fold(scenario.seed, rng.FLEET)
    if stage is None:
        return 0
    strategy = stage.strategy
    frozen, w = world.enter(stage, None)
    problem = replace(world.problem, frozen=frozen)
    sizes = world.data.sizes.numpy()
    count = min(len(sizes), _chunk_size(scenario, world, stage))
    largest = np.sort(np.argsort(-sizes, kind="stable")[:count])
    (job, *_) = strategy.plan(problem, strategy.init(problem, w), largest, key)
    ids = order(job.program, sizes, job.ids)
    memory = stack([strategy.memory(problem, w)] * len(ids))
    return footprint(replace(world.trainer(), problem=problem), job.program, job.message, Chunk(ids, 0, key, memory, None))


def _chunk_size(scenario: Scenario, world: World, stage: Phase) -> int:
    if scenario.engine.chunk != "auto":
        return scenario.engine.chunk
    return default_chunk(math.ceil(expected_cohort(scenario, world.data.clients, world.labels, stage)), world.mode, world.device)


_UNKNOWN_RATES = (
    "needs the true participation probability of each client, which is not known under this fleet and pace; take a participation other "
    "than a trace without repeat, the same in all phases, the pace 'sync' without over-selection and timeout, and a cohort limit with "
    "'full' or 'uniform' only"
)


def _rates(scenario: Scenario, clients: int, labels: np.ndarray | None) -> Tensor | None:
    """The share of rounds in which each client takes part, a mean over the run (over its first thousand rounds), or None if unknown."""
    if any(stage.participation is not None for stage in scenario.stages()):
        return None
    participation = scenario.fleet.participation
    state = participation.start(clients, labels, rng.fold(scenario.seed, rng.FLEET))
    rounds = min(1000, sum(stage.rounds for stage in scenario.stages()))
    total = np.zeros(clients)
    for t in range(rounds):
        p = participation.probability(state, t)
        if p is None:
            return None
        total += p
    rates = total / rounds
    pace = scenario.pace
    if not isinstance(pace, Sync) or pace.over_selection or pace.timeout:
        return None  # who is slow decides
    cohort = pace.cohort
    if cohort is not None and cohort < clients:
        if not isinstance(participation, (Full, Uniform)):
            return None  # who is left out depends on how many others are there
        rates *= min(1.0, cohort / rates.sum())
    return torch.from_numpy(rates.astype(np.float32))


def _estimate(scenario: Scenario, world: World) -> float:
    data, labels = world.data, world.labels
    with Flops() as counter, torch.no_grad():
        world.problem.output(world.w, data.x[:1])
    flops = float(counter.total)
    sizes = data.sizes.numpy()
    seconds = 0.0
    for stage in world.ledger.stages:
        program = stage.strategy.local
        steps = float(count_steps(program, sizes).mean()) * len(program.passes)
        batch = min(program.batch_size or math.inf, float(sizes.mean()))
        each = steps * (3 * flops * batch / 5e9 + 3e-4)  # 5 GFLOP/s and 0.3 ms a step: a slow core
        seconds += stage.rounds * stage.strategy.asks * expected_cohort(scenario, data.clients, labels, stage) * each
    return seconds


def expected_cohort(scenario: Scenario, clients: int, labels: np.ndarray | None, stage: Phase) -> float:
    """About how many clients take part in a round of a phase: the mean over the first few."""
    key, participation = rng.fold(scenario.seed, rng.FLEET), scenario.fleet_of(stage).participation
    state = participation.start(clients, labels, key)
    counts = []
    for t in range(10):
        available, state = participation.active(state, t, key)
        counts.append(float(available.sum()))
    return sum(map(scenario.pace.trained, counts)) / len(counts)


def keep_loaded() -> None:
    """For a process that does nothing but run a scenario: the garbage collector need not look through what has been loaded by now.

    Flower calls the collector whenever it converts arrays, and looking through PyTorch takes it a fifth of a second.
    """
    gc.collect()
    gc.freeze()


def _device(scenario: Scenario) -> str:
    if scenario.engine.device == "cuda" and not torch.cuda.is_available():
        raise ScenarioError("engine.device", "no CUDA device is available to PyTorch here; use cpu, or auto")
    device = scenario.engine.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settle(device, scenario.engine.precision)
    return device


def _cast(tensor: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
