"""Broken scenarios: refused before anything starts, with file, line, field and what is allowed, exit code 2 and no traceback."""

import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedsim import scenario as scenarios
from fedsim.cli import app
from fedsim.document import Document, InvalidScenario
from fedsim.local import Sgd
from fedsim.registry import lookup, register
from fedsim.scenario import Scenario, dump_scenario, load, validate
from fedsim.strategy import LocalProgram, Strategy

BASE = """\
# A scenario that runs; the tables below count its lines.
name: base
seed: 1
data:
  source: digits
  clients: 10
  partition: {name: dirichlet, alpha: 0.3}
  client_test: 0.2
model: {name: mlp, hidden: [8]}
fleet:
  participation: {name: uniform, clients: 5}
pace: sync
strategy:
  name: fedavg
  local: {name: sgd, lr: 0.1, epochs: 1}
rounds: 2
evaluate: {clients: true}
"""
QUICKSTART = (Path(__file__).parents[1] / "scenarios" / "quickstart.yaml").read_text(encoding="utf-8")

LAUGHS = "\n".join(
    ["a: &a [x, x, x, x, x, x, x, x, x]", *(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefg", "bcdefgh", strict=True))]
)


def edit(line: int, text: str) -> str:
    """BASE with one line replaced, by any number of lines."""
    rows = BASE.splitlines()
    return "\n".join([*rows[: line - 1], *text.splitlines(), *rows[line:]]) + "\n"


def more(text: str) -> str:
    """BASE and what stands in line 18 and on."""
    return f"{BASE}{text}\n"


def without(first: int, last: int) -> str:
    """BASE without some lines."""
    rows = BASE.splitlines()
    return "\n".join([*rows[: first - 1], *rows[last:]]) + "\n"


def broken(what: str, text: str | bytes, *problems: tuple[int, str, str]) -> Any:
    """A scenario, and the line, the field and a part of the message of each of its problems."""
    return pytest.param(text, problems, id=what)


def run_broken(folder: Path, text: str | bytes, *options: str) -> list[str]:
    """Run a broken scenario in `folder`: the lines on stderr, after checking all that must hold of any refusal."""
    file = folder / "broken.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = sorted(path.name for path in folder.iterdir())
    result = CliRunner().invoke(app, ["run", "broken.yaml", *options])
    assert result.exit_code == 2, (result.exit_code, result.exception, result.output)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == before  # nothing has started
    return result.stderr.splitlines()


def check(lines: list[str], problems: tuple[tuple[int, str, str], ...]) -> None:
    assert len(lines) == len(problems), lines
    for line, (number, field, fragment) in zip(lines, problems, strict=True):
        assert line.startswith(f"error: broken.yaml:{number}: {field}: " if field else f"error: broken.yaml:{number}: "), line
        assert fragment in line.removeprefix(f"error: broken.yaml:{number}: {field}"), line
        assert line.isprintable()
        assert len(line) < 600


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


FIELDS = [
    broken(
        "program of another strategy",
        edit(15, "  local: scaffold-sgd"),
        (15, "strategy.local", "scaffold-sgd does not run under fedavg; these do: adam, dp-adam, dp-lora-batch, dp-sgd, sgd"),
    ),
    broken("more epochs than memory", edit(15, "  local: {name: sgd, epochs: 900000000000}"), (15, "strategy.local.epochs", "1000000")),
    broken("model that is too large", edit(9, "model: {name: mlp, hidden: [100000000000]}"), (9, "model", "cannot be built")),
    broken(
        "module that fails",
        edit(5, "  source: {name: python, function: 'no_such_module:f'}"),
        (5, "data.source.function", "cannot be imported"),
    ),
    broken(
        "function that is no name", edit(5, "  source: {name: python, function: '..:x'}"), (5, "data.source.function", "cannot be imported")
    ),
    broken("proxy without a size", edit(8, "  proxy: {balanced: true}"), (8, "data.proxy", "give either `size` or `fraction`")),
    broken("unknown key", more("seeds: 3"), (18, "seeds", "unknown field (did you mean 'seed'?); fields: name, data, model, strategy")),
    broken("unknown key in a section", edit(8, "  client_tests: 0.2"), (8, "data.client_tests", "did you mean 'client_test'?")),
    broken(
        "unknown key of a choice", edit(14, "  name: fedavg\n  serverlr: 1"), (15, "strategy.serverlr", "fields: local, weights, server_lr")
    ),
    broken(
        "unknown key of a choice in a choice",
        edit(15, "  local: {name: sgd, momentun: 0.9}"),
        (15, "strategy.local.momentun", "'momentum'"),
    ),
    broken("merge key", edit(4, "data:\n  <<: {clients: 3}"), (5, "data.<<", "unknown field; fields: source")),
    broken("key that is a number", more("3: x"), (18, "3", "unknown field")),
    broken("key with a line break", more('"a\\nb": x'), (18, r"a\nb", "unknown field")),
    broken(
        "unknown name",
        edit(14, "  name: fedavgg"),
        (14, "strategy.name", "there is no 'fedavgg' (did you mean 'fedavg'?); there are: "),
    ),
    broken(
        "unknown bare name",
        edit(12, "pace: snyc"),
        (12, "pace", "there is no 'snyc' (did you mean 'sync'?); there are: buffered, deadline, sync"),
    ),
    broken("name that is a number", edit(14, "  name: 3"), (14, "strategy.name", "should be a name, not 3; there are: ")),
    broken("no name", edit(14, "  weights: all"), (13, "strategy", "needs a `name`; there are: ")),
    broken("name of another kind", edit(9, "model: fedavg"), (9, "model", "there is no 'fedavg'; there are: char-lstm")),
    broken(
        "choice that is null",
        edit(12, "pace:"),
        (12, "pace", "should be a name, or {name: ..., field: value}, not null; there are: buffered, deadline, sync"),
    ),
    broken("choice that is a list", edit(12, "pace: [sync]"), (12, "pace", "not ['sync']; there are: buffered, deadline, sync")),
    broken("bare name that needs a field", edit(5, "  source: npz"), (5, "data.source.path", "is required")),
    broken(
        "section that is missing",
        more("").replace("model: ", "modle: "),
        (2, "model", "is required; there are: char-lstm"),
        (9, "modle", "'model'"),
    ),
    broken(
        "section that is a number",
        edit(17, "evaluate: 5"),
        (17, "evaluate", "should be a mapping, not 5; fields: every, clients, classes, batch, target"),
    ),
    broken("word for a number", edit(16, "rounds: many"), (16, "rounds", "should be a whole number, not 'many'")),
    broken(
        "number in quotes",
        edit(15, '  local: {name: sgd, lr: "0.1"}'),
        (15, "strategy.local.lr", "a number, not '0.1'; leave out the quotes"),
    ),
    broken("boolean for a whole number", edit(16, "rounds: yes"), (16, "rounds", "should be a whole number, not true")),
    broken("boolean for a number", edit(15, "  local: {name: sgd, lr: on}"), (15, "strategy.local.lr", "should be a number, not true")),
    broken("number with a point for a whole one", edit(16, "rounds: 10.0"), (16, "rounds", "should be a whole number, not 10.0")),
    broken("octal number of YAML 1.1", edit(16, "rounds: 010"), (16, "rounds", "should be a whole number, not '010'")),
    broken("clock time of YAML 1.1", edit(16, "rounds: 1:30"), (16, "rounds", "should be a whole number, not '1:30'")),
    broken("date", edit(16, "rounds: 2024-13-45"), (16, "rounds", "should be a whole number, not '2024-13-45'")),
    broken("number for text", edit(2, "name: 3"), (2, "name", "should be text, not 3; put it in quotes")),
    broken("text for a boolean", edit(17, 'evaluate: {clients: "true"}'), (17, "evaluate.clients", "should be true or false, not 'true'")),
    broken("number for a boolean", edit(17, "evaluate: {clients: 1}"), (17, "evaluate.clients", "should be true or false, not 1")),
    broken("number for a list", edit(9, "model: {name: mlp, hidden: 8}"), (9, "model.hidden", "should be a list, not 8")),
    broken("word in a list of numbers", edit(9, "model: {name: mlp, hidden: [8, x]}"), (9, "model.hidden.1", "a whole number, not 'x'")),
    broken("mapping for a list", more("phases: {strategy: fedavg}"), (18, "phases", "should be a list, not {strategy: 'fedavg'}")),
    broken(
        "value below its bound", edit(15, "  local: {name: sgd, lr: -1}"), (15, "strategy.local.lr", "should be greater than 0, not -1")
    ),
    broken("value at its open bound", edit(8, "  client_test: 1"), (8, "data.client_test", "should be less than 1, not 1")),
    broken(
        "value that is not one of a few",
        edit(14, "  name: fedavg\n  weights: sample"),
        (15, "strategy.weights", "(did you mean 'samples'?)"),
    ),
    broken("number or word", more("engine: {workers: many}"), (18, "engine.workers", "should be a whole number or 'auto', not 'many'")),
    broken(
        "number below its bound, or word", more("engine: {workers: -1}"), (18, "engine.workers", "should be at least 0 or 'auto', not -1")
    ),
    broken("not a number", edit(15, "  local: {name: sgd, lr: .nan}"), (15, "strategy.local.lr", "should be a finite number, not .nan")),
    broken("infinity", edit(15, "  local: {name: sgd, lr: -.inf}"), (15, "strategy.local.lr", "should be a finite number, not -.inf")),
    broken(
        "number that overflows",
        edit(15, "  local: {name: sgd, lr: 1e999}"),
        (15, "strategy.local.lr", "should be a finite number, not 1e999"),
    ),
    broken(
        "infinity where anything goes", edit(9, "model: {name: python, function: 'a:b', args: {c: .inf}}"), (9, "model.args.c", "finite")
    ),
    broken("whole number of 30 digits", edit(3, f"seed: {'9' * 30}"), (3, "seed", "should be a number of at most 18 digits")),
    broken("whole number of 5000 digits", edit(3, f"seed: {'9' * 5000}"), (3, "seed", "99...' is not a value of type int")),
    broken("very long text", edit(16, f"rounds: {'a' * 5000}"), (16, "rounds", "aaa...'")),
    broken("empty name", edit(2, "name: ''"), (2, "name", "should be text of at least 1 character(s), not ''")),
    broken("name that leaves the folder", edit(2, "name: ../other"), (2, "name", "without slashes")),
    broken("name that moves the cursor", edit(2, 'name: "a\\e[2J"'), (2, "name", "control characters")),
    broken("name that is too long for a folder", edit(2, f"name: {'a' * 300}"), (2, "name", "at most 200 bytes")),
    broken("NUL in a text", edit(2, 'name: "a\\0b"'), (2, "name", "has characters that no text has")),
    broken("half a surrogate pair", edit(2, 'name: "\\ud800"'), (2, "name", "has characters that no text has")),
    broken("key given twice", more("seed: 2"), (18, "seed", "given twice, first at broken.yaml:3")),
    broken(
        "key given twice in a section", edit(6, "  clients: 10\n  clients: 3"), (7, "data.clients", "given twice, first at broken.yaml:6")
    ),
    broken("key that is a list", more("? [a, b]\n: x"), (18, "?", "the name of a field must be a plain word")),
    broken(
        "several at once, in the order of the file",
        edit(7, "  partition: {name: dirichlet, alpha: 0}\n  clients: 3").replace("rounds: 2", "rounds: !x 3")
        + "engine: {worker: 2, device: gpu}\n",
        (7, "data.partition.alpha", "should be greater than 0, not 0"),
        (8, "data.clients", "given twice"),
        (17, "rounds", "the tag !x is not allowed"),
        (19, "engine.device", "should be 'auto', 'cpu' or 'cuda', not 'gpu'"),
        (19, "engine.worker", "did you mean 'workers'?"),
    ),
]

COMBINATIONS = [
    broken(
        "pace that a strategy does not run at",
        edit(12, "pace: {name: buffered, concurrency: 5, buffer: 2}").replace("fedavg", "fedau"),
        (13, "strategy", "fedau does not run at the pace 'buffered'; it declares: sync"),
    ),
    broken(
        "over-selection of everybody", edit(12, "pace: {name: sync, over_selection: 0.3}"), (12, "pace", "over_selection needs a cohort")
    ),
    broken("deadline without a time", edit(12, "pace: deadline"), (12, "pace.seconds", "is required")),
    broken(
        "dropping out more than always",
        edit(11, "  faults: {drop: {download: 0.5, upload: 0.6}}"),
        (11, "fleet.faults.drop", "together they are more than 1"),
    ),
    broken("chance above one", edit(11, "  faults: {duplicate: 1.5}"), (11, "fleet.faults.duplicate", "1")),
    broken(
        "neither strategy nor phases",
        without(13, 16),
        (2, "strategy", "is required (or `phases`); there are: "),
        (2, "rounds", "is required (or `phases`), e.g. rounds: 100"),
    ),
    broken("strategy without rounds", without(16, 16), (2, "rounds", "is required (or `phases`), e.g. rounds: 100")),
    broken(
        "strategy and phases",
        more("phases:\n- {strategy: fedavg, rounds: 1}"),
        (18, "phases", "either `phases`, or `strategy` and `rounds`"),
    ),
    broken(
        "phases without a phase", without(13, 16) + "phases: []\n", (14, "phases", "is empty; a scenario trains for at least one phase")
    ),
    broken("program of another strategy", edit(14, "  name: scaffold"), (15, "strategy.local", "only 'scaffold-sgd' fits here, not 'sgd'")),
    broken(
        "mistakes in a phase",
        more("phases:\n- strategy: fedavg\n  rounds: 1\n- {strategy: {name: fedavg, lr: 1}, round: 2}"),
        (21, "phases.1.strategy.lr", "unknown field; fields: local"),
        (21, "phases.1.rounds", "is required"),
        (21, "phases.1.round", "'rounds'"),
    ),
    broken("clients evaluated without test data", without(8, 8), (16, "evaluate.clients", "needs client test data; set data.client_test")),
    broken(
        "proxy of two sizes",
        edit(8, "  client_test: 0.2\n  proxy: {size: 3, fraction: 0.1}"),
        (9, "data.proxy", "either `size` or `fraction`"),
    ),
    broken(
        "range upside down",
        edit(11, "  participation: {name: bernoulli, rates: {name: uniform-range, low: 0.9, high: 0.1}}"),
        (11, "fleet.participation.rates", "low = 0.9 is above high = 0.1"),
    ),
]

YAML = [
    broken(
        "flow list that is not closed",
        edit(9, "model: {name: mlp, hidden: [8}"),
        (9, "", "not valid YAML: expected ',' or ']', but got '}'"),
    ),
    broken(
        "flow mapping that is not closed", edit(9, "model: {name: mlp"), (10, "", "(while parsing a flow mapping, which begins in line 9)")
    ),
    broken("indentation that does not fit", edit(6, "   clients: 10"), (6, "", "not valid YAML")),
    broken("tab for indentation", edit(6, "\tclients: 10"), (6, "", "a tab in the indentation; use spaces")),
    broken("quote that is not closed", edit(2, "name: 'base"), (18, "", "not valid YAML: found unexpected end of stream")),
    broken("unknown alias", edit(3, "seed: *one"), (3, "", "not valid YAML: found undefined alias 'one'")),
    broken("second document", more("---\nname: other"), (18, "", "expected a single document in the stream, but found another")),
    broken("bomb of aliases", LAUGHS, (5, "e", "more than 20000 values")),
    broken("alias inside itself", more("a: &a [*a]"), (18, "a.0", "an alias (*) inside of what it stands for"), (18, "a", "unknown field")),
    broken("deep nesting", more("a: " + "[" * 20_000 + "]" * 20_000), (18, "", "nested more than 40 levels deep")),
    broken("deep nesting by aliases", more("a: &a " + "[" * 30 + "]" * 30 + "\nb: " + "[" * 30 + "*a" + "]" * 30), (19, "b", "40 levels")),
    broken("too many values", "a: [" + "1, " * 30_000 + "1]", (1, "", "more than 20000 values")),
    broken("too many bytes", BASE.encode() + b"#" * (1 << 20), (1, "", "more than 1048576 bytes")),
    broken(
        "tag that calls a function",
        edit(2, "name: !!python/object/apply:os.system [echo]"),
        (2, "name", "!!python/object/apply:os.system is not"),
    ),
    broken(
        "tag that names a function", edit(2, "name: !!python/name:os.system"), (2, "name", "the tag !!python/name:os.system is not allowed")
    ),
    broken("tag of one's own on a mapping", edit(4, "data: !mine"), (4, "data", "the tag !mine is not allowed")),
    broken("tag that does not fit", edit(2, "name: !!map text"), (2, "name", "the tag !!map is not allowed here")),
    broken("tag whose value does not fit", edit(16, "rounds: !!int two"), (16, "rounds", "'two' is not a value of type int")),
    broken("empty file", "", (1, "", "the file is empty; a scenario has at least data, model")),
    broken("only a comment", "# nothing\n", (1, "", "the file is empty")),
    broken("list at the top", "- a\n- b\n", (1, "", "a scenario is a mapping of fields")),
    broken("word at the top", "\n\nhello\n", (3, "", "a scenario is a mapping of fields")),
    broken("binary file", bytes(range(128, 256)) * 4, (1, "", "not a text file")),
    broken("Latin-1", edit(2, "name: café").encode("latin-1"), (2, "", "not a text file (byte 67 is not UTF-8)")),
    broken("UTF-16", BASE.encode("utf-16"), (1, "", "not a text file (byte 0 is not UTF-8)")),
    broken("control character", edit(5, "  source: dig\x08its"), (5, "", "not a text file (it has the character 0x8)")),
]

WORLD = [
    broken(
        "slow labels that are not there",
        edit(11, "  latency: {compute: {name: pareto, least: 1.0}, slow_labels: [10]}"),
        (11, "fleet.latency.slow_labels", "there is no class 10; classes are 0 to 9"),
    ),
    broken(
        "bandwidth of nothing",
        edit(11, "  latency: {up: {name: constant, value: 0.0}}"),
        (11, "fleet.latency.up", "never ends; leave up out for no delay"),
    ),
    broken(
        "devices that were not recorded",
        edit(11, "  latency: {delay: {name: recorded, file: no.csv}}"),
        (11, "fleet.latency.delay.file", "there is no file no.csv"),
    ),
    broken(
        "buffer that never fills",
        edit(12, "pace: {name: buffered, concurrency: 5, buffer: 11}"),
        (12, "pace.buffer", "11 updates, but there are only 10 clients"),
    ),
    broken(
        "classes of a task that has none",
        edit(5, "  source: least-squares\n  clients: 10")
        .replace("  clients: 10\n  clients: 10", "  clients: 10")
        .replace("partition: {name: dirichlet, alpha: 0.3}", "partition: linear")
        .replace("model: {name: mlp, hidden: [8]}", "model: logreg")
        .replace("evaluate: {clients: true}", "evaluate: {classes: true}"),
        (17, "evaluate.classes", "only a classification has classes"),
    ),
    broken("more clients than examples", edit(6, "  clients: 100000"), (6, "data.clients", "100000 clients cannot share 1438 examples")),
    broken("no number of clients", without(6, 6), (4, "data.clients", "say how many clients there are")),
    broken(
        "m of N with m > N",
        edit(11, "  participation: {name: uniform, clients: 11}"),
        (11, "fleet.participation.clients", "there are only 10"),
    ),
    broken("data file that is missing", edit(5, "  source: {name: npz, path: none.npz}"), (5, "data.source", "no file; looked for")),
    broken("data file that is broken", edit(5, "  source: {name: npz, path: broken.yaml}"), (5, "data.source", "broken.yaml is broken")),
    broken(
        "trace that is missing",
        edit(11, "  participation: {name: trace, file: no.csv}"),
        (11, "fleet.participation.file", "no file no.csv"),
    ),
    broken("model that does not fit the data", edit(9, "model: char-lstm"), (9, "model", "models for image: cnn")),
    broken("partition that does not fit the data", edit(7, "  partition: natural"), (7, "data.partition", "take another partition")),
    broken(
        "function that is not there",
        edit(9, "model: {name: python, function: 'os:nothing'}"),
        (9, "model.function", "'os' has no function 'nothing'"),
    ),
]


@pytest.mark.parametrize(("text", "problems"), [*FIELDS, *COMBINATIONS, *YAML, *WORLD])
def test_a_broken_scenario_is_refused(tmp_path: Path, text: str | bytes, problems: tuple[tuple[int, str, str], ...]) -> None:
    check(run_broken(tmp_path, text, "--output", "out"), problems)


def test_the_scenario_they_break_is_sound(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(BASE)
    assert load(tmp_path / "base.yaml")[0].name == "base"


@register("toy-proxy")
@dataclass(frozen=True)
class ToyProxy(Strategy):
    """Needs examples of the server's own, and runs at one pace that is not there."""

    paces: ClassVar[frozenset[str]] = frozenset({"buffered"})
    needs: ClassVar[frozenset[str]] = frozenset({"proxy"})
    local: LocalProgram = Sgd()

    def init(self, problem: Any, w: Any) -> Any:
        raise AssertionError("never runs")

    def server(self, problem: Any, state: Any, updates: Any, key: Any) -> Any:
        raise AssertionError("never runs")


del Strategy.choices["toy-proxy"]  # it is there only where a test asks for it


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(Strategy.choices, "toy-proxy", ToyProxy)
    scenarios.adapter.cache_clear()
    yield
    scenarios.adapter.cache_clear()


@pytest.mark.usefixtures("toy")
def test_a_strategy_says_what_it_needs_and_at_which_pace_it_runs(tmp_path: Path) -> None:
    assert lookup(Strategy, "toy-proxy") is ToyProxy
    text = edit(14, "  name: toy-proxy")
    pace = "toy-proxy does not run at the pace 'sync'; it declares: buffered"
    check(run_broken(tmp_path, text), ((13, "strategy", pace),))
    ToyProxy.paces = frozenset({"sync"})
    try:
        check(
            run_broken(tmp_path, text), ((13, "strategy", "toy-proxy needs proxy data on the server; add data.proxy, e.g. {source: train"),)
        )
        phases = without(13, 16) + "phases:\n- {strategy: fedavg, rounds: 1}\n- {strategy: toy-proxy, rounds: 1}\n"
        check(run_broken(tmp_path, phases), ((16, "phases.1.strategy", "toy-proxy needs proxy data"),))
        (tmp_path / "sound.yaml").write_text(text.replace("  client_test: 0.2", "  client_test: 0.2\n  proxy: {size: 20}"))
        assert isinstance(load(tmp_path / "sound.yaml")[0].strategy, ToyProxy)
    finally:
        ToyProxy.paces = frozenset({"buffered"})


SETS = [
    ("strategy.serverlr=1", "strategy.serverlr: unknown field (did you mean 'server_lr'?)"),
    ("rounds=many", "rounds: should be a whole number, not 'many'"),
    ("rounds", "rounds: write --set section.field=value"),
    ("=1", "write --set section.field=value"),
    ("strategy..lr=1", "strategy..lr: write --set section.field=value"),
    ("model.hidden=[1", "model.hidden: not valid YAML: expected ',' or ']'"),
    (
        "model.hidden.7=3",
        "model.hidden.7: model.hidden is a list with one entry, 0; it can also be set as a whole, e.g. --set model.hidden=",
    ),
    ("model.hidden=&a [*a]", "model.hidden.0: an alias (*) inside of what it stands for"),
    ("name=!!python/name:os.system", "name: the tag !!python/name:os.system is not allowed"),
    ("strategy={name: fedavg, local: {lr: -1, name: sgd}}", "strategy.local.lr: should be greater than 0, not -1"),
    ("strategy.local.lr=.inf", "strategy.local.lr: should be a finite number, not .inf"),
    ("data.clients=1000000", "data.clients: 1000000 clients cannot share 1438 examples"),
    (f"{'a.' * 50}a=1", "a.a.a.a"),
    ('name="a\tb"', "name: names the folder of a run"),
]


@pytest.mark.parametrize(("assignment", "fragment"), SETS, ids=[fragment[:30] for _, fragment in SETS])
def test_a_bad_override_is_refused_by_its_name(tmp_path: Path, assignment: str, fragment: str) -> None:
    (line,) = run_broken(tmp_path, BASE, "--set", assignment)
    option = assignment.replace("\t", "\\t")
    assert line.startswith(f"error: --set {option}: {fragment}")


def test_all_problems_of_file_and_overrides_are_told_at_once(tmp_path: Path) -> None:
    lines = run_broken(tmp_path, more("seeds: 3"), "--set", "rounds=0", "--set", "pace", "--set", "engine.device=gpu")
    assert len(lines) == 4
    places = [line.split(": ")[1] for line in lines]
    assert sorted(places) == ["--set engine.device=gpu", "--set pace", "--set rounds=0", "broken.yaml:18"]


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("none.yaml", "none.yaml: no such file; scenarios that come with fedsim: "),
        ("quickstat", "(did you mean 'quickstart'?)"),
        (".", ".: a folder, not a scenario file"),
        ("a\0b", "no such file"),
    ],
)
def test_a_scenario_that_is_no_file_is_refused(tmp_path: Path, name: str, fragment: str) -> None:
    for command in ("run", "show"):
        result = CliRunner().invoke(app, [command, name])
        assert result.exit_code == 2
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        assert fragment in line
    assert not list(tmp_path.iterdir())


def finished(*arguments: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """A Python process that ran to its end, and its seconds of the processor: others use this machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (more("seeds: 3"), (), "error: broken.yaml:18: seeds: unknown field (did you mean 'seed'?); "),
        (LAUGHS, (), "error: broken.yaml:5: e: more than 20000 values"),
        (BASE, ("--set", "strategy.local.lr=x"), "error: --set strategy.local.lr=x: strategy.local.lr: should be a number, not 'x'"),
    ],
    ids=["unknown field", "bomb", "override"],
)
def test_a_refusal_in_a_process_of_its_own_takes_seconds(tmp_path: Path, text: str, options: tuple[str, ...], message: str) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    _, imports = finished("-c", "import fedsim.cli, fedsim.scenario, torch", cwd=tmp_path)
    done, seconds = finished("-m", "fedsim.cli", "run", "broken.yaml", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    assert "Traceback" not in done.stderr
    assert seconds < 2 * imports + 1
    assert [path.name for path in tmp_path.iterdir()] == ["broken.yaml"]


# Fuzzing: whatever is in the file, the outcome is a scenario or a refusal, and a refusal is lines that name the file.

FUZZ = settings(derandomize=True, deadline=None, max_examples=150, database=None)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "fuzz.yaml"


def outcome(file: Path, content: bytes, *assignments: str) -> Scenario | None:
    file.write_bytes(content)
    try:
        scenario, _ = load(file, assignments)
    except InvalidScenario as refusal:
        lines = str(refusal).split("\n")
        assert all(line.startswith((f"{file}:", "--set ")) and line.isprintable() for line in lines)
        return None
    values = dump_scenario(scenario)
    assert dump_scenario(validate(Document("again", yaml.safe_load(yaml.safe_dump(values))))) == values
    return scenario


@FUZZ
@given(st.binary(max_size=200))
@example(b"\xef\xbb\xbf" + BASE.encode())
@example(BASE.encode().replace(b"\n", b"\r\n"))
@example(b"a: =\nb: <<\n")
@example(b"\x85 \xe2\x80\xa8 : [\n\t")
def test_fuzz_bytes(file: Path, content: bytes) -> None:
    outcome(file, content)


WORDS = sorted({*re.findall(r"[a-z_]+", QUICKSTART), "phases", "engine", "output", "proxy", "npz", "python", "args", "workers", "listed"})
SCALARS = st.one_of(
    st.sampled_from(WORDS),
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=8),
    st.dates(),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=4), inner, max_size=5),
    max_leaves=12,
)


@FUZZ
@given(
    st.dictionaries(st.sampled_from(["name", "data", "model", "strategy", "rounds", "phases", "fleet", "pace", "engine", "output"]), TREES)
)
def test_fuzz_structures(file: Path, values: dict[str, Any]) -> None:
    outcome(file, yaml.safe_dump(values, allow_unicode=False).encode("utf-8", "surrogatepass"))


@FUZZ
@given(
    st.lists(
        st.tuples(st.sampled_from(["delete", "repeat", "garble", "indent", "replace"]), st.integers(0, 99), st.integers(0, 99), SCALARS),
        max_size=3,
    )
)
def test_fuzz_mutations(file: Path, changes: list[tuple[str, int, int, Any]]) -> None:
    rows = QUICKSTART.splitlines()
    for how, where, place, value in changes:
        i = where % len(rows)
        row, cut = rows[i], place % (len(rows[i]) + 1)
        words = list(re.finditer(r"[\w.]+", row))
        if how == "replace" and words:
            word = words[place % len(words)]
            rows[i] = (
                row[: word.start()] + yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip() + row[word.end() :]
            )
        else:
            new = {
                "delete": [],
                "repeat": [row, row],
                "indent": [" " * (place % 4) + row],
                "garble": [row[:cut] + "[]{}:,&*!|>'\"%@`#\t-"[place % 20 :][:2] + row[cut:]],
            }
            rows[i : i + 1] = new.get(how, [row])
        rows = rows or [""]
    scenario = outcome(file, "\n".join(rows).encode("utf-8", "surrogatepass"))
    assert changes or scenario is not None


@FUZZ
@given(
    st.sampled_from(
        ["strategy.local", "model.hidden", "rounds", "pace", "data.partition.alpha", "name", "a.b", "model.hidden.0", "phases"]
    ),
    st.text(max_size=12),
)
@example("data", "")
@example("name", "2024-01-01")
@example("strategy", "{1: 2, [1]: 3, ? {a: b} : c}")
@example("strategy", "!!set {a}")
@example("rounds", "!!binary aGVsbG8=")
def test_fuzz_overrides(file: Path, field: str, value: str) -> None:
    outcome(file, BASE.encode(), f"{field}={value}")


def test_what_the_fuzz_calls_sound_is_sound(file: Path) -> None:
    assert isinstance(outcome(file, QUICKSTART.encode()), Scenario)
    assert outcome(file, b"rounds: 1") is None
