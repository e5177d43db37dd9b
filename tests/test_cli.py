"""The command line as one uses it: quick help, the catalogue, what would run, a run and its folder, resuming."""

import json
import os
import re
import resource
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from fedsim import __version__
from fedsim.cli import KINDS, app
from fedsim.overview import catalogue

FAST = ("--set", "rounds=3", "--set", "evaluate.every=2", "--set", "output.checkpoint=2")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fedsim(*arguments: str | Path) -> Result:
    """The command in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def process(*arguments: str, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, *(("-c", code) if code else ("-m", "fedsim.cli")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=os.environ | environment)


def errors(result: Result) -> list[str]:
    return result.stderr.splitlines()


# Quick answers


def test_help_takes_half_a_second() -> None:
    """Of the processor: others use this machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = process("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert done.stderr == ""
    assert all(command in done.stdout for command in ("run", "compare", "report", "watch", "show", "list", "schema", "version"))
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["version"]], ids=" ".join)
def test_what_needs_no_scenario_imports_nothing_slow(arguments: list[str]) -> None:
    code = f"""
import sys
from fedsim.cli import main
sys.argv = ["fedsim", *{arguments!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(*sys.modules, file=sys.stderr)
"""
    loaded = set(process(code=code).stderr.split())
    assert "fedsim.cli" in loaded
    assert not {"torch", "ray", "numpy", "pandas", "sklearn", "flwr", "flwr_datasets", "datasets", "pydantic", "yaml"} & loaded


def test_the_installed_command_is_this_one() -> None:
    (script,) = entry_points(group="console_scripts", name="fedsim")
    assert script.value == "fedsim.cli:main"
    assert fedsim("version").stdout.strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list", "strategy"), "error: there is no catalogue of 'strategy' (did you mean 'strategies'?); there are: strategies, programs"),
        (("run",), "error: give either a SCENARIO to run, or --resume FOLDER"),
        (("run", "quickstart", "--resume", "x"), "error: give either a SCENARIO to run, or --resume FOLDER"),
        (("run", "--resume", "x", "--set", "rounds=1"), "error: --resume goes on with the scenario in the folder"),
        (("run", "--resume", "x", "--output", "y"), "error: --resume goes on with the scenario in the folder"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, tuple) else None,
)
def test_a_wrong_command_is_refused(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = fedsim(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = errors(result)
    assert line.startswith(message)
    assert not list(tmp_path.iterdir())


# The catalogue and the schema


@pytest.mark.parametrize("kind", KINDS)
def test_list_prints_every_name_with_a_line(kind: str) -> None:
    result = fedsim("list", kind)
    assert result.exit_code == 0
    printed = dict(re.fullmatch(r"  (\S+) +(\S.*)", line).groups() for line in result.stdout.splitlines())  # type: ignore[union-attr]
    assert printed == dict(catalogue(kind))
    assert printed
    assert all(len(line) > 10 for line in printed.values())


def test_list_prints_every_kind() -> None:
    result = fedsim("list")
    headings = [line for line in result.stdout.splitlines() if line and not line.startswith(" ")]
    assert headings == list(KINDS)
    assert all(f"  {name} " in result.stdout for name in ("fedavg", "sgd", "mlp", "digits", "dirichlet", "bernoulli", "sync", "quickstart"))


def test_schema_prints_json() -> None:
    result = fedsim("schema")
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    assert printed["title"] == "Scenario"
    assert {"FedAvg", "Sgd", "Mlp", "Digits", "Dirichlet", "Bernoulli", "Sync"} <= set(printed["$defs"])


# What would run


def test_show_prints_what_would_run(tmp_path: Path) -> None:
    result = fedsim("show", "quickstart")
    assert result.exit_code == 0
    facts = " ".join(result.stdout.split())
    assert "quickstart (seed 1)" in facts
    assert re.search(r"clients 20, with \d+ to \d+ training examples", facts)
    assert "4,810 parameters (19.2 kB)" in facts
    assert re.search(r"a round \d+\.\d clients, \d+ to \d+ steps each \(mean [\d.]+\), [\d.]+ kB down", facts)
    assert not list(tmp_path.iterdir())


def test_show_heeds_overrides() -> None:
    result = fedsim("show", "quickstart", "--set", "data.clients=7", "--set", "model.hidden=[10]", "--set", "fleet.participation=full")
    facts = " ".join(result.stdout.split())
    assert "clients 7, with" in facts
    assert "a round 7.0 clients" in facts
    assert f"{64 * 10 + 10 + 10 * 10 + 10} parameters" in facts


# A run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("runs") / "one"
    return folder, fedsim("run", "quickstart", *FAST, "--output", folder)


def test_a_run_prints_its_result_and_its_folder(finished: tuple[Path, Result]) -> None:
    folder, result = finished
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["round 0/3", "round 2/3", "round 3/3"]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert lines[-2:] == [f"Final test.accuracy: {last['test.accuracy']:.4f}", f"Run folder: {folder}"]
    assert last["test.accuracy"] > 0.4  # three rounds lift it from 0.1


def test_a_run_leaves_a_complete_folder(finished: tuple[Path, Result]) -> None:
    folder, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "clients.jsonl",
        "manifest.json",
        "metrics.jsonl",
        "model.safetensors",
        "scenario.yaml",
        "scores.jsonl",
        "timings.jsonl",
    ]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert [row["round"] for row in rows if "test.accuracy" in row] == [0, 2, 3]
    assert sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values()) == 4810
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["fedsim"] == __version__
    assert manifest["seed"] == 1
    assert manifest["parameters"] == 4810


