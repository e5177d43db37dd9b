"""A scenario in Flower's own simulation: the run folder of ours, and its numbers. Starts Ray; about half a minute."""

import json
import math
import signal
import time

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from fedsim import session
from fedsim.cli import app
from fedsim.folder import Folder
from fedsim.report import render
from fedsim.scenario import load
from tests.command import Command, wait_until

SCENARIO = """
name: both
data: {source: digits, clients: 4, partition: {name: dirichlet, alpha: 0.5}, client_test: 0.2}
model: {name: mlp, hidden: [16]}
fleet: {participation: {name: uniform, clients: 3}}
strategy: scaffold
rounds: 3
evaluate: {clients: true}
"""


def fedsim(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "both.yaml"
    file.write_text(SCENARIO)
    return file


@pytest.mark.filterwarnings("ignore")  # Flower's simulation deprecates itself, and Ray leaves sockets to the collector
def test_flowers_simulation_gives_our_numbers(file, tmp_path):
    """SCAFFOLD, whose devices remember: memory lives in Flower's contexts."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    done = fedsim("run", file, "--output", theirs, "--runtime", "flower-simulation", "--set", "engine.workers=1", "--json")
    assert done.exit_code == 0, done.output
    done = fedsim("run", file, "--output", ours, "--set", "engine.workers=0", "--json")
    assert done.exit_code == 0, done.output
    here, there = ([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (ours, theirs))
    assert len(here) == len(there) == 4
    for a, b in zip(here, there, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"time"}:
            same = math.isclose(a[name], b[name], rel_tol=0, abs_tol=1e-5) if isinstance(a[name], float) else a[name] == b[name]
            assert same, name
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    final, other = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert max((value - other[name]).abs().max() for name, value in final.items()) <= 1e-5


def test_ctrl_c_ends_flowers_simulation_in_seconds_and_leaves_the_run_unfinished(file, tmp_path):
    folder = Folder(tmp_path / "run")
    settings = ["--set", "engine.workers=1", "--set", "rounds=5000"]
    with Command("run", file, "--output", folder.path, "--runtime", "flower-simulation", *settings) as command:
        wait_until(lambda: len(folder.rows()) > 2, command)
        began = time.monotonic()
        command.signal(signal.SIGINT)
        assert command.wait(30) == 130
        assert time.monotonic() - began < 20
        assert "Interrupted. Flower's simulation begins anew." in command.errors
    assert not folder.finished
    assert folder.rows()[-1]["round"] < 5000


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("pace={name: deadline, seconds: 1}", "only `sync` can be compared"),
        ("fleet.faults.drop.training=0.1", "neither latency nor faults nor a channel"),
    ],
)
def test_what_cannot_be_compared_is_refused(file, tmp_path, setting, why):
    more = ["--set", "strategy=fedavg"]
    done = fedsim("run", file, "--output", tmp_path / "out", "--runtime", "flower-simulation", *more, "--set", setting)
    assert done.exit_code == 2
    assert why in done.output


@pytest.mark.parametrize(
    ("began", "command", "said"),
    [
        ("flower-simulation", ["run", "--resume"], "its nodes forget, so it cannot be continued; run its scenario again"),
        ("flower", ["run", "--resume"], "go on with: fedsim deploy --resume {} --local N"),
        ("simulation", ["deploy", "--local", "2", "--resume"], "go on with: fedsim run --resume {}"),
    ],
)
def test_a_run_goes_on_only_where_it_began(file, tmp_path, began, command, said):
    _, folder = session.begin(load(file)[0], tmp_path / "run", began)
    folder.unlock()
    done = fedsim(*command, folder.path)
    assert done.exit_code == 1
    assert f"this run began with the runtime '{began}'; " + said.format(folder.path) in " ".join(done.output.split())
    page, _ = render(folder.path)
    assert ("fedsim run --resume" in page) == (began == "simulation")
    assert ("fedsim deploy --resume" in page) == (began == "flower")


def test_a_runtime_that_does_not_exist(file):
    done = fedsim("run", file, "--runtime", "flower-simulatoin")
    assert done.exit_code == 2
    assert "did you mean 'flower-simulation'?" in done.output
