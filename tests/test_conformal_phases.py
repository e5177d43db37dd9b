"""Conformal phases of a scenario: refused with reasons, run to the same bits however, with numbers that a second computation gives."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedsim import experiment
from fedsim.document import InvalidScenario
from fedsim.errors import ScenarioError
from fedsim.folder import Folder
from fedsim.params import Params
from fedsim.report import render
from fedsim.scenario import Scenario, load
from fedsim.world import build

HEAD = """\
name: phased
seed: 5
data: {source: digits, clients: 8, partition: {name: dirichlet, alpha: 0.5}, client_test: 0.5, calibration: 0.5}
model: {name: mlp, hidden: [16]}
evaluate: {every: 1000, target: {name: law, p: [0.3, 0.3, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05]}}
output: {checkpoint: 1000}
engine: {workers: 0, chunk: 3}
"""
TRAIN = "{strategy: {name: fedavg, local: {name: sgd, lr: 0.1}}, rounds: 4}"
PHASES = f"""\
phases:
  - {TRAIN}
  - {{strategy: {{name: conformal-exact, target: own}}, rounds: 1}}
  - {{strategy: {{name: conformal-sketch, local: {{name: send-digests, score: aps}}}}, rounds: 1}}
  - {{strategy: {{name: conformal, local: {{name: pinball-sgd, score: raps, steps: 2}}, epsilon: 50, iterations: 4}}, rounds: 6}}
