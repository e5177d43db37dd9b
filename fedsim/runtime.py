"""F5. Where a scenario's clients are. A run is told nothing else of it: the same rounds, the same rows and the same folder follow.

`Simulated` is the platform's own fleet; `fedsim.flower.server_app.Deployed` has clients on other machines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim import rng
from fedsim.conformal import calibration_sizes
from fedsim.engine import RunPort
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.scenario import Phase, Scenario
from fedsim.sim.evaluate import Score, evaluate_clients
from fedsim.sim.executor import Executor
from fedsim.sim.port import SimPort
from fedsim.table import Storage
from fedsim.world import World


class Runtime(ABC):
    """Where a scenario's clients are, and what evaluates on the server's own data."""

    executor: Executor

    @abstractmethod
    def port(self, number: int, stage: Phase, problem: Problem, first: Params, before: Any) -> RunPort:
        """The way to the clients in phase `number`, which trains `first` at its start. `before`: the port of the phase before, or None."""

    @abstractmethod
    def score_clients(
        self, number: int, stage: Phase, problem: Problem, state: Any, shared: Params, port: Any
    ) -> tuple[dict[str, Score], dict[str, np.ndarray]]:
        """The spread over clients of loss and accuracy on their own test data, and each client's, `[N]`, NaN where it has none.

        What is measured is `shared`, or what the strategy deploys to each client from `state`; these are None before the first round.
        """


@dataclass(frozen=True)
class Simulated(Runtime):
    """A simulated fleet, whose data are in this process or on Ray workers."""

    scenario: Scenario
    world: World
    executor: Executor
    storage: Storage

    def port(self, number: int, stage: Phase, problem: Problem, first: Params, before: Any) -> RunPort:
        scenario, world = self.scenario, self.world
        port = SimPort(
            executor=self.executor,
            fleet=scenario.fleet_of(stage),
            labels=world.labels,
            sizes=world.data.sizes if stage.strategy.local.reads == "train" else calibration_sizes(world.problem),
            blank=stage.strategy.memory(world.problem, first),
            chunk=None if scenario.engine.chunk == "auto" else scenario.engine.chunk,
            key=rng.fold(scenario.seed, rng.FLEET),
            storage=self.storage,
        )
        if before is not None:
            port.continue_clock(before)
            if stage.strategy.keeps and world.ledger.stages[number - 1].strategy.keeps:
                port.inherit(before)
        return port

    def score_clients(
        self, number: int, stage: Phase, problem: Problem, state: Any, shared: Params, port: Any
    ) -> tuple[dict[str, Score], dict[str, np.ndarray]]:
        personal = stage.strategy.personal and port is not None
        own: Callable[[int], Params] = lambda i: stage.strategy.deploy(state, port.memory_of(i))  # noqa: E731
        return evaluate_clients(self.executor, problem, own if personal else shared, self.world.data, self.scenario.evaluate.batch)
