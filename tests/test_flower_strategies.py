"""Flower's own strategies in this engine: held to what Flower makes of the same replies."""

import random
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as theirs

from fedsim import rng, tree
from fedsim.document import InvalidScenario
from fedsim.engine import Round, run
from fedsim.errors import FedsimError
from fedsim.fleet import Fleet
from fedsim.local import Sgd
from fedsim.pace import Sync
from fedsim.records import in_flower
from fedsim.registry import lookup
from fedsim.scenario import load, load_plugins
from fedsim.sim.cohort import Trainer
from fedsim.sim.executor import Inline
from fedsim.sim.port import SimPort
from fedsim.strategy import LocalProgram, Strategy
from fedsim.world import World, build
from strategies.flower import Flower, stock_classes
from tests import toy

load_plugins()

ARGS = {
    "Bulyan": {"num_malicious_nodes": 1},
    "FedAdagrad": {"eta": 0.05},
    "FedAdam": {"eta": 0.02, "beta_1": 0.8},
    "FedAvg": {},
    "FedAvgM": {"server_learning_rate": 0.7, "server_momentum": 0.9},
    "FedMedian": {},
    "FedProx": {"proximal_mu": 0.5},
    "FedTrimmedAvg": {"beta": 0.2},
    "FedYogi": {"eta": 0.02},
    "Krum": {"num_malicious_nodes": 2},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "QFedAvg": {"client_learning_rate": 0.1, "q": 0.5},
}
LOCAL = Sgd(lr=0.1, epochs=1, batch_size=16)
every_class = pytest.mark.parametrize("cls", sorted(ARGS))


def flower(cls: str, **more) -> Flower:
    return Flower(cls=cls, args=ARGS[cls], **{"local": LOCAL, **more})


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """Digits on eight clients, a perceptron of four tensors."""
    file = tmp_path_factory.mktemp("flower") / "small.yaml"
    file.write_text(
        "data: {source: digits, clients: 8, partition: {name: dirichlet, alpha: 0.5}}\nmodel: {name: mlp, hidden: [8]}\n"
        "strategy: fedavg\nrounds: 1\nengine: {workers: 0}\n"
    )
    return build(load(file)[0])


def port_of(world: World) -> SimPort:
    trainer = Trainer(world.problem, world.data.x, world.data.y, world.data.train, "vmap")
    return SimPort(Inline(trainer), Fleet(), None, world.data.sizes, {}, 3, rng.fold(0, rng.FLEET))


def rounds(strategy: Strategy, world: World, count: int, start: Round | None = None) -> list[Round]:
    return list(islice(run(strategy, world.problem, world.w, port_of(world), Sync(), rng.fold(0, 1000), start), count))


def test_every_class_of_flower_is_here_or_explained():
    assert stock_classes() == sorted(ARGS)
    assert len(ARGS) == 12
    left_out = set(theirs.__all__) - set(ARGS)
    assert {name for name in left_out if not name.startswith("DifferentialPrivacy")} == {
        "FedXgbBagging",  # trees, not arrays
        "FedXgbCyclic",
        "Result",  # no strategies
        "Strategy",
    }
    assert sum(name.startswith("DifferentialPrivacy") for name in left_out) == 4  # noise outside of our account


class Replay(Grid):
    """Answers Flower's own loop with the replies of rounds that ran here: model sent + change, in the order of the clients."""

    def __init__(self, played: list[Round]):
        self.played, self.turn = played, 0

    def get_node_ids(self):
        return list(range(8))

    def send_and_receive(self, messages, *, timeout=None):
        messages = {message.metadata.dst_node_id: message for message in messages}
        if not messages:
            return []
        updates = self.played[self.turn].received.updates
        self.turn += 1
        loss, seen = updates.metrics["loss"]
        out = []
        for c, client in enumerate(updates.arrivals.ids.tolist()):
            sent = messages[client].content["arrays"].to_torch_state_dict()
            arrays = ArrayRecord({name: sent[name] + updates.payload[name][c] for name in sent})
            metrics = MetricRecord({"num-examples": int(updates.arrivals.n[c]), "train_loss": float(loss[c] / seen[c])})
            out.append(Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=messages[client]))
        return out

    def set_run(self, run):
        raise AssertionError("not asked for")

    run = property(set_run)
    create_message = push_messages = pull_messages = set_run


