"""Any strategy of fedsim as one of Flower's: an existing Flower app changes one line.

    strategy = FedAvg(fraction_train=0.1)                              # before
    strategy = from_fedsim(FedAU(cutoff=50), fraction_train=0.1)       # after

The app's own `ClientApp` stays as it is: it replies with its model and `num-examples`. The update of a client is what it replied minus what
it was sent. A client is known by the `partition-id` in its metrics, if it sends one, else by its node's place among the node ids that were
there at the start. Replies are checked on arrival (names, dtypes, shapes, finiteness, one a client); what fails is rejected, counted and
named in the log, and the run goes on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy.strategy_utils import sample_nodes
from torch import Tensor, nn

from fedsim.errors import FedsimError
from fedsim.flower import wire
from fedsim.flower.wire import Malformed
from fedsim.params import Params
from fedsim.problem import Classification, Network, Problem, Regression, Task
from fedsim.rng import PLAN, SERVER, fold, generator
from fedsim.strategy import Strategy
from fedsim.tree import stack, tree_leaves
from fedsim.types import Arrivals, Batch, Updates

PARTITION = "partition-id"
"""What a reply's metrics may say of who sent it."""

LOG = logging.getLogger("flwr")


def from_fedsim(
    strategy: Strategy,
    *,
    clients: int | None = None,
    sizes: Sequence[int] | None = None,
    model: nn.Module | None = None,
    proxy: tuple[Tensor, Tensor] | None = None,
    task: Task | None = None,
    seed: int = 0,
    **settings: Any,
) -> FromFedsim:
    """A strategy of fedsim for `strategy.start(grid, ...)` in a `ServerApp`.

    Args:
        strategy: such as `FedAU(cutoff=50)`. Its `local` is not used: clients run the app's own code.
        clients: N, the population; None = the nodes that are there in the first round.
        sizes: training examples of each client `[N]`, for strategies that weigh the absent, too; None = learned from replies, and those
            that were never heard count as many as the mean of the others.
        model: the network, where the strategy computes with it (FedLAW).
        proxy: the server's own inputs and targets, for strategies that need them.
        task: what the model's output means; None = by the targets, a classification for whole numbers and a regression for real ones.
        seed: of whom is asked, and of whatever the strategy draws.
        settings: `fraction_train`, `min_available_nodes` and so on, as Flower's FedAvg takes them.

    Raises FedsimError where the strategy needs its own client program, or anything else that an app does not have.
    """
    name = strategy.registered_name
    if why := _unfit(strategy):
        raise FedsimError(f"{name} {why}; deploy its scenario instead, with the client app of fedsim: fedsim deploy")
    if "proxy" in strategy.needs and (model is None or proxy is None):
        raise FedsimError(f"{name} computes on data of the server's own: give from_fedsim(..., model=net, proxy=(inputs, targets))")
    batch = None if proxy is None else Batch(*proxy)
    if batch is not None and task is None:
        width = 1 if batch.y.ndim < 2 else int(batch.y.shape[1])
        task = Regression(width) if batch.y.is_floating_point() else Classification(int(batch.y.max()) + 1)
    count = len(sizes) if clients is None and sizes is not None else clients
    known = None if sizes is None else torch.tensor([float(n) for n in sizes])
    if known is not None and len(known) != count:
        raise FedsimError(f"from_fedsim(sizes=...) has {len(known)} numbers, for {count} clients")
    network = Network(model if model is not None else nn.Identity())
    problem = Problem(network, task or Regression(1), known if known is not None else torch.ones(count or 0), proxy=batch)
    return FromFedsim(strategy, problem, seed, count, known is not None, **settings)


def _unfit(strategy: Strategy) -> str | None:
    """Why a strategy does not go with clients that run any code."""
    if strategy.sends is not Params:
        return "sends its clients more than a model, which only its own client program understands"
    if tree_leaves(strategy.memory(_NOTHING, Params({"w": torch.zeros(1)}))):
        return "has clients remember something, by its own client program"
    if strategy.personal:
        return "gives each client a model of its own, by its own client program"
    if not strategy.asks:
        return "asks no client"
    if strategy.protects() is not None or strategy.local.protects() is not None:
        return "is private only by a mechanism whose account is kept with a scenario"
    if lacking := sorted(strategy.needs - {"proxy"}):
        return f"needs {', '.join(lacking)}, which a Flower app does not say"
    if "sync" not in strategy.paces:
        return "does not run in synchronous rounds, and Flower's `start` has no others"
    return None


_NOTHING = Problem(Network(nn.Identity()), Regression(1), torch.ones(1))


