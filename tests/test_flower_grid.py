"""An existing Flower app on simulated nodes, and our strategies inside an existing Flower app."""

import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as theirs

from fedsim.errors import FedsimError
from fedsim.flower.grid import SimGrid
from fedsim.flower.strategy import from_fedsim
from fedsim.records import in_flower
from fedsim.registry import lookup
from fedsim.scenario import load_plugins
from fedsim.strategy import Strategy
from strategies.flower import stock_classes
from tests import flower_app
from tests.test_flower_strategies import ARGS

load_plugins()
NODES = 8


def ours(name: str, **fields) -> Strategy:
    return lookup(Strategy, name)(**fields)


def start(strategy, rounds: int = 2, nodes: int = NODES, seed: int = 0, **run_config):
    grid = SimGrid(flower_app.app, nodes, seed=seed, run_config=run_config)
    return grid.start(strategy, ArrayRecord(flower_app.net("counts" in run_config).state_dict()), num_rounds=rounds)


def tensors(result) -> dict:
    return result.arrays.to_torch_state_dict()


def same(a, b, within: float = 0.0) -> bool:
    return all((value.double() - tensors(b)[name].double()).abs().max() <= within for name, value in tensors(a).items())


@pytest.mark.parametrize("cls", stock_classes())
def test_every_stock_strategy_runs_a_user_app_and_repeats_bit_for_bit(cls):
    def make():
        return getattr(theirs, cls)(**ARGS[cls], fraction_evaluate=0.25)

    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    first = start(make())
    random.seed(2), np.random.seed(2), torch.manual_seed(2)  # noqa: NPY002
    assert same(first, start(make()))
    assert not same(first, start(make(), seed=1))
    assert set(first.evaluate_metrics_clientapp) == {1, 2}
    assert all(math.isfinite(metrics["train_loss"]) for metrics in first.train_metrics_clientapp.values())


def test_it_learns():
    assert flower_app.accuracy(start(theirs.FedAvg(fraction_evaluate=0.0), rounds=15).arrays) > 0.8


def test_a_sample_is_drawn_by_key_and_nodes_remember():
    grid = SimGrid(flower_app.app, NODES, seed=3)
    grid.start(theirs.FedAvg(fraction_train=0.25, fraction_evaluate=0.0), ArrayRecord(flower_app.net().state_dict()), num_rounds=3)
    seen = [int(grid.context(i).state["seen"]["rounds"]) if "seen" in grid.context(i).state else 0 for i in range(NODES)]
    assert sum(seen) == 6
    again = SimGrid(flower_app.app, NODES, seed=3)
    again.start(theirs.FedAvg(fraction_train=0.25, fraction_evaluate=0.0), ArrayRecord(flower_app.net().state_dict()), num_rounds=3)
    assert seen == [int(again.context(i).state["seen"]["rounds"]) if "seen" in again.context(i).state else 0 for i in range(NODES)]


def test_the_global_generators_are_where_they_were():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    grid = SimGrid(flower_app.app, 2)
    arrays = ArrayRecord(flower_app.net().state_dict())
    torch.manual_seed(1)
    with in_flower(0):
        grid.send_and_receive([Message(RecordDict({"arrays": arrays}), 0, "evaluate")])
    torch.manual_seed(1)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


def test_a_node_that_raises_answers_with_an_error_and_the_run_goes_on():
    strategy = Watching(fraction_evaluate=0.0)
    start(strategy, broken=2)
    assert strategy.errors == ["RuntimeError: no data today"] * 2
    assert strategy.nodes == [[i for i in range(NODES) if i != 2]] * 2


