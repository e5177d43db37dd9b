"""A scenario over real Flower processes on loopback: a SuperLink and three SuperNodes, TLS on, nodes authenticated.

The nodes are started once and serve all strategies. `pytest -m deployment` runs these alone, `-m "not deployment"` everything else.
"""

import os
import signal
import subprocess
import sys
import time

import psutil
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


def test_a_superlink_that_starts_again_with_its_database_knows_its_nodes_and_the_run_goes_on(tmp_path):
    path = written(tmp_path, rounds=6)
    folder, straight = Folder(tmp_path / "deployed"), simulate(tmp_path, path)
    with Federation(3, work=tmp_path / "federation", database=True, patience=4.0) as federation:
        log = lambda: federation.log("run")[-2000:] + federation.log("superlink")[-2000:]  # noqa: E731
        app = app_of(tmp_path, path)
        federation.run(app, output=folder.path, nodes=3, quiet=True)
        until(lambda: len(folder.rows()) > 2 if (folder.path / "metrics.jsonl").exists() else False, log)
        federation.stop("superlink", signal.SIGKILL)
        federation.stop("run")
        done = rows(folder)[-1]["round"]
        assert done < 6
        federation.start_superlink()  # nodes are not registered again: they find their way back
        run = federation.run(app, output=folder.path, nodes=3, quiet=True, resume=True)
        until(lambda: folder.finished or run.poll() is not None, log)
        assert folder.finished, log()
    same_run(folder, straight)


def test_one_command_deploys_shows_the_result_and_leaves_no_process_behind(tmp_path):
    before = {process.pid for process in psutil.process_iter()}
    command = [sys.executable, "-m", "fedsim.cli", "deploy", "quickstart", "--local", "3", "--set", "rounds=2"]
    done = subprocess.run([*command, "--output", tmp_path / "run"], capture_output=True, text=True, timeout=SLOW)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Final test.accuracy" in done.stdout
    assert rows(Folder(tmp_path / "run"))[-1]["round"] == 2
    assert not left_behind(before)


def test_ctrl_c_ends_every_process_and_says_how_to_go_on(tmp_path):
    before = {process.pid for process in psutil.process_iter()}
    command = [sys.executable, "-m", "fedsim.cli", "deploy", "quickstart", "--local", "2", "--set", "rounds=500"]
    process = subprocess.Popen([*command, "--output", tmp_path / "run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = Folder(tmp_path / "run")
    try:
        until(lambda: len(folder.rows()) > 1, lambda: process.poll())
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=SLOW)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "fedsim deploy --resume" in said
    assert folder.latest() is not None  # a checkpoint
    assert not left_behind(before)


def left_behind(before):
    """Processes of Flower or of ours that were not there before, and are there still."""

    def ours():
        found = []
        for process in psutil.process_iter():
            if process.pid in before or process.pid == os.getpid():
                continue
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if any(word in line for word in ("flower-", "flwr-", "fedsim.flower")):
                found.append(line)
        return found

    end = time.monotonic() + 5
    while ours() and time.monotonic() < end:
        time.sleep(0.1)
    return ours()
