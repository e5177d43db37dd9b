"""Pre-train, personalise, fine-tune: phases in which clients keep what is their own, run to the same bits however."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim import experiment
from fedsim.document import InvalidScenario
from fedsim.errors import ScenarioError
from fedsim.folder import Folder
from fedsim.overview import facts
from fedsim.scenario import Scenario, load
from fedsim.world import build

HEAD = """\
name: personal
seed: 5
data: {source: digits, clients: 8, partition: {name: dirichlet, alpha: 0.5}, client_test: 0.3}
model: {name: mlp, hidden: [16]}
fleet: {participation: {name: uniform, clients: 3}}
evaluate: {every: 2, clients: true}
output: {checkpoint: 1000}
engine: {workers: 0, chunk: 3}
"""
PRETRAIN = "{strategy: {name: fedavg, local: {name: sgd, lr: 0.1}}, rounds: 3}"
FEDALT = "{strategy: {name: fedalt, own: output, local: {name: alternating-sgd, lr: 0.05}}, rounds: 2}"
TUNE = "{strategy: {name: local-only, own: output, local: {name: own-sgd, lr: 0.05}}, rounds: 1, participation: full}"
DITTO = "{strategy: ditto, rounds: 2}"


def phases(*each: str) -> str:
    return HEAD + "phases:\n" + "".join(f"  - {one}\n" for one in each)


PIPELINE = phases(PRETRAIN, FEDALT, TUNE, DITTO)


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
    here = tmp_path_factory.mktemp("personal")
    return run(scenario(here, PIPELINE), here / "run")


def outcome(folder: Folder) -> list[bytes]:
    return [(folder.path / name).read_bytes() for name in ("metrics.jsonl", "scores.jsonl", "clients.jsonl", "model.safetensors")]


@pytest.mark.parametrize("rows", [4, 5, 6, 7, 8])
def test_a_run_left_between_or_within_phases_goes_on_to_the_same_bits(straight, tmp_path, rows):
    one = scenario(tmp_path, PIPELINE)
    run(one, tmp_path / "run", leave_after=rows)
    assert outcome(run(one, tmp_path / "run")) == outcome(straight)


def test_two_workers_give_the_same_bits(straight, tmp_path):
    assert outcome(run(scenario(tmp_path, PIPELINE, "engine.workers=2"), tmp_path / "run")) == outcome(straight)


def test_what_clients_keep_lasts_into_the_next_phase_and_the_last_one_reaches_everybody(tmp_path):
    one = scenario(tmp_path, phases(PRETRAIN, FEDALT, TUNE))
    folder = run(one, tmp_path / "run", leave_after=6)  # row 0, three and two rounds
    before = folder.latest()[1]
    assert before["phase"] == 1
    trained = np.flatnonzero(before["port"]["memory"].written)
    assert 3 <= len(trained) < 8
    kept = before["port"]["memory"].get(np.arange(8))
    assert len({tuple(row.flatten().tolist()) for row in kept["3.weight"]}) == len(trained) + 1  # the others have the first model's
    rows = list(experiment.train(one, build(one), folder))
    assert [row["participants"] for row in rows] == [8]
    after = folder.latest()[1]
    assert after["port"]["memory"].written.all()

    strategy = one.phases[2].strategy
    state = before["state"]
    tuned = after["port"]["memory"].get(np.arange(8))
    for i in range(8):
        start = {name: value[i] for name, value in kept.items()}
        moved = (tuned["3.weight"][i] - start["3.weight"]).norm()
        assert 0 < moved < 1  # from its own head, not from the first one
        others = min((tuned["3.weight"][i] - kept["3.weight"][j]).norm() for j in range(8) if j in trained and j != i)
        assert moved < others
        model = strategy.deploy(after["state"], type(tuned)({name: value[i] for name, value in tuned.items()}))
        assert torch.equal(model["1.weight"], state.w["1.weight"])


def test_clients_are_judged_by_their_own_models(straight):
    rows = [json.loads(line) for line in (straight.path / "metrics.jsonl").read_text().splitlines()]
    by_phase = {phase: [row for row in rows if row.get("phase") == phase][-1] for phase in range(4)}
    assert by_phase[2]["clients.accuracy.mean"] > by_phase[1]["clients.accuracy.mean"]
    assert by_phase[2]["test.accuracy"] == by_phase[1]["test.accuracy"]  # of the shared model, with the first head


def test_a_program_that_needs_a_part_of_the_model_in_memory_does_not_run_elsewhere(tmp_path):
    for program in ("alternating-sgd", "own-sgd", "ditto-sgd"):
        with pytest.raises(InvalidScenario, match=f"{program} does not run under fedavg; these do: adam, .*sgd"):
            scenario(tmp_path, HEAD + f"strategy: {{name: fedavg, local: {program}}}\nrounds: 1\n")


def test_the_overview_says_which_parameters_stay(tmp_path):
    one = scenario(tmp_path, PIPELINE)
    said = facts(one, build(one))
    assert said["phase 2, own"] == "170 of 1,210 parameters stay with their client: 3.weight, 3.bias"
    assert "phase 1, own" not in said
    assert said["phase 3, a round"].startswith("8.0 clients")
    assert said["phase 2, a round"].startswith("3.0 clients")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (phases(PRETRAIN, FEDALT.replace("own: output", "own: head")), r"phases.1.strategy.own: 'head' matches no whole part .* 1\.weight"),
        (phases(FEDALT.replace("own: output", "own: eight")), r"phases.0.strategy.own: .* a piece of a word in 1\.weight"),
        (phases(FEDALT, TUNE.replace("own: output", "own: input")), r"phases.1.strategy.own: leaves out 3\.bias, which clients keep"),
        (phases(TUNE.replace("own: output", "own: []")), "phases.0.strategy.own: is empty, and local-only trains nothing else"),
    ],
    ids=["nothing", "piece", "forgotten", "idle"],
)
def test_refused_when_built(tmp_path, text, message):
    with pytest.raises(ScenarioError, match=message):
        build(scenario(tmp_path, text))
