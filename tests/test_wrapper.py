"""Strategies around strategies in a scenario: how they are written, what is wrong with them and where, and how studies share a program."""

from pathlib import Path

import numpy as np
import pytest
import torch
from toy import Listed, jumpers, rounds

from fedsim.document import InvalidScenario
from fedsim.errors import FedsimError
from fedsim.grid import load_study
from fedsim.local import Sgd
from fedsim.registry import dump, lookup
from fedsim.scenario import Scenario, load, schema
from fedsim.strategy import Strategy
from fedsim.types import Job
from fedsim.wrapper import Wrapper, asked
from strategies.fedavg import FedAvg

SCENARIO = """
data: {{source: digits, clients: 10}}
model: {{name: mlp, hidden: [8]}}
rounds: 3
strategy:
  name: unstale
  inner: {inner}
"""


def written(folder: Path, inner: str) -> Path:
    path = folder / "nested.yaml"
    path.write_text(SCENARIO.format(inner=inner))
    return path


def scenario(folder: Path, inner: str) -> Scenario:
    return load(written(folder, inner))[0]


def problems(folder: Path, inner: str) -> str:
    with pytest.raises(InvalidScenario) as error:
        scenario(folder, inner)
    return str(error.value)


def test_a_strategy_inside_a_strategy_inside_a_strategy(tmp_path):
    chosen = scenario(tmp_path, "{name: dc-asgd, lam: 1, inner: {name: fedavg, local: {name: sgd, lr: 0.3}}}").strategy
    assert chosen.inner.lam == 1
    assert chosen.inner.inner.local == chosen.local == Sgd(lr=0.3)
    assert dump(chosen)["inner"]["inner"]["local"]["lr"] == 0.3


def test_a_bare_name_will_do(tmp_path):
    assert scenario(tmp_path, "fedavg").strategy.inner == lookup(Strategy, "fedavg")()


def test_a_wrapper_is_what_is_inside_where_it_has_no_say(tmp_path):
    chosen = scenario(tmp_path, "{name: fedvarp, rates: known}").strategy
    assert isinstance(chosen, Wrapper)
    assert (chosen.paces, chosen.needs, chosen.personal) == (frozenset({"sync"}), frozenset({"rates"}), False)
    assert chosen.recalls


def test_errors_say_where_inside_they_are(tmp_path):
    assert "nested.yaml:7: strategy.inner.server_lrr: unknown field (did you mean 'server_lr'?)" in problems(
        tmp_path, "{name: fedavg, server_lrr: 1}"
    )
    assert "strategy.inner.inner.local.lr: should be greater than 0, not -1" in problems(
        tmp_path, "{name: dc-asgd, inner: {name: fedavg, local: {name: sgd, lr: -1}}}"
    )
    assert "strategy.inner: there is no 'fedavgg' (did you mean 'fedavg'?)" in problems(tmp_path, "fedavgg").replace(".name", "")
    assert "scaffold sends its clients more than a model" in problems(tmp_path, "scaffold")
    assert "strategy.inner.local: scaffold-sgd does not run under unstale; these do: adam, " in problems(
        tmp_path, "{name: fedavg, local: scaffold-sgd}"
    )


def test_an_inner_strategy_is_required(tmp_path):
    path = tmp_path / "none.yaml"
    path.write_text(SCENARIO.format(inner="fedavg").replace("  inner: fedavg\n", ""))
    with pytest.raises(InvalidScenario, match=r"strategy\.inner: is required; there are: "):
        load(path)


def test_the_schema_refers_to_itself():
    text = str(schema())
    assert "'inner'" in text
    assert len(text) < 200_000  # not unrolled


def test_a_study_shares_its_program_with_what_is_inside(tmp_path):
    study = tmp_path / "nested.yaml"
    study.write_text(STUDY)
    programs = {cell.label: cell.scenario.strategy.local for cell in load_study(study).cells()}
    assert programs == {"plain": Sgd(lr=0.3, epochs=2), "around": Sgd(lr=0.3, epochs=2), "own": Sgd(lr=0.3, epochs=5)}


STUDY = """
study: nested
asks: Who shares the program?
scenario:
  data: {source: digits, clients: 10}
  model: {name: mlp, hidden: [8]}
  rounds: 3
  strategy: {name: fedavg, local: {name: sgd, lr: 0.3, epochs: 2}}
strategies:
  plain: fedavg
  around: {name: dc-asgd, inner: fedavg}
  own: {name: dc-asgd, inner: {name: fedavg, local: {epochs: 5}}}
seeds: 1
"""


def test_what_clients_would_be_asked_now():
    """FedAWE has a model for each client that was away; ids may repeat; programs that differ are refused."""
    toy = jumpers([[1, 0], [0, 2], [3, 3]])
    strategy = lookup(Strategy, "fedawe")(local=Sgd(lr=2.0, steps=1, batch_size=None))
    state = rounds(strategy, toy, 2, participation=Listed(((0, 1), (0,))))[-1]
    ids = torch.tensor([0, 1, 1, 2])
    program, models = asked(strategy, toy.problem.at(2), state, ids, 5)
    assert program == strategy.local
    expected = torch.cat([job.message["weight"] for i in ids.tolist() for job in strategy.plan(toy.problem.at(2), state, np.array([i]), 5)])
    assert torch.equal(models["weight"][:, 0], expected)
    assert not torch.equal(expected[0], expected[1])
    with pytest.raises(FedsimError, match="asks its clients for different things in one round"):
        asked(Fickle(), toy.problem, state, ids, 5)


class Fickle(FedAvg):
    """Asks every client for something else."""

    def plan(self, problem, state, ids, key):
        return [Job(ids[i : i + 1], state.w, Sgd(lr=1.0 + i)) for i in range(len(ids))]
