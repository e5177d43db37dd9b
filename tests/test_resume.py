"""A run that was killed, interrupted or left goes on to the same bits."""

import os
import random
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from command import Command, finished, wait_until

from fedsim import experiment, session
from fedsim.errors import FedsimError
from fedsim.folder import Folder
from fedsim.manifest import as_began
from fedsim.scenario import load, load_plugins
from fedsim.sim.cohort import Trainer
from fedsim.sim.executor import Inline
from fedsim.sim.jobs import Kept

SCENARIO = """\
# Two phases over a fleet with a memory of its own (Markov), the first with device memory (SCAFFOLD).
name: resume
seed: 3
data:
  source: digits
  clients: 12
  client_test: 0.2
  partition: {name: dirichlet, alpha: 0.5}
model: {name: mlp, hidden: [32]}
fleet:
  participation: {name: markov, off_to_on: 0.3, rates: {name: uniform-range, low: 0.2, high: 0.8}}
phases:
  - {strategy: {name: scaffold, local: {name: scaffold-sgd, lr: 0.05}}, rounds: 25}
  - {strategy: {name: fedadam, local: {name: sgd, lr: 0.05}}, rounds: 25}
evaluate: {every: 7, clients: true}
output: {checkpoint: 4}
engine: {workers: 0}
"""
ROUNDS = 50

load_plugins()  # a checkpoint holds the records of strategies


def outcome(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "metrics.jsonl").read_bytes(), (folder / "model.safetensors").read_bytes()


def wait_for_rows(folder: Path, count: int, command: Command) -> None:
    """Until a run has logged `count` rows."""
    log = folder / "metrics.jsonl"
    wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") >= count, command)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    here = tmp_path_factory.mktemp("straight")
    (here / "scenario.yaml").write_text(SCENARIO)
    finished("run", here / "scenario.yaml", "--output", here / "run", "--quiet")
    return here


def test_killed_again_and_again_then_the_same_bits(straight, tmp_path):
    folder = tmp_path / "run"
    kills = sorted(random.Random(1).sample(range(2, ROUNDS), 3))
    for attempt, rows in enumerate(kills):
        with Command("run", *(("--resume", folder) if attempt else (straight / "scenario.yaml", "--output", folder))) as process:
            wait_for_rows(folder, rows + 1, process)
        assert process.code == -signal.SIGKILL
        assert not (folder / "model.safetensors").exists()
    with open(folder / "metrics.jsonl", "a") as log:
        log.write('{"round": 49, "torn')  # a line that a crash cut off
    done = finished("run", "--resume", folder)
    assert outcome(folder) == outcome(straight / "run")
    assert "Final test.accuracy" in done.output


ASYNCHRONOUS = """\
# Always eight at work, on devices of which some are very slow, with everything that can go wrong.
name: asynchronous
seed: 5
data: {source: digits, clients: 20, partition: {name: dirichlet, alpha: 0.5}}
model: {name: mlp, hidden: [32]}
fleet:
  latency:
    compute: {name: pareto, least: 0.01, shape: 1.1}
    up: {name: lognormal, median: 10000.0}
    jitter: 0.3
  faults: {drop: {training: 0.1}, duplicate: 0.1, corrupt: {nan: 0.05}, straggle: {rate: 0.1, factor: 5.0}}
  channel: {up: {noise: 0.001}}
pace: {name: buffered, concurrency: 8, buffer: 3}
strategy: {name: fedasync, local: {name: sgd, lr: 0.05}}
rounds: 60
output: {checkpoint: 4}
engine: {workers: 0}
"""


def test_an_asynchronous_run_that_is_killed_goes_on_to_the_same_bits(tmp_path):
    scenario = tmp_path / "scenario.yaml"
    scenario.write_text(ASYNCHRONOUS)
    finished("run", scenario, "--output", tmp_path / "straight", "--quiet")
    folder = tmp_path / "run"
    with Command("run", scenario, "--output", folder) as process:
        wait_for_rows(folder, 23, process)
    assert process.code == -signal.SIGKILL
    in_flight = Folder(folder).latest()[1]["port"]["clock"]
    assert len(in_flight["ahead"]["due"]) >= 5
    assert any(isinstance(group["kept"], Kept) for _, group in in_flight["groups"])  # trained, and not due yet
    finished("run", "--resume", folder, "--quiet")
    assert outcome(folder) == outcome(tmp_path / "straight")
    last = Folder(folder).rows()[-1]
    assert last["time"] > 0
    assert {"lost", "rejected", "participants"} <= last.keys()


class Breaking(Inline):
    """Is interrupted at one of the calls of a method."""

    def __init__(self, trainer: Trainer, method: str, calls: int):
        super().__init__(trainer)
        self.method, self.calls = method, calls

    def map(self, method: str, shared: Any, items: list[Any]) -> list[Any]:
        self.calls -= method == self.method
        if not self.calls:
            raise KeyboardInterrupt
        return super().map(method, shared, items)