class FromFedsim(FedAvg):
    """What `from_fedsim` makes. Whom to ask, and evaluation, are FedAvg's; how to aggregate is the strategy's.

    Attributes:
        state: the strategy's, after the last round.
        rejected: how many replies were rejected so far, by reason.
    """

    def __init__(self, strategy: Strategy, problem: Problem, seed: int, clients: int | None, sized: bool, **settings: Any):
        super().__init__(**settings)
        self.strategy = strategy
        self.state: Any = None
        self.rejected: dict[str, int] = {}
        self._problem, self._seed, self._clients, self._sized = problem, seed, clients, sized
        self._heard = np.zeros(0)  # training examples of each client, 0 = never heard
        self._place: dict[int, int] = {}  # of each node: the client that it is taken for
        self._started: dict[int, Params] = {}  # what each node was sent
        self._like = Params({})
        self._sent = ArrayRecord()

    def summary(self) -> None:
        """Log what this is."""
        LOG.info("\t├──> fedsim's %s: %s", self.strategy.registered_name, self.strategy)
        super().summary()

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Ask some of the nodes, drawn by key."""
        if self.fraction_train == 0.0:
            return []
        wanted = max(int(len(list(grid.get_node_ids())) * self.fraction_train), self.min_train_nodes)
        _, there = sample_nodes(grid, self.min_available_nodes, wanted)  # waits until there are enough
        if self.state is None:
            self._begin(arrays, len(there))
        nodes = self._seat(there)
        ids = np.sort(generator(fold(self._seed, PLAN, server_round)).choice(sorted(nodes), min(wanted, len(nodes)), replace=False))
        self._sent, self._started = arrays, {}
        config["server-round"] = server_round
        messages = []
        for job in self.strategy.plan(self._problem.at(server_round - 1), self.state, ids, fold(self._seed, PLAN, server_round, 1)):
            own = ConfigRecord({**config, **self._asked_of(job.program)})
            record = RecordDict({self.arrayrecord_key: self._to_send(job.message), self.configrecord_key: own})
            self._started |= {nodes[int(i)]: job.message for i in job.ids}
            messages += [Message(record, nodes[int(i)], MessageType.TRAIN) for i in job.ids]
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, and let the strategy have the updates, sorted by client."""
        good, _ = self._check_and_log_replies(replies, is_train=True, validate=False)
        accepted: dict[int, tuple[Any, ...]] = {}  # by client: message, change, model it began with, number of examples
        for message in sorted(good, key=lambda each: each.metadata.src_node_id):
            try:
                client, *update = self._read(message)
                if client in accepted:
                    raise Malformed("came a second time")
                accepted[client] = (message, *update)
            except Malformed as error:
                LOG.warning("reply of node %d is rejected: %s", message.metadata.src_node_id, error)
                self.rejected[str(error)] = self.rejected.get(str(error), 0) + 1
        if not accepted:
            return None, None
        ids = sorted(accepted)
        messages, counts = [accepted[i][0] for i in ids], [accepted[i][3] for i in ids]
        arrivals = self._arrive(server_round - 1, ids, counts)
        began = stack([accepted[i][2] for i in ids]) if self.strategy.recalls else None
        updates = Updates(arrivals, stack([accepted[i][1] for i in ids]), began)
        problem, before = self._problem.at(server_round - 1), self.state
        self.state = self.strategy.server(problem, before, updates, fold(self._seed, SERVER, server_round))
        said = self.strategy.report(problem, before, self.state, arrivals)
        metrics = self._metrics([message.content for message in messages])
        metrics |= {f"server.{name}": value for name, value in said.items() if isinstance(value, float)}
        whole = self._whole(self.strategy.deploy(self.state, {}), messages, counts)
        return whole, MetricRecord(metrics | {"rejected": sum(self.rejected.values())})

    def _begin(self, arrays: ArrayRecord, count: int) -> None:
        """The first round: how many clients there are, and the initial model."""
        self._clients = self._clients or count
        self._heard = np.zeros(self._clients)
        tensors = {name: wire.decode(array, name) for name, array in arrays.items()}
        self._like = Params({name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()})
        if not self._sized:
            self._problem = replace(self._problem, sizes=torch.ones(self._clients))
        self.state = self.strategy.init(self._problem, self._like)

    def _seat(self, there: Iterable[int]) -> dict[int, int]:
        """The node of each client. A node stays who it was; one that is new is a client that no node has been, else one whose node left.

        Its reply may say otherwise. Nodes beyond the number of clients are not asked.
        """
        assert self._clients is not None
        nodes: dict[int, int] = {}
        for node in sorted(there):
            if node in self._place:
                nodes.setdefault(self._place[node], node)
        new, known = sorted(set(there) - set(nodes.values())), set(self._place.values())
        free = sorted(set(range(self._clients)) - set(nodes), key=lambda client: (client in known, client))
        for node, client in zip(new, free, strict=False):
            nodes[client], self._place[node] = node, client
        return nodes

    def _asked_of(self, program: Any) -> dict[str, float]:
        """What clients are told of the program that the strategy wants, as Flower's FedProx does."""
        due = self.strategy.local
        if program == due:
            return {}
        proximal = getattr(program, "proximal", None)
        if proximal is None or replace(program, proximal=getattr(due, "proximal", 0.0)) != due:
            name = self.strategy.registered_name
            raise FedsimError(f"{name} has its clients run {program}, which an app's own code does not; deploy its scenario instead")
        return {"proximal-mu": float(proximal)}

    def _to_send(self, w: Params) -> ArrayRecord:
        """The model, and whatever else the app's model has that is not real numbers, in the app's order."""
        return ArrayRecord({name: wire.encode(w[name]) if name in w else array for name, array in self._sent.items()})

    def _read(self, message: Message) -> tuple[int, Params, Params, float]:
        """Who replied, the update, what it began with, and the number of examples. Raises `Malformed`."""
        arrays, metrics = list(message.content.array_records.values()), list(message.content.metric_records.values())
        if len(arrays) != 1 or len(metrics) != 1:
            raise Malformed(f"reply has {len(arrays)} array records and {len(metrics)} metric records, not one of each")
        n, node = metrics[0].get(self.weighted_by_key), message.metadata.src_node_id
        if isinstance(n, list) or n is None or not (math.isfinite(n) and n > 0):
            raise Malformed(f"reply has no positive number as {self.weighted_by_key}")
        if node not in self._started:
            raise Malformed("reply of a node that was not asked")
        if missing := sorted(set(self._sent) ^ set(arrays[0])):
            raise Malformed(f"reply and model differ in {', '.join(missing[:5])}")
        rest = {name: wire.decode(array, name) for name, array in arrays[0].items() if name not in self._like}
        model = wire.read({name: wire.decode(arrays[0][name], name) for name in self._like}, self._like)
        if any(tuple(array.shape) != tuple(self._sent[name].shape) for name, array in rest.items()):
            raise Malformed(f"reply has other shapes at {', '.join(sorted(rest)[:5])}")
        change: Params = model - self._started[node]
        if why := wire.faults(stack([change])):
            raise Malformed(why[0])
        return self._client(metrics[0].get(PARTITION), node), change, self._started[node], float(n)

    def _client(self, said: Any, node: int) -> int:
        assert self._clients is not None
        client = self._place[node] if said is None or isinstance(said, list) else int(said) if math.isfinite(said) else -1
        if not 0 <= client < self._clients:
            raise Malformed(f"client {client} is unknown; from_fedsim(..., clients=N) says how many there may be, now {self._clients}")
        other = next((each for each, place in self._place.items() if place == client), node)
        self._place[other], self._place[node] = self._place[node], client  # who said so is known from now on
        return client

    def _arrive(self, version: int, ids: list[int], n: list[float]) -> Arrivals:
        """Who came; and what that says of the sizes of clients."""
        self._heard[ids] = n
        if not self._sized:
            known = np.where(self._heard > 0, self._heard, self._heard[self._heard > 0].mean())
            self._problem = replace(self._problem, sizes=torch.from_numpy(known.astype(np.float32)))
        zeros = torch.zeros(len(ids), dtype=torch.int64)
        return Arrivals(torch.tensor(ids), torch.tensor(n, dtype=torch.float32), zeros + version, zeros)

    def _metrics(self, contents: list[RecordDict]) -> dict[str, Any]:
        """The app's own aggregate of its metrics, where replies have the same ones."""
        keys = [set(next(iter(content.metric_records.values()))) for content in contents]
        if any(each != keys[0] for each in keys):
            return {}
        return {name: value for name, value in self.train_metrics_aggr_fn(contents, self.weighted_by_key).items() if name != PARTITION}

    def _whole(self, w: Params, messages: list[Message], n: list[float]) -> ArrayRecord:
        """The new model; what is not real numbers in it (a counter of batches) is the clients' weighted mean, rounded."""
        records = [next(iter(message.content.array_records.values())) for message in messages]
        out = {}
        for name, array in self._sent.items():
            if name in w:
                out[name] = wire.encode(w[name].to(self._like[name]))
                continue
            mean = sum(wire.decode(record[name], name).double() * (each / sum(n)) for record, each in zip(records, n, strict=True))
            out[name] = wire.encode(torch.as_tensor(mean).round().to(wire.decode(array, name).dtype))
        return ArrayRecord(out)
