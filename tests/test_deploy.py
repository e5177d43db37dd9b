"""`fedsim deploy` as a person runs it, and a SuperLink that starts again: each with Flower processes of its own.

Beside tests/test_deployment.py, so that two processes can run them at once.
"""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from fedsim.flower.deploy import deploy_locally
from fedsim.flower.local import Federation, signals
from fedsim.folder import Folder
from fedsim.scenario import load
from tests.test_deployment import SLOW, app_of, until
from tests.test_flower_port import rows, same_run, simulate, written

pytestmark = pytest.mark.deployment


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


def deploy(tmp_path, *arguments):
    """The command, started, whose processes can be told by their environment."""
    command = [sys.executable, "-m", "fedsim.cli", "deploy", "quickstart", *arguments, "--output", tmp_path / "run"]
    (tmp_path / "tmp").mkdir()
    mark = os.environ | {MARK: str(tmp_path), "TMPDIR": str(tmp_path / "tmp")}
    mark["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=mark)


MARK = "FEDSIM_TEST"


def at_work(tmp_path):
    """The processes that the command has started, and that are there still."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(tmp_path):
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def left_behind(tmp_path):
    end = time.monotonic() + 5
    while at_work(tmp_path) and time.monotonic() < end:
        time.sleep(0.1)
    return at_work(tmp_path)


SLOW_TRACKER = """
import time
from pathlib import Path


class Slow:
    def __init__(self, scenario, folder): ...

    def log(self, row): ...

    def close(self, finished):
        time.sleep(1.5)
        Path(%r).write_text(str(finished))
"""


def test_one_command_deploys_shows_the_result_and_leaves_no_process_behind(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_TRACKER % str(tmp_path / "closed"))
    (tmp_path / "slow-1.dist-info").mkdir()
    (tmp_path / "slow-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: slow\nVersion: 1\n")
    (tmp_path / "slow-1.dist-info" / "entry_points.txt").write_text("[fedsim.trackers]\nslow = slow:Slow\n")
    process = deploy(tmp_path, "--local", "3", "--set", "rounds=2", "--set", "output.trackers=[slow]")
    said, complaints = process.communicate(timeout=SLOW)
    assert process.returncode == 0, complaints[-3000:]
    assert "Final test.accuracy" in said
    assert rows(Folder(tmp_path / "run"))[-1]["round"] == 2
    assert (tmp_path / "closed").read_text() == "True"
    assert not left_behind(tmp_path)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=lambda how: how.name)
def test_a_signal_ends_every_process_and_says_how_to_go_on(tmp_path, how):
    process = deploy(tmp_path, "--local", "1", "--set", "rounds=500")
    folder = Folder(tmp_path / "run")
    try:
        until(lambda: len(folder.rows()) > 1, lambda: process.poll())
        assert len(at_work(tmp_path)) > 3  # the command, a SuperLink, a SuperNode, and what they started
        assert [*(tmp_path / "tmp").glob("fedsim-*/keys")]
        process.send_signal(how)
        _, said = process.communicate(timeout=SLOW)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "fedsim deploy --resume" in said
    assert folder.latest() is not None  # a checkpoint
    assert not left_behind(tmp_path)
    assert not [*(tmp_path / "tmp").glob("fedsim-*")]


def test_signals_are_a_ctrl_c_meanwhile_and_what_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals(signal.default_int_handler):
            signal.raise_signal(signal.SIGHUP)  # as under `nohup`
            with signals(signal.SIG_IGN):
                signal.raise_signal(signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(KeyboardInterrupt), signals(signal.default_int_handler):
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_had_not_begun_is_not_to_be_resumed(tmp_path, monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Federation, "__enter__", interrupted)
    assert deploy_locally(load(written(tmp_path))[0], Folder.create(tmp_path / "run", ""), 1, False, True, False) == 130
    said = capsys.readouterr().err
    assert "Nothing had begun" in said
    assert "--resume" not in said
