"""Studies: what is refused, what is paired, what is kept, what goes on after a crash, and what is called a difference."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command import Command, finished, wait_until
from typer.testing import CliRunner, Result

from fedsim import experiment, world
from fedsim.bundle import bundled_studies
from fedsim.cli import app
from fedsim.compare import Event, compare
from fedsim.document import InvalidScenario
from fedsim.errors import FedsimError
from fedsim.fleet import Full
from fedsim.grid import Plan, load_study
from fedsim.report import tables, write_report
from fedsim.report.comparison import Comparison, check_pairing
from fedsim.report.study_page import verdict
from fedsim.results import StudyResults, read_run, read_study
from fedsim.scenario import Scenario, dump_scenario
from fedsim.sim.executor import Executor

BASE = """\
study: small
asks: Does anything here differ?
scenario:
  data: {source: digits, clients: 8, client_test: 0.2, partition: {name: dirichlet, alpha: 0.5}}
  model: {name: mlp, hidden: [16]}
  fleet: {participation: {name: bernoulli, rates: {name: constant, mean: 0.6}}}
  strategy: {name: fedavg, local: {name: sgd, lr: 0.1, epochs: 2}}
  rounds: 4
  evaluate: {every: 2, clients: true}
  output: {checkpoint: 2}
"""
PLAIN = BASE + "strategies: {fedavg: fedavg, gentle: {name: fedavg, server_lr: 0.5}, scaffold: scaffold}\nseeds: 2\n"


def plan_of(path: Path, text: str = PLAIN, **options: str) -> Plan:
    path.mkdir(parents=True, exist_ok=True)
    (path / "it.yaml").write_text(text)
    return load_study(path / "it.yaml", options)


def run(plan: Plan, folder: Path) -> list[Event]:
    return [event for event in compare(plan, folder) if event.status != "running"]


def fedsim(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> StudyResults:
    """Three strategies, two seeds, two settings."""
    here = tmp_path_factory.mktemp("small")
    run(plan_of(here, PLAIN + "over: {data.partition.alpha: [0.5, 5]}\ntarget: 0.5\n"), here / "study")
    return read_study(here / "study")


# What a study says


def test_the_grid_is_strategies_by_seeds_by_settings(small: StudyResults) -> None:
    assert len(small.cells) == 12
    assert small.count("finished") == 12
    assert {cell.place for cell in small.cells} >= {"partition.alpha=0.5/fedavg/seed-1", "partition.alpha=5/scaffold/seed-2"}
    for cell in small.cells:
        scenario = cell.run.scenario if cell.run else {}
        assert scenario["seed"] == cell.seed
        assert scenario["data"]["partition"]["alpha"] == cell.values["data.partition.alpha"]
        assert scenario["name"] == f"small-{cell.label}"


def test_what_a_strategy_leaves_open_about_clients_comes_from_the_scenario(tmp_path: Path) -> None:
    text = BASE + "strategies:\n  a: fedavg\n  b: {name: fedprox, local: {lr: 0.3}}\n  c: scaffold\n  d: {name: fedavg, local: adam}\n"
    cells = {cell.label: cell.scenario.strategy for cell in plan_of(tmp_path, text, seeds="1").cells()}
    local = {label: (type(s.local).registered_name, s.local.lr, s.local.epochs) for label, s in cells.items() if s}  # type: ignore[attr-defined]
    assert local == {"a": ("sgd", 0.1, 2), "b": ("sgd", 0.3, 2), "c": ("scaffold-sgd", 0.1, 2), "d": ("adam", 0.1, 2)}


def test_set_only_and_options_are_applied(tmp_path: Path) -> None:
    text = PLAIN + "set: {rounds: 7, strategy.local.lr: 0.2}\nonly: {gentle: {pace: {name: sync, cohort: 3}}}\n"
    (tmp_path / "it.yaml").write_text(text)
    cells = load_study(tmp_path / "it.yaml", {"seeds": "[5]"}, ("evaluate.every=3",)).cells()
    assert {(c.seed, c.scenario.rounds, c.scenario.evaluate.every) for c in cells} == {(5, 7, 3)}
    assert {c.label: c.scenario.pace.cohort for c in cells} == {"fedavg": None, "gentle": 3, "scaffold": None}  # type: ignore[attr-defined]
    assert {c.scenario.strategy.local.lr for c in cells if c.scenario.strategy} == {0.2}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "seed: 3\n",
            "it.yaml:13: seed: unknown field (did you mean 'seeds'?); fields: study, asks, scenario, strategies, seeds, set, over,",
        ),
        ("over: {data.partition.alfa: [1]}\n", "it.yaml:13: data.partition.alfa: unknown field (did you mean 'alpha'?); fields: alpha, "),
        ("over: {rounds: [5, 0]}\n", "it.yaml:13: rounds: should be greater than 0, not 0"),
        ("over: {rounds: []}\n", "it.yaml:13: over.rounds: should be a list of at least 1 item(s), not []"),
        ("over: {seed: [1]}\n", "it.yaml:13: over.seed: belongs to the study; use `seeds`"),
        ("baseline: fedav\n", "it.yaml:13: baseline: there is no strategy 'fedav' (did you mean 'fedavg'?); there are: fedavg, gentle"),
        ("only: {gentel: {rounds: 3}}\n", "it.yaml:13: only.gentel: there is no strategy 'gentel' (did you mean 'gentle'?)"),
        ("tune: {over: {strategy.local.lrr: [1]}}\n", "it.yaml:13: strategy.local.lrr: unknown field (did you mean 'lr'?)"),
        ("tune: {}\n", "it.yaml:13: tune.over: says what to try"),
        ("target: high\n", "it.yaml:13: target: should be a number, not 'high'"),
    ],
    ids=lambda part: part.split(":")[0].replace("\n", ""),
)
def test_what_is_wrong_is_refused_with_its_line(tmp_path: Path, more: str, message: str) -> None:
    with pytest.raises(InvalidScenario) as caught:
        plan_of(tmp_path, PLAIN + more)
    lines = str(caught.value).splitlines()
    assert any(line.startswith(f"{tmp_path}/{message}") for line in lines), lines


@pytest.mark.parametrize(
    ("strategies", "message"),
    [
        ("{a: fedavgg}", "it.yaml:11: strategy.name: there is no 'fedavgg' (did you mean 'fedavg'?)"),
        ("{a: {name: fedprox, mo: 1}}", "it.yaml:11: strategy.mo: unknown field; fields: local, mu, weights"),
        ("{a/b: fedavg}", "it.yaml:11: strategies.a/b: names folders"),
        ("{}", "it.yaml:11: strategies: is empty"),
    ],
)
def test_wrong_strategies_are_refused_once_however_many_cells_have_them(tmp_path: Path, strategies: str, message: str) -> None:
    with pytest.raises(InvalidScenario) as caught:
        plan_of(tmp_path, f"{BASE}strategies: {strategies}\n")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{tmp_path}/{message}")


def test_a_scenario_is_no_study_and_a_study_no_scenario() -> None:
    result = fedsim("compare", "quickstart")
    assert result.exit_code == 2
    assert "a scenario, not a study" in result.stderr
    assert "--strategies" in result.stderr
    result = fedsim("run", "studies/quick")
    assert result.exit_code == 2
    assert "a study, not a scenario; run it with: fedsim compare studies/quick" in result.stderr


# Pairs


def test_within_a_seed_everything_is_shared(small: StudyResults) -> None:
    assert check_pairing(small).broken == []
    assert check_pairing(small).groups == 4
    for setting in small.settings:
        for seed in small.seeds:
            runs = [small.runs(setting, label)[seed] for label in small.labels]
            assert len({run.manifest["partition"] for run in runs}) == 1
            assert len({run.manifest["initial_model"] for run in runs}) == 1
            assert len({json.dumps(run.rows[0]) for run in runs}) == 1
            assert len({json.dumps([row["ids"] for row in run.clients]) for run in runs}) == 1
            # The first round starts from one model on the same batches, whatever the server does with the updates afterwards. SCAFFOLD's
            # control variates are zero then, so that its clients do the same.
            assert len({run.rows[1]["examples"] for run in runs}) == 1
            losses = [run.rows[1]["train.loss"] for run in runs]
            assert losses == pytest.approx(
                [losses[0]] * len(runs), rel=1e-6
            )  # a corrected step is not taken in place, and rounds otherwise
    seeds = {small.runs("partition.alpha=5", "fedavg")[seed].manifest["partition"] for seed in small.seeds}
    assert len(seeds) == 2


def test_cells_are_what_runs_of_their_scenarios_are(small: StudyResults, tmp_path: Path) -> None:
    cell = small.cells[-1].run
    assert cell is not None
    result = fedsim("run", cell.path / "scenario.yaml", "--output", tmp_path / "alone", "--quiet")
    assert result.exit_code == 0
    for name in ("metrics.jsonl", "clients.jsonl", "scores.jsonl", "model.safetensors"):
        assert (tmp_path / "alone" / name).read_bytes() == (cell.path / name).read_bytes()


def test_pairs_that_are_not_are_told(small: StudyResults) -> None:
    first, *rest = small.cells
    assert first.run is not None
    changed = replace(first, run=replace(first.run, manifest=first.run.manifest | {"partition": "another"}))
    (broken,) = check_pairing(replace(small, cells=[changed, *rest])).broken
    assert broken == "partition under seed 1, partition.alpha=0.5"


# Going on


def test_what_is_finished_is_kept_and_a_study_may_grow(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    assert [e.status for e in run(plan_of(tmp_path, seeds="1"), folder)] == ["done"] * 3
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("model.safetensors")}
    grown = run(plan_of(tmp_path, seeds="2"), folder)
    assert [(e.cell.seed, e.status) for e in grown] == [(1, "kept")] * 3 + [(2, "done")] * 3
    assert {p: p.stat().st_mtime_ns for p in before} == before
    with pytest.raises(FedsimError, match="ran with another rounds; choose another --output, or delete this folder"):
        run(plan_of(tmp_path, PLAIN + "set: {rounds: 5}\n"), folder)
    with pytest.raises(FedsimError, match="holds the study 'small'; choose another --output"):
        run(plan_of(tmp_path, PLAIN.replace("study: small", "study: other")), folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(FedsimError, match="not empty, and not a study folder"):
        run(plan_of(tmp_path), tmp_path / "full")


def test_the_study_in_the_folder_is_complete(small: StudyResults, tmp_path: Path) -> None:
    again = load_study(small.path / "study.yaml")
    here = {cell.place: cell.run.scenario for cell in small.cells if cell.run}
    assert {cell.place: dump_scenario(cell.scenario) for cell in again.cells()} == here


def test_a_failed_cell_is_told_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaking.py").write_text("def net(shape, outputs):\n    raise ZeroDivisionError('on purpose')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = PLAIN + "only: {gentle: {model: {name: python, function: 'breaking:net'}}}\n"
    events = run(plan_of(tmp_path, text), tmp_path / "study")
    assert [(e.cell.label, e.status) for e in events[:3]] == [("fedavg", "done"), ("gentle", "failed"), ("scaffold", "done")]
    results = read_study(tmp_path / "study")
    assert (results.count("failed"), results.count("finished")) == (2, 4)
    assert all("on purpose" in (c.run.failure or "") for c in results.cells if c.run and c.label == "gentle")
    write_report(tmp_path / "study")
    assert "on purpose" in (tmp_path / "study" / "report.html").read_text()
    mended = (
        "from torch import nn\ndef net(shape, outputs):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs))\n"  # 8 x 8 pixels
    )
    (tmp_path / "breaking.py").write_text(mended)
    monkeypatch.delitem(sys.modules, "breaking")
    assert [e.status for e in run(plan_of(tmp_path, text), tmp_path / "study")] == ["kept", "done", "kept"] * 2
    assert read_study(tmp_path / "study").count("failed") == 0


def test_the_command_tells_of_failures_by_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it.yaml").write_text(
        PLAIN + "only: {gentle: {model: {name: python, function: 'no_such_module:net'}}}\nseeds: [1]\n".replace("seeds: [1]\n", "")
    )
    result = fedsim("compare", "it.yaml", "--seeds", "1", "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["cells"] == {"finished": 2, "failed": 1, "unfinished": 0, "waiting": 0}
    assert list(told["failures"]) == ["gentle/seed-1"]
    assert (tmp_path / told["report"]).is_file()
    assert told["folder"] == "runs/studies/small"


def test_killed_twice_then_the_same_bytes_in_tables(tmp_path: Path) -> None:
    arguments = ("studies/quick", "--seeds", "2", "--set", "rounds=20", "--set", "output.checkpoint=3")
    finished("compare", *arguments, "--output", tmp_path / "straight")
    folder, cells = tmp_path / "killed", len(read_study(tmp_path / "straight").cells)
    for count in (2, 5):
        with Command("compare", *arguments, "--output", folder) as process:
            wait_until(lambda count=count: len(list(folder.rglob("model.safetensors"))) >= count, process)
            logs = set(folder.rglob("metrics.jsonl"))
            wait_until(
                lambda logs=logs: any(log.read_bytes().count(b"\n") > 5 for log in set(folder.rglob("metrics.jsonl")) - logs), process
            )
        assert process.code == -signal.SIGKILL
        assert len(list(folder.rglob("model.safetensors"))) < cells
    done = finished("compare", *arguments, "--output", folder)
    assert "finished before" in done.output
    for name in ("table.csv", "cells.csv", "table.md", "table.tex"):
        assert (folder / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    for log in folder.rglob("metrics.jsonl"):
        assert log.read_bytes() == (tmp_path / "straight" / log.relative_to(folder)).read_bytes()


def test_a_cell_of_another_precision_is_not_run_at_that_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settled: list[str] = []
    monkeypatch.setattr(world, "settle", lambda device, precision: settled.append(precision))
    text = BASE + "strategies: {fedavg: fedavg}\nseeds: 1\nset: {rounds: 1}\nover: {engine.precision: [highest, high]}\n"
    assert [e.status for e in run(plan_of(tmp_path, text), tmp_path / "study")] == ["done"] * 2
    assert settled == ["highest", "high"]


def test_workers_that_serve_several_cells_are_worth_it_sooner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []

    def open_here(scenario: Scenario, world: world.World, _: object) -> Executor:
        opened.append(world.workers)
        return experiment.open_executor(scenario, replace(world, workers=0))

    monkeypatch.setattr("fedsim.compare.open_executor", open_here)
    monkeypatch.setattr(world, "_estimate", lambda *_: world.LONG / 2.5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 40))
    run(plan_of(tmp_path), tmp_path / "study")
    assert opened == [8, 8], "three strategies under each seed"
    assert {c.run.manifest["engine"]["workers"] for c in read_study(tmp_path / "study").cells if c.run} == {8}
    (tmp_path / "study" / "scaffold" / "seed-1" / "model.safetensors").unlink()
    run(plan_of(tmp_path), tmp_path / "study")
    assert opened == [8, 8, 0], "one is left"


def test_ctrl_c_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "it.yaml").write_text(PLAIN)
    arguments = ("compare", tmp_path / "it.yaml", "--set", "rounds=400", "--output", tmp_path / "study")
    log = tmp_path / "study" / "fedavg" / "seed-1" / "metrics.jsonl"
    with Command(*arguments) as process:
        wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") > 3, process)
        process.signal(signal.SIGINT)
        assert process.wait() == 130, process.errors
    assert "The same command goes on." in process.errors
    reached = read_run(log.parent).rows[-1]["round"]
    assert (log.parent / "checkpoints" / f"round-{reached:08d}.json").exists()


# What is called a difference


@pytest.fixture(scope="module")
def same(tmp_path_factory: pytest.TempPathFactory) -> StudyResults:
    """FedAvg under three names, three seeds."""
    here = tmp_path_factory.mktemp("same")
    run(plan_of(here, BASE + "strategies: {one: fedavg, two: fedavg, three: {name: fedavg, server_lr: 1.0}}\n"), here / "study")
    return read_study(here / "study")


def test_fedavg_never_differs_from_fedavg(same: StudyResults) -> None:
    comparison = Comparison(same)
    for line in comparison.lines[1:]:
        assert line.versus is not None
        assert (line.versus.difference, line.versus.interval, line.versus.p, line.p, line.verdict) == (0.0, (0.0, 0.0), None, None, "")
    assert all(p is None for _, p in comparison.pairs("").values())
    assert verdict(comparison) == "No strategy differs from one beyond the noise (paired t-test, Holm-corrected, 5 %)."
    texts = tables.of_study(same)
    assert "**" not in texts["table.md"]
    assert "textbf" not in texts["table.tex"]
    assert "nan" not in "".join(texts.values()).lower()


def test_nor_does_it_with_the_noise_of_other_seeds(tmp_path: Path) -> None:
    """The same algorithm under five seeds, and under five others in their place: the differences are noise, and are called so."""
    plan = plan_of(tmp_path, BASE + "strategies: {one: fedavg, two: fedavg}\n", seeds="10")
    run(plan, tmp_path / "study")
    results = read_study(tmp_path / "study")
    moved = [replace(c, seed=c.seed - 5) for c in results.cells if c.label == "two" and c.seed > 5]
    noisy = replace(results, cells=[c for c in results.cells if c.label == "one" and c.seed <= 5] + moved)
    one, two = Comparison(noisy).lines
    assert (len(one.seeds), len(two.seeds)) == (5, 5)
    assert two.versus is not None
    assert two.versus.difference != 0
    assert two.p is not None
    assert two.p > 0.05
    assert two.verdict == ""


def test_a_real_difference_is_bold_and_a_real_loss_is_marked(tmp_path: Path) -> None:
    text = BASE + "strategies: {fedavg: fedavg, crawling: {name: fedavg, server_lr: 0.01}}\n"
    run(plan_of(tmp_path, text, seeds="4"), tmp_path / "study")
    results = read_study(tmp_path / "study")
    assert Comparison(results).lines[1].verdict == "worse"
    assert "(worse)" in tables.of_study(results)["table.md"]
    turned = replace(results, study=results.study | {"baseline": "crawling"})
    assert Comparison(turned).lines[0].verdict == "better"
    assert "| fedavg | 4 | **" in tables.of_study(turned)["table.md"]
    assert r"\textbf{" in tables.of_study(turned)["table.tex"]
    loss = replace(results, study=results.study | {"metric": "test.loss"})
    assert Comparison(loss).lines[1].verdict == "worse", "of a loss, less is better"


# Tuning


def test_every_strategy_is_tuned_on_examples_that_are_no_test_examples(tmp_path: Path) -> None:
    text = PLAIN + "tune: {over: {strategy.local.lr: [0.000001, 0.1]}, only: {gentle: {strategy.server_lr: [0.25, 0.5]}}, rounds: 3}\n"
    plan = plan_of(tmp_path, text, seeds="1")
    events = run(plan, tmp_path / "study")
    assert [e.tuning for e in events].count(True) == 2 + 4 + 2
    results = read_study(tmp_path / "study")
    for account in results.tuning:
        assert account["chosen"]["strategy.local.lr"] == 0.1
        assert account["runs"] == (4 if account["label"] == "gentle" else 2)
        assert account["rounds"] == 3 * account["runs"]
        assert all(t["metric"] == "validation.accuracy" for t in account["tried"])
    for cell in results.cells:
        assert cell.run is not None
        assert cell.run.scenario["strategy"]["local"]["lr"] == 0.1
        assert cell.run.scenario["data"]["validation"] == 0
    for log in (tmp_path / "study" / "tuning").rglob("metrics.jsonl"):
        assert '"test.' not in log.read_text(), "no test example was looked at"
    write_report(tmp_path / "study")
    page = (tmp_path / "study" / "report.html").read_text()
    assert "strategy.local.lr=0.1, strategy.server_lr=0.5" in page
    assert [e.status for e in run(plan, tmp_path / "study")] == ["kept"] * 11


def test_held_back_examples_are_in_no_other_list(tmp_path: Path) -> None:
    import numpy as np

    from fedsim.world import build

    plan = plan_of(tmp_path, PLAIN + "tune: {over: {strategy.local.lr: [0.1]}, validation: 0.3}\n", seeds="1")
    (candidate,) = plan.candidates("fedavg", {})
    tuning, final = build(candidate.scenario).data, build(plan.cells()[0].scenario).data
    held = tuning.client_test.index
    assert not set(held) & set(final.client_test.index)
    assert sorted([*tuning.train.index, *held]) == sorted(final.train.index)
    assert len(held) / len(final.train.index) == pytest.approx(0.3, abs=0.02)
    np.testing.assert_array_equal(tuning.test_x.numpy(), tuning.x[held].numpy())


# The command


def test_a_study_from_the_command_line_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fast = ("--set", "rounds=2", "--set", "evaluate.every=2")
    more = ("--strategies", "fedavg,fedprox", "--seeds", "2", "--over", "fleet.participation.rates.mean=0.3,0.8", "--baseline", "fedprox")
    result = fedsim("compare", "quickstart", *more, *fast)
    assert result.exit_code == 0, result.output
    results = read_study(tmp_path / "runs" / "studies" / "quickstart")
    assert results.settings == ["rates.mean=0.3", "rates.mean=0.8"]
    assert (results.baseline, results.seeds, results.count("finished")) == ("fedprox", [1, 2], 8)
    assert "Report: runs/studies/quickstart/report.html" in result.stdout
    assert "[8/8] rates.mean=0.8/fedprox/seed-2" in result.stdout
    again: Any = fedsim("compare", "quickstart", *more, *fast, "--quiet")
    assert again.exit_code == 0
    assert "[8/8]" not in again.stdout
    assert fedsim("compare", "quickstart", "--strategies", "fedavg,fedprocs").stderr.startswith(
        "error: --strategies: strategy.name: there is"
    )


def test_a_strategy_may_be_a_list_of_phases() -> None:
    cells = {cell.label: cell for cell in load_study(bundled_studies()["studies/personal_har"]).cells() if cell.seed == 2}
    phases = cells["fedalt"].scenario.phases
    assert [(type(phase.strategy).registered_name, phase.rounds) for phase in phases] == [("fedavg", 30), ("fedalt", 30), ("local-only", 1)]
    assert phases[2].participation == Full()
    assert {cell.scenario.data for cell in cells.values()} == {cells["fedavg"].scenario.data}
    assert all(cell.scenario.strategy is None and cell.scenario.rounds is None for cell in cells.values())


STUDIES = {
    "aggregation": 48,
    "anchors": 12,
    "asynchrony": 15,
    "byzantine": 45,
    "conformal_weights": 25,
    "factors": 9,
    "participation": 35,
    "personal_har": 24,
    "personal_shakespeare": 18,
    "personal_vit": 18,
    "proxy": 40,
    "quick": 12,
    "robustness": 30,
    "staleness": 18,
}


@pytest.mark.parametrize("name", STUDIES)
def test_the_studies_that_come_along_are_valid_in_every_cell(name: str) -> None:
    assert set(bundled_studies()) == {f"studies/{each}" for each in STUDIES}
    plan = load_study(bundled_studies()[f"studies/{name}"])
    assert plan.study.study == name
    assert len(plan.cells()) == STUDIES[name]
    assert plan.study.asks.endswith("?")
