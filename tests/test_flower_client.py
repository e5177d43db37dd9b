"""The half of a Flower app that runs on a node, in this process: what it answers is what the simulation computes."""

import dataclasses

import numpy as np
import pytest
import torch
from flwr import app as flwr
from flwr.supercore.task_identity import TaskIdentity

from fedsim import rng
from fedsim.data import Dataset, Examples
from fedsim.data.encoding import Encoding
from fedsim.entropy import SYSTEM
from fedsim.errors import DataError, FedsimError, ScenarioError
from fedsim.flower import client_app as client_module
from fedsim.flower import orders, wire
from fedsim.flower.client_app import client_app
from fedsim.flower.device import Device
from fedsim.flower.orders import CALIBRATE, DESCRIBE, ENCODING, EVALUATE, Answer, Description, Order, held_by, program_of
from fedsim.flower.wire import Malformed
from fedsim.local import StepDecay
from fedsim.problem import Classification
from fedsim.scenario import load
from fedsim.sim.chunk import Chunk
from fedsim.sim.cohort import order as by_steps
from fedsim.strategy import LocalProgram
from fedsim.tree import rows, stack, tree_leaves
from fedsim.world import build

SCENARIO = """\
name: node
seed: 5
data: {source: digits, clients: 9, client_test: 0.3, partition: {name: dirichlet, alpha: 0.5}}
model: {name: mlp, hidden: [16]}
strategy: {name: %s}
rounds: 3
engine: {workers: 0}
"""
FEDAVG = "fedavg, local: {name: sgd, lr: 0.05, epochs: 2, batch_size: 16}"
SCAFFOLD = "scaffold, local: {name: scaffold-sgd, lr: 0.05, batch_size: 16}"
NODE = {"partition-id": 1, "num-partitions": 3}
KEY = rng.fold(5, 77)


def written(tmp_path, strategy=FEDAVG, text=SCENARIO):
    path = tmp_path / "scenario.yaml"
    path.write_text(text % strategy)
    return path


def ask(app, kind, records, context):
    """What a node says to a message, after a trip through Flower's own bytes."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = flwr.Message(records, 7, kind)
    message.metadata.__dict__["_message_id"] = "1"
    return app(message, context).content


def context(node=NODE):
    return flwr.Context(run_id=1, node_id=7, node_config=dict(node), state=flwr.RecordDict(), run_config={})


def order_of(world, ids, version=4, program=None, message=None):
    stage = world.ledger.stages[0]
    state = stage.strategy.init(world.problem, world.w)
    (job,) = stage.strategy.plan(world.problem, state, np.array(ids), 1)
    return Order(np.array(ids), message or job.message, program or job.program, version, KEY, 0, world.data.clients)


def simulated(world, order, memory):
    """What the simulation's trainer gives for the same order, by client."""
    ids = by_steps(order.program, world.data.train.sizes, order.ids)
    chunk = Chunk(ids, order.version, order.key, stack([memory[int(i)] for i in ids]), None)
    reply = world.trainer().train((order.program, order.message), chunk)
    return {int(i): rows((reply.payload, reply.memory, reply.metrics), c) for c, i in enumerate(ids)}


def blank(world):
    return world.ledger.stages[0].strategy.memory(world.problem, world.w)


def template(world, order):
    with torch.no_grad():
        program, memory = order.program, blank(world)
        return program.finish(world.problem, order.message, program.begin(world.problem, order.message, memory), torch.tensor(1.0)).payload


def near(a, b):
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("strategy", [FEDAVG, SCAFFOLD], ids=["fedavg", "scaffold"])
def test_a_node_trains_what_the_simulation_trains_and_remembers(tmp_path, strategy):
    path = written(tmp_path, strategy)
    world, app, here = build(load(path)[0]), client_app(path), context()
    memory = {i: blank(world) for i in range(9)}
    for version, ids in ((4, [1, 7]), (5, [1, 4])):  # client 1 twice: in the second round it remembers the first
        order = order_of(world, ids, version)
        want = simulated(world, order, memory)
        answer = Answer.of(ask(app, order.kind, order.records(), here), order.ids, template(world, order), strategy.split(",")[0], version)
        assert answer.ids.tolist() == ids
        assert answer.examples > 0
        for c, i in enumerate(ids):
            near(rows(answer.payload, c), want[i][0])
            near({k: (s[c], n[c]) for k, (s, n) in answer.metrics.items()}, want[i][2])
            memory[i] = want[i][1]
    kept = {name for name in here.state if name.startswith("memory")}
    assert kept == (set() if strategy is FEDAVG else {"memory.0.1", "memory.0.7", "memory.0.4"})