def test_overrides_are_in_the_scenario_of_the_folder(finished: tuple[Path, Result]) -> None:
    values: dict[str, Any] = yaml.safe_load((finished[0] / "scenario.yaml").read_text())
    assert (values["rounds"], values["evaluate"]["every"], values["output"]["checkpoint"]) == (3, 2, 2)
    assert values["strategy"]["local"]["lr"] == 0.1


def test_a_second_run_in_the_folder_is_refused(finished: tuple[Path, Result]) -> None:
    folder, _ = finished
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = fedsim("run", "quickstart", *FAST, "--output", folder)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = errors(result)
    assert line.startswith(f"error: {folder}: not empty; choose another --output, ")
    assert line.endswith(f"fedsim run --resume {folder}")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_resuming_a_finished_run_only_reports_it(finished: tuple[Path, Result]) -> None:
    folder, _ = finished
    before = (folder / "metrics.jsonl").read_bytes()
    result = fedsim("run", "--resume", folder)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == f"This run is finished: {folder}"
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_the_same_scenario_gives_the_same_bytes_in_another_process(finished: tuple[Path, Result], tmp_path: Path) -> None:
    folder, _ = finished
    done = process("run", "quickstart", *FAST, "--output", "two", "--quiet", PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr
    assert "round 1/3" not in done.stdout
    for name in ("metrics.jsonl", "model.safetensors", "scenario.yaml"):
        assert (tmp_path / "two" / name).read_bytes() == (folder / name).read_bytes()


def test_another_seed_gives_other_bytes(finished: tuple[Path, Result]) -> None:
    result = fedsim("run", "quickstart", *FAST, "--set", "seed=2", "--output", "seed")
    assert result.exit_code == 0
    assert Path("seed/metrics.jsonl").read_bytes() != (finished[0] / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "xterm-256color"}], ids=["NO_COLOR", "a pipe"])
def test_what_is_no_terminal_gets_plain_lines(environment: dict[str, str]) -> None:
    done = process("run", "quickstart", *FAST, "--output", "plain", **environment)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout
    assert re.search(r"^round 3/3  test\.accuracy 0\.\d{4}  train\.loss \d", done.stdout, re.MULTILINE)


def test_without_output_the_folder_is_named_by_scenario_and_time(tmp_path: Path) -> None:
    result = fedsim("run", "quickstart", "--set", "rounds=1", "--set", "name=mine", "--quiet")
    assert result.exit_code == 0
    (folder,) = (tmp_path / "runs" / "mine").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", folder.name)
    assert result.stdout.splitlines()[-1] == f"Run folder: {folder.relative_to(tmp_path)}"


# Folders that are not


def test_resuming_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none"):
        result = fedsim("run", "--resume", name)
        assert result.exit_code == 1
        assert errors(result) == [f"error: {name}: not a run folder (no scenario.yaml in it)"]


def test_resuming_a_folder_whose_scenario_was_broken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scenario.yaml").write_text("name: x\nrounds: 0\n")
    result = fedsim("run", "--resume", tmp_path)
    assert result.exit_code == 2
    assert f"error: {tmp_path}/scenario.yaml:2: rounds: should be greater than 0, not 0" in errors(result)


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_an_output_that_cannot_be_a_folder_is_refused(tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("mine")
    result = fedsim("run", "quickstart", *FAST, "--output", output)
    assert result.exit_code == 1
    (line,) = errors(result)
    assert line.startswith(f"error: {output}: cannot be made the run folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"
