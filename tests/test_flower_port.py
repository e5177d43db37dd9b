"""Rounds over Flower's grid, with nodes in this process: the simulation's numbers, and a run that nothing from outside can stop."""

import dataclasses
import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from safetensors.torch import load_file

from fedsim import experiment, session
from fedsim.errors import FedsimError
from fedsim.flower import nodes, wire
from fedsim.flower.client_app import client_app
from fedsim.flower.nodes import Nodes
from fedsim.flower.server_app import Settings, run
from fedsim.folder import Folder
from fedsim.scenario import load
from fedsim.world import build
from tests.near_grid import NearGrid

SCENARIO = """\
name: deployed
seed: 5
data: {source: digits, clients: 7, client_test: 0.4, calibration: 0.5, partition: {name: dirichlet, alpha: 0.5}, \
proxy: {source: train, size: 50}}
model: {name: mlp, hidden: [16]%(adapt)s}
fleet: {participation: {name: bernoulli, rates: {name: constant, mean: 0.7}}}
pace: %(pace)s
%(strategy)s
evaluate: {clients: true}
engine: {workers: 0}
output: {checkpoint: 1}
"""
SGD = "local: {name: sgd, lr: 0.05, batch_size: 16}"
STRATEGIES = {
    "fedavg": f"{{name: fedavg, {SGD}}}",
    "fedau": f"{{name: fedau, {SGD}}}",
    "fedlaw": f"{{name: fedlaw, {SGD}}}",
    "fedstale": f"{{name: fedstale, {SGD}}}",
    "scaffold": "{name: scaffold, local: {name: scaffold-sgd, lr: 0.05, batch_size: 16}}",
    "dp-lora": "{name: dp-lora, local: {name: dp-lora-batch, noise: 0.0, lr: 0.05}}",
}
NODES = [{"partition-id": i, "num-partitions": 3} for i in range(3)]
QUICK = Settings(poll=0.001, wait=5.0, quiet=True)


def written(tmp_path, strategy="fedavg", pace="sync", rounds=3, phases=None):
    adapt = ", adapt: {name: lora, rank: 2}" if strategy == "dp-lora" else ""
    text = f"phases: {phases}" if phases else f"strategy: {STRATEGIES[strategy]}\nrounds: {rounds}"
    path = tmp_path / "scenario.yaml"
    path.write_text(SCENARIO % {"strategy": text, "pace": pace, "adapt": adapt})
    return path


def deploy(tmp_path, path, name="deployed", configs=NODES, settings=QUICK, **grid):
    settings = dataclasses.replace(settings, output=str(tmp_path / name))
    near = NearGrid(client_app(path), configs, **grid)
    return run(path, near, settings), near


def simulate(tmp_path, path, name="simulated"):
    scenario, _ = load(path)
    world, folder = session.begin(scenario, tmp_path / name)
    for _ in experiment.train(scenario, world, folder):
        pass
    folder.unlock()
    return folder


def rows(folder: Folder):
    return [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]


