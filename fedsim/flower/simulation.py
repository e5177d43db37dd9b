"""A scenario in Flower's own simulation, to compare: the client app of a deployment, one simulated node for each client, Ray underneath.

Strategy, client programs, keys and run folder are those of our simulation, and so are the numbers, to rounding. Who answers when is the
machine's own, so virtual time, faults and channels are refused; and noise is drawn by key, because it protects nobody here.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsim import experiment
from fedsim.console import Display
from fedsim.errors import FedsimError, ScenarioError
from fedsim.fleet import Fleet
from fedsim.flower.client_app import client_app
from fedsim.flower.device import Device
from fedsim.flower.nodes import Nodes
from fedsim.flower.orders import held_by
from fedsim.flower.server_app import Deployed
from fedsim.folder import Folder
from fedsim.runtime import Runtime
from fedsim.scenario import Scenario, dump_scenario, load
from fedsim.sim.executor import Executor
from fedsim.trackers import tracked
from fedsim.world import World, build

POLL = 0.02
"""Seconds between looks for answers, which are in this process."""

START = 600.0
"""Seconds that all nodes may take to say who they are."""

_WORLDS: dict[str, tuple[World, dict[int, Device]]] = {}
"""Of the scenario at hand, once in each of Ray's processes: its data, and the nodes that have worked here."""


def simulated_device(scenario: Path, node: dict[str, Any], encoding: str = "") -> Device:
    """The device of a node, whose data are resident in this process."""
    text = scenario.read_text(encoding="utf-8")
    if text not in _WORLDS:
        _WORLDS.clear()
        _WORLDS[text] = build(load(scenario)[0]), {}
    world, devices = _WORLDS[text]
    place = int(node["partition-id"])
    if place not in devices:
        clients = world.data.clients
        devices[place] = Device(load(scenario)[0], world, held_by(node, clients), False, clients)
    return devices[place]


def simulate(scenario: Scenario, world: World, folder: Folder, display: Display, interrupted: Callable[[], bool]) -> None:
    """Run a scenario in Flower's simulation, into a run folder that was begun. `engine.workers` is the number of its actors.

    Raises KeyboardInterrupt soon after it is `interrupted`. Nothing is at work any more when it returns or raises.
    """
    refuse(scenario)
    app = ServerApp()
    failed: list[BaseException] = []
    serving: list[threading.Thread] = []
    over = threading.Event()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        serving.append(threading.current_thread())  # Flower's, and it waits for it only while all goes well
        try:
            nodes = Nodes(grid, world.data, poll=POLL, stopped=lambda: over.is_set() or interrupted())
            _serve(scenario, replace(world, workers=0), folder, nodes, display)
        except BaseException as error:  # Flower would print it, and end as if nothing had been
            failed.append(error)

    with tempfile.TemporaryDirectory(prefix="fedsim-", ignore_cleanup_errors=True) as place:
        file = Path(place, "scenario.yaml")
        file.write_text(yaml.safe_dump(dump_scenario(scenario), sort_keys=False), encoding="utf-8")
        try:
            _run(app, client_app(file, simulated_device), world.data.clients, scenario.engine.workers, Path(place))
        finally:
            over.set()
            for thread in serving:
                thread.join()
    if failed:
        raise failed[0]


def refuse(scenario: Scenario) -> None:
    """Raise where a scenario asks for what Flower's simulation does not have."""
    if scenario.fleet != Fleet(participation=scenario.fleet.participation):
        raise ScenarioError("fleet", "Flower's simulation has neither latency nor faults nor a channel; leave them out to compare")
    if scenario.pace.paced != "sync":
        raise ScenarioError("pace", "Flower's simulation has no virtual time, so who is late is chance; only `sync` can be compared")


def _run(server: ServerApp, client: Any, nodes: int, workers: int | str, place: Path) -> None:
    """Flower's simulation, with its messages left out, and Ray ended."""
    import ray
    from flwr.simulation import run_simulation

    actors = workers if isinstance(workers, int) and workers > 0 else os.cpu_count() or 1
    init = {"address": "local", "num_cpus": actors, "log_to_driver": False, "logging_level": "ERROR", "_temp_dir": str(place / "ray")}
    config: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": init}
    logger, before = logging.getLogger("flwr"), logging.getLogger("flwr").level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated in favour of a command that needs a SuperLink beside us
            run_simulation(server, client, num_supernodes=nodes, backend_config=config)
    except RuntimeError as error:
        raise FedsimError(f"Flower's simulation failed: {error}; fedsim run --runtime simulation does not need it") from error
    finally:
        logger.setLevel(before)
        ray.shutdown()


def _serve(scenario: Scenario, world: World, folder: Folder, nodes: Nodes, display: Display) -> None:
    """All rounds, over the nodes."""
    nodes.gather(0, START)

    def over_nodes(executor: Executor) -> Runtime:
        return Deployed(scenario, world, nodes, None, executor)

    with closing(experiment.train(scenario, world, folder, runtime=over_nodes)) as rows:
        for row in tracked(rows, scenario, folder.path):
            display.show(row)
