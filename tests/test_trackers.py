"""Trackers: found by entry point, imported only when asked for, told of every row. Their packages are stood in for by modules of ours."""

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from fedsim.document import InvalidScenario
from fedsim.errors import FedsimError
from fedsim.scenario import Scenario, load
from fedsim.trackers import available, tracked
from fedsim.trackers import mlflow as mlflow_tracker
from fedsim.trackers import tensorboard as tensorboard_tracker
from fedsim.trackers import wandb as wandb_tracker

QUICKSTART = Path(__file__).parents[1] / "scenarios" / "quickstart.yaml"
ROWS: list[dict[str, Any]] = [
    {"round": 0, "test.loss": 2.0},
    {"round": 1, "test.loss": 1.0, "lost_clients": {"3": "died"}, "train.loss": None},
]


def scenario(*names: str) -> Scenario:
    return load(QUICKSTART, (f"output.trackers=[{', '.join(names)}]",))[0]


class Told:
    """A stand-in that writes down how it is called."""

    def __init__(self, name: str, calls: list[tuple[Any, ...]]):
        self.name, self.calls = name, calls

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> "Told":
            self.calls.append((name, *arguments, options) if options else (name, *arguments))
            return self

        return call


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    module: Any = types.ModuleType(name)
    module.__getattr__ = Told(name, calls).__getattr__
    monkeypatch.setitem(sys.modules, name, module)
    return calls


def follow(monkeypatch: pytest.MonkeyPatch, start: Any, folder: Path, rows: list[dict[str, Any]] = ROWS, stop: int = 99) -> None:
    monkeypatch.setattr("fedsim.trackers._find", lambda name: start)
    for i, _ in enumerate(tracked(rows, scenario("wandb"), folder)):
        if i == stop:
            break


def test_three_come_along_by_entry_point() -> None:
    assert {"tensorboard", "mlflow", "wandb"} <= set(available())


def test_a_tracker_that_is_not_there_is_refused() -> None:
    words = r"output\.trackers\.0: there is no 'tensorbord' \(did you mean 'tensorboard'\?\); there are: .*wandb"
    with pytest.raises(InvalidScenario, match=words):
        scenario("tensorbord")


def test_nothing_is_imported_unless_asked_for() -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom fedsim import session, scenario\n"
        f"scenario.load(Path({str(QUICKSTART)!r}))\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"tensorboard", "mlflow", "wandb", "plotly", "torch.utils.tensorboard"} & set(done.stdout.split())


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    for module in ("torch.utils.tensorboard", "mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    with pytest.raises(FedsimError, match=f"output.trackers: {name} needs the package {name}, which is not installed; pip install {name}"):
        next(tracked(ROWS, scenario(name), tmp_path))


def test_mlflow_gets_parameters_and_metrics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = stand_in(monkeypatch, "mlflow")
    follow(monkeypatch, mlflow_tracker.start, tmp_path)
    assert calls[0] == ("start_run", {"run_name": "quickstart"})
    assert calls[1] == ("set_tag", "folder", str(tmp_path))
    assert calls[2][1]["strategy.local.lr"] == "0.1"
    assert calls[3:] == [
        ("log_metrics", {"test.loss": 2.0}, {"step": 0}),
        ("log_metrics", {"test.loss": 1.0}, {"step": 1}),
        ("end_run", "FINISHED"),
    ]


def test_an_interrupted_run_is_said_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = stand_in(monkeypatch, "mlflow")
    rows = tracked(ROWS, scenario("mlflow"), tmp_path)
    next(rows)
    rows.close()  # type: ignore[attr-defined]
    assert calls[-1] == ("end_run", "KILLED")


def test_wandb_goes_on_with_the_run_of_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = stand_in(monkeypatch, "wandb")
    follow(monkeypatch, wandb_tracker.start, tmp_path)
    follow(monkeypatch, wandb_tracker.start, tmp_path)
    inits = [options for name, options in (c for c in calls if c[0] == "init")]
    assert inits[0]["id"] == inits[1]["id"]
    assert inits[0]["resume"] == "allow"
    assert inits[0]["config"]["strategy"]["name"] == "fedavg"
    assert calls[1:4] == [("log", {"test.loss": 2.0}, {"step": 0}), ("log", {"test.loss": 1.0}, {"step": 1}), ("finish", {"exit_code": 0})]


def test_tensorboard_writes_into_the_run_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = stand_in(monkeypatch, "torch.utils.tensorboard")
    follow(monkeypatch, tensorboard_tracker.start, tmp_path)
    assert calls[0] == ("SummaryWriter", str(tmp_path / "tensorboard"))
    assert [c for c in calls if c[0] == "add_scalar"] == [("add_scalar", "test/loss", 2.0, 0), ("add_scalar", "test/loss", 1.0, 1)]
    assert calls[-1] == ("close",)


def test_a_run_tells_its_trackers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from fedsim.cli import app

    calls = stand_in(monkeypatch, "wandb")
    fast = ["--set", "rounds=2", "--set", "evaluate.every=2", "--set", "output.trackers=[wandb]", "--quiet"]
    result = CliRunner().invoke(app, ["run", "quickstart", *fast, "--output", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    logged = [c for c in calls if c[0] == "log"]
    assert [options["step"] for _, _, options in logged] == [0, 1, 2]
    assert "test.accuracy" in logged[-1][1]
    assert calls[-1] == ("finish", {"exit_code": 0})


# Trackers that fail


def breaking(monkeypatch: pytest.MonkeyPatch, where: str) -> list[str]:
    """A W&B that raises in one of its functions."""
    calls: list[str] = []

    def step(name: str) -> Any:
        def call(*_: Any, **__: Any) -> Any:
            calls.append(name)
            if name == where:
                raise ConnectionError("the server is gone")
            return types.SimpleNamespace(log=step("log"), finish=step("finish"))

        return call

    module: Any = types.ModuleType("wandb")
    module.init = step("init")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


@pytest.mark.parametrize(("where", "calls"), [("log", ["init", "log"]), ("finish", ["init", "log", "log", "finish"])])
def test_a_tracker_that_fails_does_not_lose_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str, calls: list[str]
) -> None:
    told = breaking(monkeypatch, where)
    others = stand_in(monkeypatch, "mlflow")
    assert list(tracked(ROWS, scenario("wandb", "mlflow"), tmp_path)) == ROWS
    assert told == calls
    assert [c[0] for c in others][-3:] == ["log_metrics", "log_metrics", "end_run"], "the others are told on"
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "warning: the tracker wandb failed and is told nothing more: ConnectionError: the server is gone"


def test_a_tracker_that_does_not_start_stops_the_run_and_closes_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    breaking(monkeypatch, "init")
    others = stand_in(monkeypatch, "mlflow")
    with pytest.raises(FedsimError, match=r"output\.trackers: wandb does not start: ConnectionError: the server is gone"):
        next(tracked(ROWS, scenario("mlflow", "wandb"), tmp_path))
    assert others[-1] == ("end_run", "KILLED")