def test_a_node_says_which_clients_it_holds(tmp_path):
    path = written(tmp_path)
    world = build(load(path)[0])
    said = Description.of(ask(client_app(path), DESCRIBE, flwr.RecordDict(), context()), 9)
    assert said.ids.tolist() == [1, 4, 7]
    assert said.sizes.tolist() == world.data.train.sizes[[1, 4, 7]].tolist()
    assert said.tests.tolist() == world.data.client_test.sizes[[1, 4, 7]].tolist()
    assert not said.own


def test_a_node_evaluates_on_its_own_test_data(tmp_path):
    path = written(tmp_path)
    world = build(load(path)[0])
    order = Order(np.array([4, 7]), world.w, None, 0, KEY, 0, 9)
    assert order.kind == EVALUATE
    answer = Answer.of(ask(client_app(path), EVALUATE, order.records(), context()), order.ids, None, "fedavg", 0)
    for c, i in enumerate((4, 7)):
        own = torch.from_numpy(world.data.client_test.of(i))
        output = world.problem.output(world.w, world.data.x[own])
        correct, count = answer.metrics["correct"][0][c], answer.metrics["correct"][1][c]
        assert count == len(own)
        assert correct == (output.argmax(1) == world.data.y[own]).sum()


CONFORMAL = SCENARIO.replace("client_test: 0.3", "client_test: 0.4, calibration: 0.5").replace(
    "strategy: {name: %s}\nrounds: 3",
    "phases: [{strategy: {name: %s}, rounds: 1}, {strategy: {name: conformal}, rounds: 1}]",
)


def test_a_node_calibrates_on_what_it_held_back_and_is_sent_the_model_of_the_phase_before_once(tmp_path):
    path = written(tmp_path, text=CONFORMAL)
    world, app, here = build(load(path)[0]), client_app(path), context()
    stage = world.ledger.stages[1]
    frozen = world.w
    problem = dataclasses.replace(world.problem, frozen=frozen)
    (job,) = stage.strategy.plan(problem, stage.strategy.init(problem, frozen), np.array([1, 4]), 1)
    order = Order(job.ids, job.message, job.program, 0, KEY, 1, 9)
    assert order.kind == CALIBRATE
    with pytest.raises(Malformed, match="lacks the model of the phase before"):
        ask(app, order.kind, order.records(), here)
    first = ask(app, order.kind, dataclasses.replace(order, frozen=frozen).records(), here)
    again = ask(app, order.kind, order.records(), here)  # without it
    assert [record.keys() for record in first.values()] == [record.keys() for record in again.values()]
    assert first == again


def test_every_program_there_is_comes_back_from_its_text():
    found = 0
    for cls in LocalProgram.choices.values():
        if all(f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING for f in dataclasses.fields(cls)):
            found += 1
            assert program_of(orders.written(cls())) == cls()
    assert found > 5
    sgd = LocalProgram.choices["sgd"](lr=0.25, epochs=3, schedule=StepDecay(every=2, decay=0.5))
    assert program_of(orders.written(sgd)) == sgd
    with pytest.raises(Malformed, match="does not have"):
        program_of('{"class": "os.system", "fields": {}}')


def test_whose_clients_a_node_holds():
    assert held_by({"partition-id": 0, "num-partitions": 3}, 8).tolist() == [0, 3, 6]
    assert held_by({"partition-id": 5, "num-partitions": 8}, 8).tolist() == [5]
    assert held_by({"partition-id": 5}, 8).tolist() == [5]
    assert held_by({"clients": "4, 0,7"}, 8).tolist() == [0, 4, 7]
    for node, reason in (
        ({}, "does not know"),
        ({"partition-id": 8}, "0 to 7"),
        ({"clients": "8"}, "0 to 7"),
        ({"clients": "a"}, "numbers"),
    ):
        with pytest.raises(FedsimError, match=reason):
            held_by(node, 8)


def mine() -> Dataset:
    x = np.random.default_rng(3).random((50, 64), dtype=np.float32)
    y = np.arange(50) % 10
    return Dataset(Classification(10), Examples(x[:40], y[:40]), Examples(x[40:], y[40:]))