@every_class
def test_three_rounds_are_flowers_own_on_the_same_replies(cls, world):
    played = rounds(flower(cls), world, 3)
    models = []
    with in_flower(0):
        its = getattr(theirs, cls)(**ARGS[cls], fraction_evaluate=0.0)
        its.start(
            Replay(played),
            ArrayRecord(dict(world.w)),
            num_rounds=3,
            evaluate_fn=lambda n, arrays: models.append(arrays.to_torch_state_dict()),
        )
    assert len(models) == 4
    for here, there in zip(played, models[1:], strict=True):
        assert here.state.skipped == 0
        for name, value in here.state.w.items():
            torch.testing.assert_close(value, there[name].to(value), rtol=0, atol=1e-6)
    moved = [(a.state.w - before).norm() for a, before in zip(played, [world.w, *(b.state.w for b in played)], strict=False)]
    assert min(moved) > 1e-3


@every_class
def test_a_run_resumes_to_the_same_bits(cls, world):
    straight = rounds(flower(cls), world, 4)[-1].state
    half = rounds(flower(cls), world, 2)[-1]
    port = port_of(world)
    port._t = 2
    start = Round(2, tree.load(*tree.dump(half.state)), half.received)
    resumed = list(islice(run(flower(cls), world.problem, world.w, port, Sync(), rng.fold(0, 1000), start), 2))[-1].state
    (xs, outline), (ys, other) = tree.dump(straight), tree.dump(resumed)
    assert outline == other
    assert all(torch.equal(xs[name], ys[name]) for name in xs)


def test_what_is_remembered_is_what_a_class_keeps_beyond_its_arguments(world):
    kept = {cls: set(rounds(flower(cls), world, 1)[-1].state.kept) for cls in ("FedAvg", "FedAvgM", "FedYogi")}
    assert kept == {"FedAvg": set(), "FedAvgM": {"current_arrays", "momentum_vector"}, "FedYogi": {"current_arrays", "m_t", "v_t"}}


@dataclass(frozen=True)
class Plain(LocalProgram):
    """A program without a proximal term."""

    registered_name = "plain-sgd"
    epochs: int = 1
    steps: int | None = None
    batch_size: int | None = None
    begin = step = finish = lambda *_: None


def test_fedprox_sets_the_proximal_term_of_the_program(world):
    prox = rounds(flower("FedProx"), world, 2)[-1].state.w
    ours = rounds(lookup(Strategy, "fedprox")(mu=0.5, local=LOCAL), world, 2)[-1].state.w
    plain = rounds(flower("FedAvg"), world, 2)[-1].state.w
    for name in ours:
        torch.testing.assert_close(prox[name], ours[name], rtol=0, atol=1e-6)
    assert (prox - plain).norm() > 1e-3
    with pytest.raises(FedsimError, match="FedProx sends its clients 'proximal-mu', which plain-sgd does not know"):
        rounds(flower("FedProx", local=Plain()), world, 1)


def test_where_nothing_is_aggregated_the_model_stays_and_it_is_said(world):
    few = Flower(cls="Bulyan", args={"num_malicious_nodes": 2}, local=LOCAL)  # wants 11 replies
    (only,) = rounds(few, world, 1)
    assert all(torch.equal(only.state.w[name], world.w[name]) for name in world.w)
    assert only.report == {"skipped": 1.0}