class Watching(theirs.FedAvg):
    """Notes what it is given."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.errors, self.nodes = [], []

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        self.errors += [reply.error.reason for reply in replies if reply.has_error()]
        self.nodes.append([reply.metadata.src_node_id for reply in replies if reply.has_content()])
        return super().aggregate_train(server_round, replies)


def test_a_whole_app_runs_as_it_is():
    grid = SimGrid("tests.flower_app:app", NODES)
    context = grid.run_app("tests.flower_app:server")
    assert 0.2 < context.state["accuracy"]["accuracy"] < 1.0
    for wrong, why in (("tests.flower_app:nothing", "names no ClientApp"), ("tests.flower_app:server", "this is a ServerApp")):
        with pytest.raises(FedsimError, match=why):
            SimGrid(wrong, 2)
    with in_flower(0), pytest.raises(FedsimError, match="for node 9, and there are 8"):
        grid.push_messages([Message(RecordDict(), 9, "train")])


# Our strategies in a Flower app.


def test_fedavg_is_flowers_on_the_same_replies():
    mine, its = start(from_fedsim(ours("fedavg"))), start(theirs.FedAvg())
    assert same(mine, its, within=1e-6)
    assert mine.train_metrics_clientapp[2]["train_loss"] == pytest.approx(its.train_metrics_clientapp[2]["train_loss"], abs=1e-6)
    assert mine.evaluate_metrics_clientapp.keys() == {1, 2}


def test_a_counter_in_a_model_stays_whole():
    mine, its = (start(strategy, rounds=1, counts=1) for strategy in (from_fedsim(ours("fedavg")), theirs.FedAvg()))
    counter = "1.num_batches_tracked"
    assert tensors(mine)[counter].dtype == torch.int64
    assert tensors(its)[counter].dtype != torch.int64
    for name, value in tensors(its).items():
        torch.testing.assert_close(tensors(mine)[name].double(), value.double(), rtol=0, atol=0.5 if name == counter else 1e-6)


FASTER = {name: {"server_lr": 0.1} for name in ("fedadam", "fedyogi")}


@pytest.mark.parametrize(
    "name", ["fedavgm", "fedadam", "fedyogi", "median", "trimmed-mean", "fedau", "mifa", "fedvarp", "fedstale", "krum"]
)
def test_strategies_learn_through_flowers_start_and_repeat(name):
    def run():
        return start(from_fedsim(ours(name, **FASTER.get(name, {})), fraction_train=0.5, fraction_evaluate=0.0, seed=5), rounds=6)

    first = run()
    assert same(first, run())
    assert flower_app.accuracy(first.arrays) > 0.4
    assert first.train_metrics_clientapp[6]["rejected"] == 0


def test_fedau_with_everyone_is_fedavg_with_uniform_weights():
    assert same(start(from_fedsim(ours("fedau"))), start(from_fedsim(ours("fedavg", weights="uniform"))), within=1e-6)


def test_fedlaw_learns_its_weights_on_the_apps_proxy_data():
    proxy = (flower_app.X[flower_app.TRAIN :][:100], flower_app.Y[flower_app.TRAIN :][:100])
    with pytest.raises(FedsimError, match=r"give from_fedsim\(\.\.\., model=net, proxy=\(inputs, targets\)\)"):
        from_fedsim(ours("fedlaw"))
    strategy = from_fedsim(ours("fedlaw"), model=flower_app.net().eval(), proxy=proxy, fraction_evaluate=0.0)
    result = start(strategy, rounds=6)
    assert flower_app.accuracy(result.arrays) > 0.6
    assert "server.gamma" in result.train_metrics_clientapp[6]


def test_fedprox_tells_clients_its_mu():
    prox, plain = (start(from_fedsim(ours(name, **fields))) for name, fields in (("fedprox", {"mu": 1.0}), ("fedavg", {})))
    assert not same(prox, plain)
    # Their own FedProx, whose clients are told the same; a counter of batches is a fraction there.
    its = tensors(start(theirs.FedProx(proximal_mu=1.0)))
    assert all((value - its[name]).abs().max() <= 1e-6 for name, value in tensors(prox).items() if value.is_floating_point())


def test_a_client_is_whom_its_reply_says_else_its_nodes_place():
    """Node ids of Flower are any numbers: a grid that renames nodes changes nothing where replies say `partition-id`."""
    strategy = from_fedsim(ours("fedau"), fraction_train=0.5, fraction_evaluate=0.0, min_train_nodes=1)
    grid = Renamed(SimGrid(flower_app.app, NODES, run_config={"says-who": 1}))
    with in_flower(0):
        strategy.start(grid, ArrayRecord(flower_app.net().state_dict()), num_rounds=6)
    asked = np.zeros(NODES)
    for replies in grid.replies:
        for reply in replies:
            asked[reply.content["metrics"]["partition-id"]] += 1
    heard = np.flatnonzero(strategy._heard)
    assert heard.tolist() == np.flatnonzero(asked).tolist()
    assert strategy._heard[heard].tolist() == [40 + 15 * i for i in heard]
    assert strategy.rejected == {}


def test_nodes_that_come_and_go_are_clients_of_their_own():
    strategy = from_fedsim(ours("fedavg"), clients=3)
    strategy._clients, strategy._place = 3, {20: 2, 10: 1}  # as their replies have said
    assert strategy._seat([10, 20, 5]) == {2: 20, 1: 10, 0: 5}  # one comes late
    assert strategy._seat([10, 20, 7]) == {2: 20, 1: 10, 0: 7}  # and is replaced
    assert strategy._seat([5, 7, 10, 20]) == {0: 5, 1: 10, 2: 20}  # and is back: there is no room for both
    assert strategy._seat([7]) == {0: 7}


class Renamed(Grid):
    """The nodes of another grid under ids of many digits, in another order."""

    def __init__(self, inner: SimGrid):
        self.inner, self.replies = inner, []
        self.names = {i: (7919 * (i + 3) % 11) * 10**15 + i for i in range(NODES)}

    def get_node_ids(self):
        return set(self.names.values())

    def send_and_receive(self, messages, *, timeout=None):
        back = {name: i for i, name in self.names.items()}
        asked = [Message(m.content, back[m.metadata.dst_node_id], m.metadata.message_type) for m in messages]
        replies = self.inner.send_and_receive(asked)
        for reply in replies:
            reply.metadata.__dict__["_src_node_id"] = self.names[reply.metadata.src_node_id]
        self.replies.append(replies)
        return replies

    set_run = create_message = push_messages = pull_messages = None
    run = None


def spoiled(kind: str, reply: Message) -> None:
    """Do something to a reply."""
    content, arrays, metrics = reply.content, reply.content["arrays"], reply.content["metrics"]
    first = next(iter(arrays))
    value = arrays[first].numpy().copy()
    if kind == "nan":
        value[0, 0] = np.nan
        arrays[first] = ArrayRecord({"x": torch.from_numpy(value)})["x"]
    elif kind == "shape":
        arrays[first] = ArrayRecord({"x": torch.from_numpy(value[1:])})["x"]
    elif kind == "dtype":
        arrays[first] = ArrayRecord({"x": torch.from_numpy(value.astype("f8"))})["x"]
    elif kind == "missing":
        del arrays[first]
    elif kind == "foreign":
        arrays["more"] = arrays[first]
    elif kind == "no number":
        del metrics["num-examples"]
    elif kind == "negative":
        metrics["num-examples"] = -3
    elif kind == "no metrics":
        del content["metrics"]
    elif kind == "stranger":
        metrics["partition-id"] = 99
    elif kind == "no one":
        metrics["partition-id"] = float("nan")
    elif kind == "counter":
        counter = next(name for name in arrays if name.endswith("num_batches_tracked"))
        arrays[counter] = Array("int64", (), "numpy.ndarray", b"garbled")
    elif kind == "twice":
        metrics["partition-id"] = 0


@dataclass
class Spoiling:
    """A client app whose node 1 spoils its reply."""

    kind: str

    def __call__(self, message, context):
        reply = flower_app.app(message, context)
        if context.node_id == 1 and message.metadata.message_type == "train":
            spoiled(self.kind, reply)
        return reply


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("nan", "not finite"),
        ("shape", "update has float32"),
        ("dtype", "update has float64"),
        ("missing", "differ in 0.weight"),
        ("foreign", "differ in more"),
        ("no number", "no positive number as num-examples"),
        ("negative", "no positive number"),
        ("no metrics", "0 metric records"),
        ("stranger", "client 99 is unknown"),
        ("no one", "client -1 is unknown"),
        ("counter", "num_batches_tracked is not in NumPy's format"),
        ("twice", "came a second time"),
    ],
)
def test_a_malformed_reply_is_rejected_counted_and_the_run_goes_on(kind, why):
    counts = kind == "counter"
    grid = SimGrid(flower_app.app, 4, run_config={"says-who": 1} | ({"counts": 1} if counts else {}))
    grid._app = Spoiling(kind)
    strategy = from_fedsim(ours("fedavg"), fraction_evaluate=0.0)
    result = grid.start(strategy, ArrayRecord(flower_app.net(counts).state_dict()), num_rounds=2)
    ((reason, count),) = strategy.rejected.items()
    assert why in reason
    assert count == 2
    assert result.train_metrics_clientapp[2]["rejected"] == 2
    assert all(bool(torch.isfinite(value.double()).all()) for value in tensors(result).values())


REFUSED = {
    "known-p": "needs rates",
    "pretrain": "asks no client",
    "scaffold": "sends its clients more than a model, which only its own client program understands; deploy its scenario instead",
}


@pytest.mark.parametrize("name", ["known-p", "pretrain", "scaffold"])
def test_what_needs_more_than_an_app_has_is_refused(name):
    with pytest.raises(FedsimError, match=REFUSED[name]):
        from_fedsim(ours(name))


def test_privacy_without_an_account_is_refused():
    with pytest.raises(FedsimError, match="is private only by a mechanism whose account is kept with a scenario"):
        from_fedsim(ours("dp", inner=ours("fedavg", weights="uniform"), noise=1.0, clip=1.0))


def test_sizes_are_given_or_learned():
    with pytest.raises(FedsimError, match="has 2 numbers, for 3 clients"):
        from_fedsim(ours("fedavg"), sizes=[1, 2], clients=3)
    sizes, all_ = [40 + 15 * i for i in range(NODES)], {"fraction_evaluate": 0.0}
    given, learned = (start(from_fedsim(ours("fedstale", beta=0.0), sizes=known, **all_), rounds=3) for known in (sizes, None))
    assert same(given, learned)
    assert same(given, start(from_fedsim(ours("fedavg"), **all_), rounds=3), within=1e-6)  # with everyone there they are one
