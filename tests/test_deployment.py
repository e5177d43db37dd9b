"""A scenario over real Flower processes on loopback: a SuperLink and three SuperNodes, TLS on, nodes authenticated.

The nodes are started once and serve all strategies. `pytest -m deployment` runs these alone, `-m "not deployment"` everything else.
"""

import signal
import time

import pytest

from fedsim.flower import local
from fedsim.flower.bundle import PACKAGE, write_app
from fedsim.flower.local import Federation
from fedsim.folder import Folder
from fedsim.scenario import load
from tests.test_flower_port import STRATEGIES, rows, same_run, simulate, written

pytestmark = pytest.mark.deployment
SLOW = 120.0  # seconds that something may take on a busy machine


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    with Federation(3, work=tmp_path_factory.mktemp("federation")) as running:
        yield running


def until(ready, what, seconds=SLOW):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := ready():
            return found
        time.sleep(0.1)
    raise AssertionError(f"never came: {what()}")


def app_of(tmp_path, path, name="app"):
    return write_app(load(path)[0], tmp_path / name)


def deploy(federation, tmp_path, path, name="deployed", app=None, **settings):
    """Run a scenario on the nodes; its folder."""
    folder = Folder(tmp_path / name)
    run = federation.run(app or app_of(tmp_path, path, f"app-{name}"), output=folder.path, nodes=3, quiet=True, **settings)
    until(lambda: folder.finished or run.poll() is not None, lambda: federation.log("run")[-2000:])
    assert folder.finished, federation.log("run")[-3000:]
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_real_nodes_give_the_simulation_s_model_and_metrics(federation, tmp_path, strategy):
    path = written(tmp_path, strategy, rounds=2)
    same_run(deploy(federation, tmp_path, path), simulate(tmp_path, path))


def test_fedbuff_on_real_nodes_converges(federation, tmp_path):
    path = written(tmp_path, pace="{name: buffered, concurrency: 4, buffer: 2}", rounds=10)
    path.write_text(path.read_text().replace("name: fedavg", "name: fedbuff"))
    found = rows(deploy(federation, tmp_path, path))
    assert [row["round"] for row in found] == list(range(11))
    assert all(row["participants"] == 2 for row in found[1:])
    assert found[-1]["test.loss"] < found[0]["test.loss"] - 0.2
    assert any(row.get("staleness.max", 0) > 0 for row in found)


SPOILS = """
from flwr.app import Message, RecordDict

from fedsim.flower import wire

honest = client
client = type(honest)()


def spoil(message, context):
    reply = honest(message, context)
    if context.node_config["partition-id"] != 1:
        return reply
    records = dict(reply.content.items())
    tensors = wire.unpack(records["arrays"])
    name = sorted(tensors)[0]
    if message.content["config"]["version"] == 0:
        tensors[name] *= float("nan")
    else:
        del tensors[name]
    return Message(RecordDict(records | {"arrays": wire.pack(tensors)}), reply_to=message)


client.train()(spoil)
client.evaluate()(honest)
client.query("describe")(honest)
"""


def test_a_node_that_sends_nonsense_is_counted_and_the_run_goes_on(federation, tmp_path):
    path = written(tmp_path, rounds=2)
    path.write_text(path.read_text().replace("mean: 0.7", "mean: 1.0"))
    app = app_of(tmp_path, path)
    with open(app / PACKAGE / "app.py", "a") as file:
        file.write(SPOILS)
    first, second = rows(deploy(federation, tmp_path, path, app=app))[1:]
    assert first["rejected_clients"] == {"update is not finite": [1, 4]}
    assert second["rejected"] == 2
    assert next(iter(second["rejected_clients"])).startswith("update lacks")
    assert first["participants"] == second["participants"] == 5


def test_the_operating_system_decides_noise_on_real_nodes_not_the_seed(federation, tmp_path):
    path = written(tmp_path, rounds=1)
    private = "local: {name: dp-sgd, lr: 0.05, noise: 1.0, clip: 1.0, batch_size: 16, steps: 2}"
    path.write_text(path.read_text().replace(STRATEGIES["fedavg"], f"{{name: fedavg, {private}}}"))
    one, two = (deploy(federation, tmp_path, path, name) for name in ("one", "two"))
    assert (one.path / "model.safetensors").read_bytes() != (two.path / "model.safetensors").read_bytes()
    assert rows(one)[-1]["bytes_up"] == rows(two)[-1]["bytes_up"]


def test_a_node_without_a_registered_key_and_one_with_another_ca_are_refused(federation, tmp_path):
    local.write_node_key(tmp_path / "stranger")
    local.write_certificates(tmp_path / "tls")
    federation.start_node(7, "partition-id=0 num-partitions=3", key=tmp_path / "stranger", name="stranger")
    local.write_node_key(federation.key(8))
    federation.register(8)
    federation.start_node(8, "partition-id=0 num-partitions=3", root=tmp_path / "tls" / "ca.crt", name="misled")
    until(lambda: federation.processes["stranger"].poll() is not None, lambda: federation.log("stranger")[-2000:])
    assert federation.processes["stranger"].returncode != 0
    until(lambda: "CERTIFICATE_VERIFY_FAILED" in federation.log("misled"), lambda: federation.log("misled")[-2000:])
    for name in ("stranger", "misled"):
        assert "SuperNode ID" not in federation.log(name)
        federation.stop(name)


def test_a_node_that_is_killed_is_counted_and_the_run_goes_on_without_it(federation, tmp_path):
    path = written(tmp_path, rounds=6)
    path.write_text(path.read_text().replace("mean: 0.7", "mean: 1.0"))
    folder = Folder(tmp_path / "deployed")
    run = federation.run(app_of(tmp_path, path), output=folder.path, nodes=3, quiet=True, patience=6.0)
    log = lambda: federation.log("run")[-2000:]  # noqa: E731
    until(lambda: len(folder.rows()) > 2 if (folder.path / "metrics.jsonl").exists() else False, log)
    federation.stop("node1", signal.SIGKILL)
    until(lambda: folder.finished or run.poll() is not None, log, 2 * SLOW)
    assert folder.finished, log()
    found = rows(folder)[1:]
    lost = [row["round"] for row in found if row["lost"]]
    assert lost
    assert all({i % 3 for who in row.get("lost_clients", {}).values() for i in who} <= {1} for row in found)
    assert all(row["participants"] >= 5 for row in found)
    assert found[0]["participants"] == 7
    assert [row["round"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert found[-1]["participants"] == 5


def test_a_node_that_comes_late_takes_part_from_then_on(federation, tmp_path):
    path = written(tmp_path, rounds=16)
    path.write_text(path.read_text().replace("mean: 0.7", "mean: 1.0"))
    if "node1" in federation.processes:
        federation.stop("node1")
    local.write_node_key(federation.key(9))
    federation.register(9)
    folder = Folder(tmp_path / "deployed")
    run = federation.run(app_of(tmp_path, path), output=folder.path, nodes=2, quiet=True)
    log = lambda: federation.log("run")[-2000:] + federation.log("late")[-2000:]  # noqa: E731
    until(lambda: len(folder.rows()) > 2 if (folder.path / "metrics.jsonl").exists() else False, log)
    federation.start_node(9, "partition-id=1 num-partitions=3", name="late")
    until(lambda: folder.finished or run.poll() is not None, log)
    assert folder.finished, log()
    found = rows(folder)[1:]
    assert [row["round"] for row in found] == list(range(1, 17))
    assert found[0]["participants"] == 5
    assert found[-1]["participants"] == 7
    assert not any(row["lost"] or row["rejected"] for row in found)
