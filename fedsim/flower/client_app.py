"""The half of a Flower app that runs on a node: it does for the server what the scenario's clients do, on this node's data.

    from fedsim.flower.client_app import client_app

    app = client_app(Path(__file__).with_name("scenario.yaml"))

Which clients a node holds, and which data, its `--node-config` says:

    partition-id=0 num-partitions=3            clients 0, 3, 6, ... of the scenario's partition
    clients="0,4,7"                            these
    partition-id=5 data="/path/of/mine.npz"    client 5, with data of its own: a file, or module:function returning a fedsim.data.Dataset
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsim.flower.device import Device, Store
from fedsim.flower.orders import CALIBRATE, DESCRIBE, EVALUATE, TRAIN, Order
from fedsim.scenario import load
from fedsim.world import keep_loaded

_DEVICES: dict[tuple[str, tuple[tuple[str, Any], ...]], Device] = {}
"""Built once in a process: a node that keeps one at work does not load its data anew for each message."""


def device_of(scenario: Path, node: dict[str, Any]) -> Device:
    """The device of a node, by the text of its scenario and its configuration."""
    which = scenario.read_text(encoding="utf-8"), tuple(sorted(node.items()))
    if which not in _DEVICES:
        _DEVICES.clear()
        _DEVICES[which] = Device.of(load(scenario)[0], node)
        keep_loaded()
    return _DEVICES[which]


def client_app(scenario: Path, device_of: Callable[[Path, dict[str, Any]], Device] = device_of) -> ClientApp:
    """The `ClientApp` of a scenario; `device_of` says what a node has in memory."""
    app = ClientApp()

    def action(kind: str) -> tuple[Any, ...]:
        return tuple(kind.split(".")[1:])

    @app.query(*action(DESCRIBE))
    def describe(message: Message, context: Context) -> Message:
        return Message(device_of(scenario, context.node_config).describe().records(), reply_to=message)

    def train(message: Message, context: Context) -> Message:
        device, store = device_of(scenario, context.node_config), _store(context)
        return Message(device.train(Order.of(message.content), store).records(), reply_to=message)

    app.train(*action(TRAIN))(train)
    app.train(*action(CALIBRATE))(train)

    @app.evaluate(*action(EVALUATE))
    def evaluate(message: Message, context: Context) -> Message:
        device, store = device_of(scenario, context.node_config), _store(context)
        return Message(device.evaluate(Order.of(message.content), store).records(), reply_to=message)

    return app


def _store(context: Context) -> Store:
    return context.state