class Noisy(theirs.FedAvg):
    """Draws whom to ask and noise, as a user's class may, and counts its rounds."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def configure_train(self, server_round, arrays, config, grid):
        self.asked += 1
        messages = list(super().configure_train(server_round, arrays, config, grid))
        return random.sample(messages, 4)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        assert len(replies) == 4
        assert [m.metadata.src_node_id for m in replies] == sorted(m.metadata.src_node_id for m in replies)
        arrays, metrics = super().aggregate_train(server_round, replies)
        noisy = {k: torch.from_numpy(v.numpy() + 0.01 * np.random.standard_normal(v.shape)) for k, v in arrays.items()}  # noqa: NPY002
        return ArrayRecord(noisy), metrics


def drawn():
    """Where the global generators are."""
    return random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def test_what_a_class_draws_is_drawn_by_key(world):
    mine = Flower(cls="tests.test_flower_strategies:Noisy", local=LOCAL)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = drawn()
    first = rounds(mine, world, 2)
    assert drawn() == before
    random.seed(2)
    np.random.seed(2)  # noqa: NPY002
    again = rounds(mine, world, 2)
    asked = [a.received.arrivals.ids.tolist() for a in first]
    assert asked == [a.received.arrivals.ids.tolist() for a in again]
    assert asked[0] != asked[1]
    assert all(torch.equal(first[-1].state.w[name], again[-1].state.w[name]) for name in world.w)
    assert first[-1].state.kept == {"asked": 2}


class Opaque(theirs.FedAvg):
    """Keeps what cannot be a checkpoint."""

    def aggregate_train(self, server_round, replies):
        self.seen = {object()}
        return super().aggregate_train(server_round, replies)


class Broken(theirs.FedAvg):
    """Fails."""

    def aggregate_train(self, server_round, replies):
        raise ZeroDivisionError("no")


class Elsewhere(theirs.FedAvg):
    """Sends another model than the server's, and a config of its own."""

    def configure_train(self, server_round, arrays, config, grid):
        other = ArrayRecord({name: torch.from_numpy(array.numpy() + 1) for name, array in arrays.items()})
        return super().configure_train(server_round, other, config, grid)


class Wishful(theirs.FedAvg):
    """Sends a config that means nothing to our programs."""

    def configure_train(self, server_round, arrays, config, grid):
        return super().configure_train(server_round, arrays, ConfigRecord({"lr": 0.5}), grid)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        ("Opaque", "keeps a set in `seen`, which cannot be checkpointed"),
        ("Broken", "Broken failed in round 1: ZeroDivisionError: no"),
        ("Elsewhere", "sends its clients other arrays than the model"),
        ("Wishful", "sends its clients 'lr', which sgd does not know"),
    ],
)
def test_what_this_engine_cannot_honour_is_said(cls, message, world):
    with pytest.raises(FedsimError, match=message):
        rounds(Flower(cls=f"tests.test_flower_strategies:{cls}", local=LOCAL), world, 1)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("{name: flower, cls: FedYogy}", "'FedYogy' is no strategy of Flower that aggregates arrays (did you mean 'FedYogi'?)"),
        ("{name: flower, cls: FedXgbBagging}", "'FedXgbBagging' is no strategy of Flower that aggregates arrays"),
        (
            "{name: flower, cls: DifferentialPrivacyServerSideFixedClipping}",
            "would not be in the privacy account; take {name: dp, inner: ...}",
        ),
        ("{name: flower, cls: FedAvg, args: {fraction_train: 0.1}}", "who takes part is said by `fleet` and `pace`"),
        ("{name: flower, cls: FedAvg, args: {eta: 0.1}}", "FedAvg cannot be made of [eta]"),
        ("{name: flower, cls: FedTrimmedAvg, args: {beta: 0.7}}", "`beta` must be in the range [0, 0.5)"),
        ("{name: flower, cls: 'nowhere:FedAvg'}", "'nowhere:FedAvg' names no class"),
        ("{name: flower, cls: QFedAvg}", "client_learning_rate"),
    ],
)
def test_a_wrong_scenario_is_refused_with_the_reason(strategy, message, tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text(f"data: {{source: digits, clients: 8}}\nmodel: logreg\nrounds: 1\nstrategy: {strategy}\n")
    with pytest.raises(InvalidScenario) as refused:
        load(file)
    assert message in str(refused.value)
    assert "wrong.yaml:4" in str(refused.value)


def test_a_step_by_hand():
    """FedAdam (eta 0.1, beta1 0.9, beta2 0.99, tau 1e-3), clients of two examples that jump to [1, 0] and [0, 2] from [0, 0].

    d = np.array([0.5, 1.0]) ; m = 0.1 * d ; v = 0.01 * d**2
    eta = 0.1 * np.sqrt(1 - 0.99**2) / (1 - 0.9**2)          # Flower's bias correction counts rounds from 2
    print(eta * m / (np.sqrt(v) + 1e-3))
    """
    made = toy.jumpers([[1, 0], [0, 2]])
    (w,) = toy.path(Flower(cls="FedAdam", local=Sgd(lr=2.0, epochs=1, batch_size=None)), made, 1)
    d = np.array([0.5, 1.0])
    eta = 0.1 * np.sqrt(1 - 0.99**2) / (1 - 0.9**2)
    toy.close(w, eta * 0.1 * d / (np.sqrt(0.01 * d**2) + 1e-3), within=1e-9)