def same_run(one: Folder, two: Folder, within=1e-5):
    """Models within 1e-5, and equal rows but for the time."""
    a, b = (load_file(folder.path / "model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        assert float((a[name] - b[name]).abs().max()) <= within, name
    first, second = rows(one), rows(two)
    assert len(first) == len(second)
    for x, y in zip(first, second, strict=True):
        assert x.keys() == y.keys()
        for name in x.keys() - {"time"}:
            assert x[name] == pytest.approx(y[name], abs=2e-4), (x["round"], name)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nodes_give_the_simulation_s_model_and_metrics(tmp_path, strategy):
    path = written(tmp_path, strategy)
    same_run(deploy(tmp_path, path)[0], simulate(tmp_path, path))


def test_phases_and_prediction_sets_on_nodes_are_those_of_the_simulation(tmp_path):
    path = written(tmp_path, phases=f"[{{strategy: {STRATEGIES['fedavg']}, rounds: 2}}, {{strategy: conformal, rounds: 1}}]")
    folder, grid = deploy(tmp_path, path)
    same_run(folder, simulate(tmp_path, path))
    assert "coverage.marginal" in rows(folder)[-1] or any(name.startswith("coverage.") for name in rows(folder)[-1])
    sent = [m for m in grid.pushed if "frozen" in m.content]
    kinds = {m.metadata.message_type for m in grid.pushed}
    assert kinds == {"query.describe", "train", "train.calibrate", "evaluate"}
    assert sent
    assert all(m.content["config"]["phase"] == 1 for m in sent)


def test_what_clients_keep_lasts_into_the_next_phase_on_nodes_too(tmp_path):
    """And a phase asks whom it says."""
    own, local = "own: output", "local: {name: %s, lr: 0.05, batch_size: 16}"
    fedalt = f"{{strategy: {{name: fedalt, {own}, {local % 'alternating-sgd'}}}, rounds: 2}}"
    tune = f"{{strategy: {{name: local-only, {own}, {local % 'own-sgd'}}}, rounds: 1, participation: %s}}"
    few = tune % "{name: uniform, clients: 2}"
    pretrain = f"{{strategy: {STRATEGIES['fedavg']}, rounds: 1, participation: {{name: uniform, clients: 3}}}}"
    path = written(tmp_path, phases=f"[{pretrain}, {fedalt}, {few}, {tune % 'full'}]")
    folder, _ = deploy(tmp_path, path)
    same_run(folder, simulate(tmp_path, path))
    assert [row["participants"] for row in rows(folder)[-2:]] == [2, 7]


@pytest.mark.parametrize("pace", ["{name: buffered, concurrency: 4, buffer: 2}", "{name: deadline, seconds: 20}"])
def test_other_paces_train_on_nodes_too(tmp_path, pace):
    folder, _ = deploy(tmp_path, written(tmp_path, pace=pace, rounds=12))
    last = rows(folder)[-1]
    assert last["round"] == 12
    assert last["test.loss"] < rows(folder)[0]["test.loss"] - 0.2


def repacked(change):
    """What `change` makes of the tensors of an answer, by name."""
    return lambda records: altered(records, arrays=wire.pack(change(wire.unpack(records["arrays"]))))


wrong_shape = repacked(lambda tensors: tensors | {next(iter(tensors)): torch.zeros(1, 1)})
lacking = repacked(lambda tensors: dict([*tensors.items()][1:]))


def scaled(factor):
    return repacked(lambda tensors: {name: tensor * factor for name, tensor in tensors.items()})


def config(**changes):
    return lambda records: altered(records, config=ConfigRecord(dict(records["config"].items()) | changes))


def altered(records, **changes):
    return RecordDict(dict(records.items()) | changes)


SPOILT = {
    "wrong shape": (wrong_shape, "rejected", "update has float32"),
    "NaN": (scaled(float("nan")), "rejected", "update is not finite"),
    "huge": (scaled(1e6), "rejected", "update is longer than 50"),
    "missing keys": (lacking, "rejected", "update lacks"),
    "foreign strategy": (config(strategy="krum"), "rejected", "strategy 'krum', not to 'fedavg'"),
    "another version": (config(version=77), "rejected", "version 77"),
    "other clients": (config(clients=[0, 1]), "rejected", "not that of the clients that were asked"),
    "other bytes": (lambda records: altered(records, arrays=ArrayRecord({"x": Array(np.zeros(3))})), "rejected", "not one of safetensors"),
    "no arrays": (lambda records: RecordDict({k: v for k, v in records.items() if k != "arrays"}), "rejected", "no ArrayRecord"),
    "no metrics": (lambda records: RecordDict({k: v for k, v in records.items() if k != "metrics"}), "rejected", "no MetricRecord"),
    "nothing at all": (lambda records: RecordDict(), "rejected", "no ConfigRecord"),
    "a number for a list": (config(clients=5), "rejected", "5 is not a list of whole numbers"),
    "reals for clients": (config(clients=[0.5]), "rejected", "not a list of whole numbers"),
    "nonsense for numbers": (config(clients=["a"]), "rejected", "cannot be read"),
    "an error": (lambda records: Error(2, "<class 'ValueError'>:<'no'>"), "lost", "the client program failed"),
    "a node that left": (lambda records: Error(5, "gone"), "lost", "the node is gone"),
    "silence": (lambda records: None, "lost", "no answer within"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_is_malformed_is_counted_with_its_reason_and_the_run_goes_on(tmp_path, case):
    spoil, kind, reason = SPOILT[case]
    path = written(tmp_path)
    settings = dataclasses.replace(QUICK, limit=50.0, patience=0.5)
    folder, _ = deploy(tmp_path, path, settings=settings, spoil=lambda node, turn, records: spoil(records) if node == 101 else records)
    found = rows(folder)[1:]
    assert len(found) == 3
    assert sum(row[kind] for row in found) > 0
    assert sum(row["participants"] for row in found) > 0
    said = [why for row in found for why in row.get(f"{kind}_clients", {})]
    assert said
    assert all(reason in why for why in said), said
    assert all({i % 3 for i in who} == {1} for row in found for who in row.get(f"{kind}_clients", {}).values())
    model = load_file(folder.path / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in model.values())


@pytest.fixture
def looks(monkeypatch):
    """Nodes are looked for all the time."""
    monkeypatch.setattr(nodes, "LOOK", 0.0)


def test_nodes_come_and_go(tmp_path, looks):
    """Node 101 leaves in its second round; node 103 brings its clients back later."""
    path = written(tmp_path, rounds=6)
    near: list[NearGrid] = []

    def spoil(node, turn, records):
        grid = near[0]
        if node == 101 and turn == 1:
            grid.nodes[101].gone = True
            return Error(5, "gone")
        if node == 100 and turn == 3:
            grid.nodes[103] = grid.node(103, NODES[1])
        return records

    settings = dataclasses.replace(QUICK, output=str(tmp_path / "run"))
    near.append(NearGrid(client_app(path), NODES, spoil))
    folder = run(path, near[0], settings)
    taken = [set(json.loads(line)["ids"]) for line in (folder.path / "clients.jsonl").read_text().splitlines()]
    absent = [not any(i % 3 == 1 for i in ids) for ids in taken]
    assert not absent[0]
    assert any(absent[1:-1])
    assert near[0].nodes[103].seen > 0


def test_a_node_that_takes_the_place_of_another_is_asked_again_once_that_one_is_gone(tmp_path, looks):
    """Node 103 brings the clients of node 101 while Flower still lists that one, which leaves a few looks later."""
    path = written(tmp_path)
    near, world = NearGrid(client_app(path), NODES), build(load(path)[0])
    there = Nodes(near, world.data)
    there.gather(3, 5.0)
    near.nodes[103] = near.node(103, NODES[1])
    for _ in range(4):
        there.look()
    assert there.here == {100, 101, 102}
    asked = len(near.pushed)
    there.look()
    assert len(near.pushed) == asked  # not over and over
    near.nodes[101].gone = True
    there.look()
    assert there.here == {100, 102, 103}
    assert there.held.all()


ALONE = [{"partition-id": 0, "num-partitions": 1}]


class Deserted(NearGrid):
    """A grid of one node that leaves in its third turn, and is back after so many looks."""

    absent = 10**9

    def __post_init__(self):
        super().__post_init__()
        self.spoil = self.leave

    def leave(self, node, turn, records):
        if turn != 2:
            return records
        self.nodes[node].gone = True
        return Error(5, "gone")

    def get_node_ids(self):
        if self.nodes[100].gone:
            self.absent -= 1
            self.nodes[100].gone = self.absent > 0
        return super().get_node_ids()


def test_without_any_node_the_run_ends_unfinished_and_goes_on_later(tmp_path, looks):
    path = written(tmp_path, rounds=6)
    settings = dataclasses.replace(QUICK, output=str(tmp_path / "run"), patience=0.3)
    with pytest.raises(FedsimError, match=r"no node with data has been there for 0\.3 seconds; the run can go on"):
        run(path, Deserted(client_app(path), ALONE), settings)
    folder = Folder(tmp_path / "run")
    assert rows(folder)[-1]["round"] == 3
    assert not folder.finished
    assert deploy(tmp_path, path, "run", ALONE, dataclasses.replace(QUICK, resume=True))[0].finished


def test_a_round_waits_for_the_only_node(tmp_path, looks):
    path = written(tmp_path, rounds=6)
    grid = Deserted(client_app(path), ALONE)
    grid.absent = 20
    found = rows(run(path, grid, dataclasses.replace(QUICK, output=str(tmp_path / "run"))))[1:]
    assert [row["participants"] > 0 for row in found] == [True, True, False, True, True, True]


def test_two_nodes_cannot_hold_one_client(tmp_path, capsys):
    path = written(tmp_path, rounds=1)
    folder, _ = deploy(tmp_path, path, configs=[*NODES, {"clients": "0,1"}], settings=dataclasses.replace(QUICK, nodes=3))
    assert "which another node holds" in capsys.readouterr().out
    assert folder.finished


class Boasts(NearGrid):
    """Node 101 says what `change` makes of its description."""

    change: ClassVar = {}

    def _answer(self, message):
        reply = super()._answer(message)
        if message.metadata.message_type != "query.describe" or message.metadata.dst_node_id != 101:
            return reply
        record = dict(reply.content["config"].items())
        changed = {name: change(record[name]) for name, change in self.change.items()}
        return Message(RecordDict({"config": ConfigRecord(record | changed)}), reply_to=message)


def many(counts):
    return [10**15] * len(counts)


CLAIMS = {
    "train": ({"sizes": many}, "says that client 1 has 1000000000000000 examples, where the scenario's data give it"),
    "calibration": ({"calibration": many}, "says that client 1 has 1000000000000000 examples"),
    "test": ({"tests": lambda counts: [n + 1 for n in counts]}, "says that client 1 has"),
    "own": ({"sizes": many, "own": lambda own: True}, "has 1000000000000000 examples of its own; 2147483648 are the most that count"),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_a_node_that_claims_what_it_does_not_have_is_left_alone(tmp_path, capsys, case):
    path = written(tmp_path)
    grid, world = Boasts(client_app(path), NODES), build(load(path)[0])
    grid.change, why = CLAIMS[case]
    there = Nodes(grid, world.data, poll=0.001)
    there.gather(2, 5.0)
    there.look(now=True)
    assert there.here == {100, 102}
    assert there.sizes.max() < 10**6
    assert why in capsys.readouterr().out


def test_a_node_with_data_of_its_own_says_how_many(tmp_path):
    path = written(tmp_path)
    grid, world = Boasts(client_app(path), NODES), build(load(path)[0])
    grid.change = {"sizes": lambda counts: [2**31] * len(counts), "own": lambda own: True}
    there = Nodes(grid, world.data, poll=0.001)
    there.gather(3, 5.0)
    assert there.sizes[[1, 4]].tolist() == [2**31] * 2


def test_without_nodes_it_says_what_to_do(tmp_path):
    with pytest.raises(FedsimError, match="start SuperNodes"):
        deploy(tmp_path, written(tmp_path), configs=[], settings=dataclasses.replace(QUICK, wait=0.1))


def test_resume_needs_the_folder_to_go_on_with(tmp_path):
    path = written(tmp_path)
    with pytest.raises(FedsimError, match="resume=true goes on with the run in `output`; name that, too"):
        run(path, NearGrid(client_app(path), NODES), dataclasses.replace(QUICK, resume=True))


def test_a_deployed_run_goes_on_where_it_was_left(tmp_path):
    path = written(tmp_path, "fedau", rounds=5)
    straight, _ = deploy(tmp_path, path, "straight")

    class Cut(Exception):
        pass

    def cut(node, turn, records):
        if node == 100 and turn == 3:
            raise KeyboardInterrupt
        return records

    with pytest.raises(KeyboardInterrupt):
        deploy(tmp_path, path, "cut", spoil=cut)
    assert 0 < rows(Folder(tmp_path / "cut"))[-1]["round"] < 5
    resumed, _ = deploy(tmp_path, path, "cut", settings=dataclasses.replace(QUICK, resume=True))
    same_run(resumed, straight)
    with pytest.raises(FedsimError, match="finished"):
        deploy(tmp_path, path, "cut", settings=dataclasses.replace(QUICK, resume=True))


def test_the_seed_does_not_decide_noise_that_protects(tmp_path):
    """Client level (the server's noise) and example level (the clients'): two deployed runs of one seed differ, two simulations do not."""
    for strategy in (
        f"{{name: dp, inner: {{name: fedavg, {SGD}, weights: uniform}}, clip: 1.0, noise: 1.0}}",
        "{name: fedavg, local: {name: dp-sgd, lr: 0.05, noise: 1.0, clip: 1.0, batch_size: 16, steps: 2}}",
    ):
        path = written(tmp_path, phases=f"[{{strategy: {strategy}, rounds: 1}}]")
        text = path.read_text().replace("fleet: ", "privacy: {delta: 1.0e-5}\nfleet: ")
        path.write_text(text)
        here = tmp_path / str(abs(hash(strategy)))
        here.mkdir()
        models = [load_file(deploy(here, path, name)[0].path / "model.safetensors") for name in ("one", "two")]
        again = [load_file(simulate(here, path, name).path / "model.safetensors") for name in ("three", "four")]
        assert not any(torch.equal(models[0][name], models[1][name]) for name in models[0])
        assert all(torch.equal(again[0][name], again[1][name]) for name in again[0])


def test_data_of_a_node_s_own_that_mean_something_else_are_left_out_with_the_reason(tmp_path, capsys):
    path = written(tmp_path, rounds=1)
    text = path.read_text().replace(", client_test: 0.4, calibration: 0.5", "").replace("evaluate: {clients: true}\n", "")
    path.write_text(text)
    good, bad = ({"partition-id": i, "data": str(tmp_path / f"{i}.npz")} for i in range(2))
    for i, classes in enumerate((10, 12)):
        y = np.arange(60) % classes
        np.savez(tmp_path / f"{i}.npz", x=np.random.default_rng(i).random((60, 1, 8, 8), dtype=np.float32), y=y)
    folder, _ = deploy(tmp_path, path, configs=[good, bad], settings=dataclasses.replace(QUICK, nodes=1))
    assert "has the class '10', which is none of the scenario's: 0, 1, 2" in capsys.readouterr().out
    taken = [json.loads(line)["ids"] for line in (folder.path / "clients.jsonl").read_text().splitlines()]
    assert all(ids in ([], [0]) for ids in taken)
