"""The half of a Flower app that runs at the server: the scenario's rounds over nodes, with the run folder that a simulation writes.

    from fedsim.flower.server_app import server_app

    app = server_app(Path(__file__).with_name("scenario.yaml"))

What `flwr run -c "..."` may set:

    output="DIR"      the run folder, on the machine of the SuperLink; "" = runs/<name>/<time>
    resume=true       go on with the run in `output`, which must be named
    nodes=3           wait for so many nodes before the first round; 0 = until every client of the scenario is held by one
    wait=120.0        at most so many seconds
    poll=0.2          seconds between looks for answers
    patience=600.0    seconds after which an order without an answer counts as lost
    limit=0.0         reject updates longer than this; 0 = of any length
    quiet=false       print nothing
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsim import experiment, rng, session
from fedsim.console import Lines, Silent, terminal
from fedsim.engine import RunPort
from fedsim.entropy import SYSTEM
from fedsim.errors import FedsimError
from fedsim.fleet import Fleet
from fedsim.flower.nodes import Nodes
from fedsim.flower.orders import Order
from fedsim.flower.polling import look_soon
from fedsim.flower.port import FlowerPort
from fedsim.folder import Folder
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.runtime import Runtime
from fedsim.scenario import Phase, Scenario, load
from fedsim.sim.evaluate import Score, spread
from fedsim.sim.executor import Executor
from fedsim.trackers import tracked
from fedsim.world import World, keep_loaded

RUNTIME = "flower"
"""What the manifest calls a deployment."""


@dataclass(frozen=True)
class Settings:
    """What `flwr run -c` may set; see above."""

    output: str = ""
    resume: bool = False
    nodes: int = 0
    wait: float = 120.0
    poll: float = 0.2
    patience: float = 600.0
    limit: float = 0.0
    quiet: bool = False

    @staticmethod
    def of(config: dict[str, Any]) -> Settings:
        """From Flower's run configuration; what else is in there is not ours."""
        known = {f.name: type(getattr(Settings, f.name)) for f in fields(Settings)}
        return Settings(**{name: kind(config[name]) for name, kind in known.items() if name in config})


@dataclass(frozen=True)
class Deployed(Runtime):
    """Clients on Flower's nodes. What is the server's own (its test set, its proxy data) is evaluated here."""

    scenario: Scenario
    world: World
    nodes: Nodes
    limit: float | None
    executor: Executor

    def port(self, number: int, stage: Phase, problem: Problem, first: Params, before: Any) -> RunPort:
        port = FlowerPort(
            nodes=self.nodes,
            participation=self.scenario.fleet_of(stage).participation,
            labels=self.world.labels,
            strategy=stage.strategy,
            problem=problem,
            phase=number,
            blank=stage.strategy.memory(self.world.problem, first),
            key=rng.fold(self.scenario.seed, rng.FLEET),
            limit=self.limit,
        )
        if before is not None:
            port.continue_time(before)
        return port

    def score_clients(
        self, number: int, stage: Phase, problem: Problem, state: Any, shared: Params, port: Any
    ) -> tuple[dict[str, Score], dict[str, np.ndarray]]:
        self.nodes.look()
        message = state if stage.strategy.personal and state is not None else shared
        ids = np.flatnonzero(self.nodes.held & (self.nodes.tests > 0))
        frozen = problem.frozen if number else None
        order = Order(ids, message, None, int(problem.version), 0, number, self.nodes.clients, frozen)
        return spread(*self.nodes.evaluate(order, stage.strategy.registered_name))


def run(path: Path, grid: Grid, settings: Settings) -> Folder:
    """Run the scenario in a file over the nodes behind a grid, or go on with its run. Returns the run folder."""
    if settings.resume:
        if not settings.output:
            raise FedsimError("resume=true goes on with the run in `output`; name that, too: -c \"resume=true output='DIR'\"")
        folder = Folder.open(Path(settings.output))
        if folder.finished:
            raise FedsimError(f"this run is finished: {folder.path}")
        scenario, _ = load(folder.path / "scenario.yaml")
        world = session.take_up(scenario, folder, RUNTIME)
    else:
        scenario, _ = load(path)
        world, folder = session.begin(scenario, Path(settings.output) if settings.output else None, RUNTIME)
    try:
        _train(scenario, world, folder, Nodes(grid, world.data, settings.poll, settings.patience), settings)
    finally:
        folder.unlock()
    return folder


def _train(scenario: Scenario, world: World, folder: Folder, nodes: Nodes, settings: Settings) -> None:
    """All rounds, with a line for each that was evaluated."""
    if scenario.fleet != Fleet(participation=scenario.fleet.participation):
        print("latency, faults and channel are not simulated in a deployment: they are the world's own", flush=True)
    keep_loaded()
    nodes.gather(settings.nodes, settings.wait)
    world = over(world, nodes)
    display = Silent() if settings.quiet else Lines(terminal(), sum(stage.rounds for stage in scenario.stages()))

    def deployed(executor: Executor) -> Runtime:
        return Deployed(scenario, world, nodes, settings.limit or None, executor)

    try:
        with closing(experiment.train(scenario, world, folder, runtime=deployed)) as rows:
            for row in tracked(rows, scenario, folder.path):
                display.show(row)
    finally:
        display.close()


def over(world: World, nodes: Nodes) -> World:
    """The world of a run over nodes: noise of the operating system, sizes as nodes say, and no workers of its own."""
    sizes, calibration = world.problem.sizes, world.problem.calibration
    if any(description.own for description in nodes.said.values()):
        sizes = torch.from_numpy(np.where(nodes.held, nodes.sizes, sizes.numpy()).astype(np.float32))
        if calibration is not None:
            calibration = torch.from_numpy(np.where(nodes.held, nodes.calibration, calibration.numpy()).astype(np.float32))
    return replace(world, problem=replace(world.problem, entropy=SYSTEM, sizes=sizes, calibration=calibration), workers=0)


def server_app(scenario: Path) -> ServerApp:
    """The `ServerApp` of a scenario."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        look_soon()
        folder = run(scenario, grid, Settings.of(dict(context.run_config)))
        print(f"Run folder: {folder.path}", flush=True)

    return app