@pytest.mark.parametrize("kind", ["file", "function"])
def test_a_node_trains_on_data_of_its_own(tmp_path, kind):
    path, file = written(tmp_path), tmp_path / "mine.npz"
    data = mine()
    np.savez(file, x=data.train.x, y=data.train.y, x_test=data.test.x, y_test=data.test.y)
    source = str(file) if kind == "file" else "python: tests.test_flower_client:mine"
    if kind == "file":  # one's own test set is asked for by name
        path.write_text(path.read_text().replace("source: digits", f"source: {{name: npz, path: {file}, x_test: x_test, y_test: y_test}}"))
    device = Device.of(load(path)[0], {"partition-id": 3, "num-partitions": 9, "data": source})
    said = device.describe()
    assert (said.ids.tolist(), said.own) == ([3], True)
    assert int(said.sizes[0] + said.tests[0]) == 40
    assert device.world.problem.clients == 9
    answer = device.train(order_of(device.world, [3]), {})
    assert answer.ids.tolist() == [3]
    assert answer.examples == 2 * said.sizes[0]


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ({"partition-id": 0, "num-partitions": 3, "data": "x.npz"}, "holds one client"),
        ({"partition-id": 0, "data": "nowhere.npz"}, "no such file"),
    ],
)
def test_own_data_that_cannot_be_are_refused(tmp_path, node, reason):
    with pytest.raises(FedsimError, match=reason):
        Device.of(load(written(tmp_path))[0], node)


CSV = """\
name: tables
data: {source: {name: csv, path: FILE, target: kind, test_fraction: 0.25}, clients: 2}
model: logreg
strategy: %s
rounds: 1
"""
SCENARIOS_TABLE = "size,colour,kind\n" + "1,red,cat\n2,blue,dog\n3,red,horse\n4,blue,dog\n" * 4


def table(tmp_path, rows):
    """The device of a node that brings a table of its own, and the labels of its training examples by name."""
    (tmp_path / "all.csv").write_text(SCENARIOS_TABLE)
    (tmp_path / "mine.csv").write_text("size,colour,kind\n" + rows)
    path = written(tmp_path, "fedavg", CSV.replace("FILE", str(tmp_path / "all.csv")))
    told = Encoding.of(build(load(path)[0]).data)
    assert Encoding.read(told.written()) == told
    device = Device.of(load(path)[0], {"partition-id": 0, "data": str(tmp_path / "mine.csv")}, told)
    return device, [device.world.data.task.names[int(y)] for y in device.world.data.y]


def test_classes_of_a_node_s_own_table_are_known_by_name(tmp_path):
    device, names = table(tmp_path, "1,red,horse\n2,blue,cat\n5,red,horse\n" * 4)
    assert device.world.data.task.names == ("cat", "dog", "horse")
    assert set(names) == {"cat", "horse"}
    assert names.count("horse") == 2 * names.count("cat")
    assert device.world.problem.network.module(device.world.data.x).shape[1] == 3


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ("1,red,cow\n2,blue,cat\n" * 4, "has the class 'cow', which is none of the scenario's: cat, dog, horse"),
        ("1,red,cat\n2,green,dog\n" * 4, "columns differs from that of the scenario's data: colour=green instead of colour=blue"),
        ("1,red,cat\n2,red,dog\n" * 4, r"shape differs from that of the scenario's data: \(2,\) instead of \(3,\)"),
    ],
)
def test_a_table_that_means_something_else_is_refused(tmp_path, rows, reason):
    with pytest.raises(DataError, match=reason):
        table(tmp_path, rows)


def test_a_node_is_told_how_the_scenario_s_data_are_encoded_and_keeps_that(tmp_path):
    path, file, data = written(tmp_path), tmp_path / "mine.npz", mine()
    some = data.train.y < 7
    np.savez(file, x=data.train.x[some].reshape(-1, 1, 8, 8), y=data.train.y[some])
    app, here = client_app(path), context({"partition-id": 3, "data": str(file)})
    told = flwr.ConfigRecord({"text": Encoding.of(build(load(path)[0]).data).written()})
    assert Description.of(ask(app, DESCRIBE, flwr.RecordDict({ENCODING: told}), here), 9).own
    world = build(load(path)[0])
    order = order_of(world, [3])
    answer = Answer.of(ask(app, orders.TRAIN, order.records(), here), np.array([3]), world.w, "fedavg", order.version)
    assert answer.ids.tolist() == [3]
    assert here.state[ENCODING]["text"] == told["text"]
    assert next(iter(client_module._DEVICES.values())).world.data.task.outputs == 10  # though it has examples of seven classes