BROKEN = {  # scenario, method, at which of its calls
    "training": (SCENARIO, "train", 23),
    "evaluation": (SCENARIO, "measure", 4),
    "asynchronous training": (ASYNCHRONOUS, "train", 31),
    "asynchronous evaluation": (ASYNCHRONOUS, "measure", 31),
}


@pytest.mark.parametrize("case", BROKEN)
def test_of_a_round_that_is_broken_off_nothing_is_left(tmp_path, case):
    text, method, calls = BROKEN[case]
    (tmp_path / "scenario.yaml").write_text(text.replace("checkpoint: 4", "checkpoint: 1000"))
    scenario, _ = load(tmp_path / "scenario.yaml")
    for name in ("straight", "broken"):
        world, folder = session.begin(scenario, tmp_path / name)
        breaking = Breaking(world.trainer(), method, calls if name == "broken" else -1)
        try:
            with closing(breaking):
                list(experiment.train(scenario, world, folder, executor=breaking))
        except KeyboardInterrupt:
            last = folder.rows()[-1]["round"]
            assert 3 < last < ROUNDS
            assert last % 25
            assert folder.latest()[0] == last
            list(experiment.train(scenario, world, folder))
        folder.unlock()
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "straight")


def test_ctrl_c_finishes_the_round_checkpoints_and_says_how_to_go_on(straight, tmp_path):
    folder = tmp_path / "run"
    with Command("run", straight / "scenario.yaml", "--output", folder) as process:
        wait_for_rows(folder, 3, process)
        process.signal(signal.SIGINT)
        assert process.wait() == 130, process.errors
    errors = process.errors
    last = Folder(folder).rows()[-1]["round"]
    assert f"Interrupted after round {last} of {ROUNDS}" in errors
    assert f"fedsim run --resume {folder}" in errors
    assert Folder(folder).latest()[0] == last
    assert not [p for p in folder.rglob("*") if ".lock" in p.name or p.name.startswith(".")]
    finished("run", "--resume", folder, "--quiet")
    assert outcome(folder) == outcome(straight / "run")


def test_two_processes_never_write_to_one_folder(tmp_path):
    folder = tmp_path / "run"
    with Command("run", "quickstart", "--set", "rounds=1000000", "--set", "engine.workers=0", "--output", folder) as first:
        wait_for_rows(folder, 1, first)
        second = finished("run", "--resume", folder, code=1)
    assert "another process is running in this folder" in second.errors


def test_a_finished_run_is_shown_not_run_again(straight):
    before = outcome(straight / "run")
    assert "This run is finished" in finished("run", "--resume", straight / "run").output
    assert outcome(straight / "run") == before


def test_checkpoints_are_pruned_and_a_broken_one_is_named(straight, tmp_path):
    folder = Folder(straight / "run")
    assert [p.stem for p in folder.checkpoints()] == ["round-00000048", "round-00000050"]
    (tmp_path / "checkpoints").mkdir()
    broken = tmp_path / "checkpoints" / "round-00000008.json"
    broken.write_text("{")
    with pytest.raises(FedsimError, match=r"round-00000008\.json: cannot be read .*delete it to go on from the one before"):
        Folder(tmp_path).latest()
    broken.write_text('{"format": 99, "round": 8}')
    (tmp_path / "checkpoints" / "round-00000008.safetensors").write_bytes((folder.path / "model.safetensors").read_bytes())
    with pytest.raises(FedsimError, match="format 99"):
        Folder(tmp_path).latest()


def test_changed_data_are_refused_and_other_versions_are_warned_of(straight, tmp_path):
    folder = tmp_path / "run"
    with Command("run", straight / "scenario.yaml", "--output", folder) as process:
        wait_for_rows(folder, 2, process)
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"numpy": "', '"numpy": "0.'))
    assert "warning: numpy 0." in finished("run", "--resume", folder, "--quiet").errors
    os.unlink(folder / "model.safetensors")
    manifest.write_text(text.replace('"partition": "', '"partition": "0'))
    assert "the data or their partition have changed" in finished("run", "--resume", folder, code=1).errors


@pytest.mark.parametrize(
    ("asked", "began", "gpu", "device"),
    [
        ("auto", "cpu", True, "cpu"),
        ("auto", "cuda", True, "cuda"),
        ("auto", "cuda", False, "auto"),  # another machine; differences are warned of
        ("cuda", "cpu", True, "cuda"),
    ],
)
def test_a_run_goes_on_on_the_device_where_it_began(asked, began, gpu, device, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    (tmp_path / "resume.yaml").write_text(SCENARIO)
    scenario, _ = load(tmp_path / "resume.yaml", (f"engine.device={asked}",))
    assert as_began(scenario, {"engine": {"device": began}}).engine.device == device


def test_a_name_that_looks_like_a_number_survives_a_resume(straight, tmp_path):
    folder = tmp_path / "run"
    finished("run", straight / "scenario.yaml", "--set", "name='1e3'", "--output", folder, "--quiet")
    assert "This run is finished" in finished("run", "--resume", folder).output
