"""Flower's `Grid` over simulated nodes in this process: an existing `ClientApp` runs as it is, with any Flower strategy, and repeats.

    grid = SimGrid("my_app.client_app:app", nodes=100, seed=1)
    result = grid.start(FedYogi(fraction_train=0.1), ArrayRecord(model.state_dict()), num_rounds=3)

or a whole app, with its own `ServerApp`: `grid.run_app("my_app.server_app:app")`.

Node i has the id i and the node configuration `partition-id=i num-partitions=N`, like a node of Flower's own simulation. Two runs give the
same bits: node ids are what they are, replies come sorted by node, and whatever server and clients draw from the global generators of
Python, NumPy and PyTorch starts at a key of (seed, turn, node). No Ray, no polling, no copy of a tensor.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from copy import copy
from typing import Any

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore.run import Run

from fedsim.errors import FedsimError
from fedsim.records import in_flower
from fedsim.rng import CLIENT, SERVER, fold

NodeConfig = dict[str, bool | int | float | str]


class SimGrid(Grid):
    """Simulated nodes that all run one `ClientApp`.

    Args:
        app: the app, or `module:app`.
        nodes: how many.
        seed: of everything that is drawn.
        run_config: what handlers see as `context.run_config`.
        node_config: what node i sees as `context.node_config`, in addition to its partition.
    """

    def __init__(
        self,
        app: ClientApp | str,
        nodes: int,
        *,
        seed: int = 0,
        run_config: NodeConfig | None = None,
        node_config: Callable[[int], NodeConfig] | None = None,
    ):
        self._app: ClientApp = found(app, ClientApp)
        self._seed, self._turn, self._sent = seed, 0, 0
        self._run_config = dict(run_config or {})
        self._run = Run.create_empty(1)
        self._waiting: dict[str, Message] = {}
        more = node_config or (lambda _: {})
        self._contexts = [
            Context(1, i, {"partition-id": i, "num-partitions": nodes, **more(i)}, RecordDict(), self._run_config) for i in range(nodes)
        ]

    def start(self, strategy: Strategy, *args: Any, **kwargs: Any) -> Result:
        """`strategy.start` on this grid: initial arrays, `num_rounds` and so on as Flower takes them."""
        with in_flower(fold(self._seed, SERVER), quiet=False):
            return strategy.start(self, *args, **kwargs)

    def run_app(self, app: ServerApp | str) -> Context:
        """Run a `ServerApp`, or `module:app`, on this grid. Returns its context, where it may have left something."""
        context = Context(1, SUPERLINK_NODE_ID, {}, RecordDict(), self._run_config)
        with in_flower(fold(self._seed, SERVER), quiet=False):
            found(app, ServerApp)(self, context)
        return context

    def context(self, node: int) -> Context:
        """What a node remembers, and its configuration."""
        return self._contexts[node]

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return list(range(len(self._contexts)))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            if not 0 <= message.metadata.dst_node_id < len(self._contexts):
                raise FedsimError(f"a message is for node {message.metadata.dst_node_id}, and there are {len(self._contexts)} nodes")
            self._sent += 1
            message.metadata.__dict__["_message_id"] = name = str(self._sent)
            self._waiting[name] = message
            ids.append(name)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to these messages. Nodes work when they are asked for their reply, sorted by node."""
        mine = [self._waiting.pop(name) for name in message_ids if name in self._waiting]
        self._turn += bool(mine)
        mine.sort(key=lambda message: (message.metadata.dst_node_id, int(message.metadata.message_id)))
        return [self._reply(message) for message in mine]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _reply(self, message: Message) -> Message:
        """What a node answers; one that raises answers with an error, as in Flower."""
        node = message.metadata.dst_node_id
        key = fold(self._seed, CLIENT, self._turn, node)
        with in_flower(key, quiet=False), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(fold(key, 3) & 0x7FFFFFFFFFFFFFFF)
            try:
                reply = self._app(_apart(message), self._contexts[node])
            except Exception as error:  # whatever an app may raise
                return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error).__name__}: {error}"), reply_to=message)
        return _apart(reply)


def _apart(message: Message) -> Message:
    """A message whose records are its own: one is shared by all that a server sends, and either side may take it apart."""
    if not message.has_content():
        return message
    own = copy(message)
    own.__dict__["_content"] = RecordDict({name: record.copy() for name, record in message.content.items()})
    return own


def found(app: Any, kind: type) -> Any:
    """An app, or the one that `module:app` names."""
    if isinstance(app, str):
        module, _, name = app.partition(":")
        try:
            app = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise FedsimError(f"'{app}' names no {kind.__name__}; write 'module:app': {error}") from error
    if not isinstance(app, kind):
        raise FedsimError(f"a {kind.__name__} is needed, and this is a {type(app).__name__}")
    return app