PRIVATE = "fedavg, local: {name: dp-sgd, lr: 0.05, clip: 1.0, batch_size: 16, %s}"


@pytest.mark.parametrize(
    ("program", "privacy", "reason"),
    [
        ("noise: 1.0", "delta: 1.0e-5", "give `rate` and `steps`"),
        ("noise: 1.0, steps: 3", "delta: 1.0e-5", "give `rate` and `steps`"),
        ("noise: 1.0, steps: 3, rate: 0.1", "budget: 8.0", "privacy.delta|follows from the scenario's own examples"),
        ("noise: null, steps: 3, rate: 0.1", "target_epsilon: 8.0, delta: 1.0e-5", "give the `noise` itself"),
        ("noise: 1.0, steps: 3, rate: 0.1", "delta: 1.0e-5", None),
    ],
)
def test_own_data_whose_privacy_nobody_accounts_for_are_refused(tmp_path, program, privacy, reason):
    path, file, data = written(tmp_path, PRIVATE % program), tmp_path / "mine.npz", mine()
    path.write_text(path.read_text() + f"privacy: {{{privacy}}}\n")
    np.savez(file, x=data.train.x, y=data.train.y)
    node = {"partition-id": 3, "data": str(file)}
    if reason is None:
        assert Device.of(load(path)[0], node).own
    else:
        with pytest.raises(ScenarioError, match=reason):
            Device.of(load(path)[0], node)


def test_a_node_does_only_what_is_its_business(tmp_path):
    path = written(tmp_path)
    device = Device.of(load(path)[0], NODE)
    good = order_of(device.world, [1])
    for change, reason in (
        ({"ids": np.array([0])}, "does not hold"),
        ({"phase": 1}, "the scenario has 1"),
    ):
        with pytest.raises(Malformed, match=reason):
            device.train(dataclasses.replace(good, **change), {})


def test_noise_that_protects_comes_from_the_operating_system_whatever_the_seed(tmp_path):
    private = "fedavg, local: {name: dp-sgd, lr: 0.05, noise: 1.0, clip: 1.0, batch_size: 16, steps: 2}"
    path = written(tmp_path, private)
    device = Device.of(load(path)[0], NODE)
    assert device.world.problem.entropy is SYSTEM
    order = order_of(device.world, [1])
    once, twice = (device.train(order, {}).payload for _ in range(2))
    assert not any(torch.equal(x, y) for x, y in zip(tree_leaves(once), tree_leaves(twice), strict=True))
    world = build(load(path)[0])  # the simulation repeats itself
    first, second = (simulated(world, order, {1: blank(world)})[1][0] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(tree_leaves(first), tree_leaves(second), strict=True))


def test_a_server_cannot_ask_a_node_to_protect_its_examples_less(tmp_path):
    path = written(tmp_path, "fedavg, local: {name: dp-sgd, lr: 0.05, noise: 1.0, clip: 1.0, batch_size: 16, steps: 2}")
    device = Device.of(load(path)[0], NODE)
    order = order_of(device.world, [1])
    with pytest.raises(Malformed, match="protects this node's examples"):
        device.train(dataclasses.replace(order, program=dataclasses.replace(order.program, noise=0.01)), {})


def test_noise_without_an_epsilon_is_not_the_seed_s_either(tmp_path):
    lora = SCENARIO.replace("hidden: [16]", "hidden: [16], adapt: {name: lora, rank: 2}")
    path = written(tmp_path, "dp-lora, local: {name: dp-lora-batch, noise: 1.0}", lora)
    device = Device.of(load(path)[0], NODE)
    order = order_of(device.world, [1])
    once, twice = (device.train(order, {}).payload for _ in range(2))
    assert not all(torch.equal(x, y) for x, y in zip(tree_leaves(once), tree_leaves(twice), strict=True))
    assert set(wire.unpack(wire.arrays(once)[0])) == set(device.world.w)  # adapters travel, the model they adapt does not