"""


def scenario(folder: Path, text: str, *assignments: str) -> Scenario:
    folder.mkdir(exist_ok=True)
    (folder / "it.yaml").write_text(text)
    return load(folder / "it.yaml", assignments)[0]


def run(one: Scenario, folder: Path, leave_after: int | None = None) -> Folder:
    """Train, to the end or until some rows are logged."""
    world = build(one)
    made = Folder.create(folder, one.name) if not folder.exists() else Folder.open(folder)
    if not (folder / "scenario.yaml").exists():
        experiment.start(one, world, made)
    training = experiment.train(one, world, made)
    for _ in islice(training, leave_after):
        pass
    training.close()
    return made


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Folder:
    here = tmp_path_factory.mktemp("phased")
    return run(scenario(here, HEAD + PHASES), here / "run")


def outcome(folder: Folder) -> list[bytes]:
    return [(folder.path / name).read_bytes() for name in ("metrics.jsonl", "scores.jsonl", "clients.jsonl", "model.safetensors")]


@pytest.mark.parametrize("rows", [5, 6, 9])
def test_a_run_left_between_or_within_phases_goes_on_to_the_same_bits(straight, tmp_path, rows):
    one = scenario(tmp_path, HEAD + PHASES)
    run(one, tmp_path / "run", leave_after=rows)
    assert outcome(run(one, tmp_path / "run")) == outcome(straight)


def test_two_workers_give_the_same_bits(straight, tmp_path):
    assert outcome(run(scenario(tmp_path, HEAD + PHASES, "engine.workers=2"), tmp_path / "run")) == outcome(straight)


def test_what_is_logged_is_what_a_second_computation_gives(tmp_path):
    """Pooled LAC sets, from the model that the run left and NumPy alone."""
    one = scenario(tmp_path, HEAD + f"phases: [{TRAIN}, {{strategy: conformal-exact, rounds: 1}}]")
    folder = run(one, tmp_path / "run")
    row = folder.rows()[-1]
    world = build(one)
    data, w = world.data, Params(load_file(folder.path / "model.safetensors"))
    with torch.no_grad():
        p = world.problem.output(w, data.x).softmax(1).double().numpy()
    y = data.y.numpy()
    held, test = data.calibration.index, data.client_test.index
    v = np.sort(1 - p[held, y[held]])
    q = v[int(np.ceil(0.9 * (len(v) + 1))) - 1]
    inside = 1 - p[test] <= q + 1e-7  # scores are float32 in the run
    hit = inside[np.arange(len(test)), y[test]]
    owner = data.client_test.owners()
    by_client = [hit[owner == i].mean() for i in range(8)]
    by_class = np.array([hit[y[test] == k].mean() for k in range(10)])
    law = np.array([0.3, 0.3, *[0.05] * 8])
    assert row["coverage.marginal"] == pytest.approx(hit.mean())
    assert row["coverage.set_size"] == pytest.approx(inside.sum(1).mean())
    assert row["coverage.singletons"] == pytest.approx((inside.sum(1) == 1).mean())
    assert row["coverage.worst_client"] == pytest.approx(min(by_client))
    assert row["coverage.target"] == pytest.approx(law @ by_class)
    assert row["coverage.class_gap"] == pytest.approx(np.abs(by_class - 0.9).mean())
    scores = json.loads((folder.path / "scores.jsonl").read_text().splitlines()[-1])
    assert scores["coverage"] == pytest.approx(by_client, abs=1e-6)
    assert scores["class_coverage"] == pytest.approx(by_class, abs=1e-6)


def test_what_each_phase_leaves_in_the_log(straight):
    rows = [row for row in straight.rows() if "coverage.marginal" in row]
    assert [row["phase"] for row in rows] == [1, 2, 3]
    assert all(row["coverage.low"] < row["coverage.marginal"] < row["coverage.high"] for row in rows)
    assert len({row["test.accuracy"] for row in rows}) == 1  # the model stays as it is
    spent = [row["privacy.epsilon"] for row in straight.rows() if "privacy.epsilon" in row]
    assert len(spent) == 5  # a round of counting and four of descent; the sixth asks nobody
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(50, rel=1e-6)
    assert straight.rows()[-1]["participants"] == 0
    assert straight.rows()[5]["bytes_up"] > 0
    weights = [row for row in straight.rows("clients") if "weight" in row][-1]["weight"]
    assert sum(weights) == pytest.approx(1, abs=1e-5)  # lambda_i
    assert straight.rows("scores")[0]["coverage"] != straight.rows("scores")[1]["coverage"]


def test_a_report_says_what_is_promised_and_kept(straight):
    page, tables = render(straight.path)
    assert "Coverage of clients" in page
    assert "Coverage of classes" in page
    lines = tables["coverage.md"].splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| conformal-exact, own",
        "| conformal-sketch, pooled",
        "| conformal, own, epsilon 50",
    ]
    assert "| 50.0 |" in lines[-1]
    marginal = straight.rows()[5]["coverage.marginal"]
    assert f"{marginal:.3f} (" in lines[2]


def test_calibration_data_are_nobody_elses(tmp_path):
    """Neither trained nor tested on, of about the stated size, and the rest of the division does not depend on them."""
    with_, without = (build(scenario(tmp_path, HEAD + f"phases: [{TRAIN}]", f"data.calibration={c}")).data for c in (0.5, 0.0))
    parts = [set(lists.index.tolist()) for lists in (with_.train, with_.client_test, with_.calibration)]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert parts[0] == set(without.train.index.tolist())
    assert parts[1] | parts[2] == set(without.client_test.index.tolist())
    assert not len(without.calibration.index)
    assert (np.abs(with_.calibration.sizes - 0.5 * without.client_test.sizes) <= 0.5).all()
    owners = dict(zip(without.client_test.index, without.client_test.owners(), strict=True))
    assert all(owners[i] == c for i, c in zip(with_.calibration.index, with_.calibration.owners(), strict=True))
    assert with_.fingerprint() != without.fingerprint()


# ---- what is refused

ONE = "{{strategy: {{name: {0}}}, rounds: 1}}"
REFUSED = {
    "no training before": (
        HEAD + f"phases: [{ONE.format('conformal')}]",
        "phases.0.strategy: conformal calibrates the model of an earlier",
    ),
    "as the only strategy": (HEAD + "strategy: conformal-qq\nrounds: 1", "strategy: conformal-qq calibrates the model of an earlier phase"),
    "no calibration data": (
        HEAD.replace(", calibration: 0.5", "") + f"phases: [{TRAIN}, {ONE.format('conformal-local')}]",
        "phases.1.strategy: conformal-local needs calibration data; set data.client_test, e.g. to 0.4, and data.calibration",
    ),
    "calibration of nothing": (
        HEAD.replace("client_test: 0.5, ", "") + f"phases: [{TRAIN}]",
        "data.calibration: is a part of each client's test data, and there are none; set data.client_test",
    ),
    "alpha 0": (HEAD + f"phases: [{TRAIN}, {ONE.format('conformal, alpha: 0')}]", "phases.1.strategy.alpha: should be greater than 0"),
    "alpha 1": (HEAD + f"phases: [{TRAIN}, {ONE.format('conformal, alpha: 1')}]", "phases.1.strategy.alpha: should be less than 1"),
    "weights that do not sum": (
        HEAD + f"phases: [{TRAIN}, {ONE.format('conformal, target: {name: law, p: [0.5, 0.4]}')}]",
        "p: should be probabilities that sum to 1, not to 0.9",
    ),
    "epsilon without rounds": (HEAD + f"phases: [{TRAIN}, {ONE.format('conformal, epsilon: 1')}]", "say for how many rounds of descent"),
    "another program": (HEAD + f"phases: [{TRAIN}, {ONE.format('conformal, local: sgd')}]", "only 'pinball-sgd' fits here, not 'sgd'"),
    "a conformal program elsewhere": (
        HEAD + "strategy: {name: fedavg, local: send-scores}\nrounds: 1",
        "strategy.local: send-scores does not run under fedavg",
    ),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_scenario_that_cannot_be_is_refused_when_it_is_loaded(tmp_path, text, message):
    with pytest.raises(InvalidScenario) as caught:
        scenario(tmp_path, text)
    assert message in str(caught.value)
    assert "it.yaml" in str(caught.value)


DATA = {
    "a law of other classes": (
        "conformal, target: {name: law, p: [0.5, 0.5]}",
        "phases.1.strategy.target: p has 2 probabilities, and there are",
    ),
    "no such client": (
        "conformal-exact, target: {name: client, id: 8}",
        "phases.1.strategy.target: there is no client 8; there are 0 to 7",
    ),
    "too few examples": (
        "conformal-sketch, alpha: 0.0001",
        "phases.1.strategy.alpha: 0.0001 takes at least 9999 calibration examples (n >= (1 - alpha) / alpha), and there are 3",
    ),
    "a score of real targets": (
        "conformal-local, local: {name: send-quantile, score: residual}",
        "phases.1.strategy.local.score: 'residual' does not fit; this task (Classification) has: aps, lac, raps",
    ),
}


@pytest.mark.parametrize(("strategy", "message"), DATA.values(), ids=DATA.keys())
def test_what_only_the_data_can_tell_is_refused_before_anything_trains(tmp_path, strategy, message):
    one = scenario(tmp_path, HEAD + f"phases: [{TRAIN}, {ONE.format(strategy)}]")
    with pytest.raises(ScenarioError) as caught:
        build(one)
    assert message in str(caught.value)


def test_a_client_without_calibration_data_is_no_target(tmp_path):
    text = (
        HEAD.replace("calibration: 0.5", "calibration: 0.02")
        + f"phases: [{TRAIN}, {ONE.format('conformal, target: {name: client, id: 0}')}]"
    )
    with pytest.raises(ScenarioError, match="client 0 has no calibration data, so its label law is not known"):
        build(scenario(tmp_path, text, "data.clients=40"))
    target = "evaluate.target={name: client, id: 99}"
    with pytest.raises(ScenarioError, match=r"evaluate.target: there is no client 99"):
        build(scenario(tmp_path, HEAD + f"phases: [{TRAIN}]", target))
