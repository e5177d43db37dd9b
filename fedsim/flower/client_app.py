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

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from fedsim.data.encoding import Encoding
from fedsim.flower.device import Device, Store
from fedsim.flower.orders import CALIBRATE, DESCRIBE, ENCODING, EVALUATE, TRAIN, Order
from fedsim.scenario import load
from fedsim.world import keep_loaded

_DEVICES: dict[tuple[str, str, tuple[tuple[str, Any], ...]], Device] = {}
"""Built once in a process: a node that keeps one at work does not load its data anew for each message."""


def device_of(scenario: Path, node: dict[str, Any], encoding: str) -> Device:
    """The device of a node, by the text of its scenario, its configuration, and what the server said of the data's encoding."""
    which = scenario.read_text(encoding="utf-8"), encoding, tuple(sorted(node.items()))
    if which not in _DEVICES:
        _DEVICES.clear()
        _DEVICES[which] = Device.of(load(scenario)[0], node, Encoding.read(encoding) if encoding else None)
        keep_loaded()
    return _DEVICES[which]


def client_app(scenario: Path, device_of: Callable[[Path, dict[str, Any], str], Device] = device_of) -> ClientApp:
    """The `ClientApp` of a scenario; `device_of` says what a node has in memory."""
    app = ClientApp()

    def action(kind: str) -> tuple[Any, ...]:
        return tuple(kind.split(".")[1:])

    def device(context: Context) -> Device:
        told = context.state.get(ENCODING)
        return device_of(scenario, context.node_config, str(told["text"]) if isinstance(told, ConfigRecord) else "")

    @app.query(*action(DESCRIBE))
    def describe(message: Message, context: Context) -> Message:
        if ENCODING in message.content:
            context.state[ENCODING] = message.content[ENCODING]
        return Message(device(context).describe().records(), reply_to=message)

    def train(message: Message, context: Context) -> Message:
        return Message(device(context).train(Order.of(message.content), _store(context)).records(), reply_to=message)

    app.train(*action(TRAIN))(train)
    app.train(*action(CALIBRATE))(train)

    @app.evaluate(*action(EVALUATE))
    def evaluate(message: Message, context: Context) -> Message:
        return Message(device(context).evaluate(Order.of(message.content), _store(context)).records(), reply_to=message)

    return app


def _store(context: Context) -> Store:
    return context.state
