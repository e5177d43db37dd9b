"""A Flower grid whose nodes are in this process: messages take the way through Flower's own bytes, and answers may be spoilt."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

Spoil = Callable[[int, int, RecordDict], Any]


@dataclass
class NearNode:
    """A node: its app, its context, and how many messages it has seen."""

    app: ClientApp
    context: Context
    seen: int = 0
    gone: bool = False


@dataclass
class NearGrid(Grid):
    """Nodes number 100, 101, ...: `configs` are their `--node-config`.

    Attributes:
        app: what runs on each.
        spoil: given a node, the number of its training order (from 0) and its answer, what arrives instead: records, an `Error`, or None.
    """

    app: ClientApp
    configs: list[dict[str, Any]]
    spoil: Spoil = lambda node, turn, records: records
    answers: dict[str, Message] = field(default_factory=dict)
    pushed: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.nodes = {100 + i: self.node(100 + i, config) for i, config in enumerate(self.configs)}
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def node(self, number: int, config: dict[str, Any]) -> NearNode:
        return NearNode(self.app, Context(run_id=1, node_id=number, node_config=config, state=RecordDict(), run_config={}))

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise AssertionError("deprecated")

    def get_node_ids(self) -> set[int]:
        return {number for number, node in self.nodes.items() if not node.gone}

    def push_messages(self, messages: Any) -> list[str]:
        numbers = []
        for message in messages:
            number = str(len(self.pushed))
            message.metadata.__dict__["_message_id"] = number
            self.pushed.append(message)
            numbers.append(number)
            if (answer := self._answer(message)) is not None:
                self.answers[number] = answer
        return numbers

    def _answer(self, message: Message) -> Message | None:
        node = self.nodes[message.metadata.dst_node_id]
        if node.gone:
            return Message(Error(5, "gone"), reply_to=message)
        try:
            reply = node.app(message, node.context)
        except Exception as error:
            return Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=message)
        if not message.metadata.message_type.startswith("train"):
            return reply
        turn, node.seen = node.seen, node.seen + 1
        found = self.spoil(message.metadata.dst_node_id, turn, reply.content)
        return None if found is None else Message(found, reply_to=message)

    def pull_messages(self, message_ids: Any) -> list[Message]:
        return [self.answers.pop(number) for number in list(message_ids) if number in self.answers]

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
        raise AssertionError("polls too slowly")
