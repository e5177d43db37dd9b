"""What a node of ours does beyond Flower's: a worker that ends is replaced, and what was given up is forgotten."""

import os
import signal
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError

from fedsim.flower import node, polling


def until(ready):
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if found := ready():
            return found
        time.sleep(0.02)
    raise AssertionError("never came")


def test_a_worker_that_ends_is_started_again_until_the_node_ends(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(node, "AGAIN", 0.1)
    said = tmp_path / "said"
    script = f"import os, time\nwith open({str(said)!r}, 'a') as f: print(os.getpid(), file=f)\ntime.sleep(600)"
    pids = lambda: [int(line) for line in said.read_text().split()] if said.exists() else []  # noqa: E731
    end = node.keep([sys.executable, "-c", script])
    until(pids)
    os.kill(pids()[0], signal.SIGKILL)
    until(lambda: len(pids()) == 2)
    end()
    until(lambda: not psutil.pid_exists(pids()[1]))
    time.sleep(0.3)
    assert len(pids()) == 2
    assert "the worker has ended (-9); another is started" in capfd.readouterr().out


@pytest.mark.parametrize("option", ["--ssl-certfile", "--ssl-ca-certfile", "--appio-ssl-keyfile", "--superexec-auth-secret-file"])
def test_options_with_which_its_worker_would_get_no_work_are_refused(option, monkeypatch, capsys):
    def started(*_):
        raise AssertionError("a worker was started")

    monkeypatch.setattr(node, "keep", started)
    monkeypatch.setattr(sys, "argv", ["node", "--insecure", "--superlink", "127.0.0.1:1", option, "file"])
    with pytest.raises(SystemExit) as ended:
        node.main()
    assert ended.value.code == 2
    assert f"{option.replace('appio-', '')}: the worker of this command would get no work" in capsys.readouterr().err


class Kept:
    """A store that notes what is deleted from it."""

    def __init__(self):
        self.deleted = []

    def delete_messages(self, message_ids):
        self.deleted += message_ids

    def delete(self, number):
        self.deleted.append(number)


@pytest.mark.parametrize("run", [None, 7])
def test_a_message_that_was_given_up_is_forgotten_and_no_other(run):
    message = SimpleNamespace(metadata=SimpleNamespace(message_id="m1"))
    state, store = Kept(), Kept()

    def pull(state, object_store, receive, node_config):
        assert node_config == {"partition-id": 0}
        assert receive()[0] is message
        return run

    found = node.forgetting(pull)(state=state, object_store=store, receive=lambda: (message, None), node_config={"partition-id": 0})
    assert found == run
    assert state.deleted == store.deleted == (["m1"] if run is None else [])


def test_nothing_is_forgotten_where_nothing_came():
    state, store = Kept(), Kept()
    assert node.forgetting(lambda state, object_store, receive: receive())(state=state, object_store=store, receive=lambda: None) is None
    assert state.deleted == store.deleted == []


def test_a_part_that_is_late_is_asked_for_again_soon_and_one_that_never_comes_is_given_up(monkeypatch):
    for function in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        monkeypatch.setattr(function, "__kwdefaults__", dict(function.__kwdefaults__))
    polling.look_soon(0.3)
    asked = []

    def late(number):
        asked.append(number)
        if number == "never" or len(asked) < 3:
            raise ObjectUnavailableError(number)
        return b"there"

    began = time.monotonic()
    assert inflatable_utils.pull_objects(["a"], late) == {"a": b"there"}
    assert time.monotonic() - began < 0.6  # Flower itself: at least 0.8 + 1.6
    with pytest.raises(ObjectPullError):
        inflatable_utils.pull_objects(["never"], late)
