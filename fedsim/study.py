"""F5. A study: one question, asked of several strategies under several seeds and settings. From YAML to the scenario of each cell.

    study: quick
    asks: Which strategy learns digits fastest when labels are skewed?
    scenario: quickstart                     # a file, the name of one that comes with fedsim, or a scenario written out here
    strategies:
      fedavg: fedavg                         # what is not said of `local` comes from the scenario, for everyone alike
      gentle: {name: fedavg, server_lr: 0.5}
    seeds: 3
    over: {data.partition.alpha: [0.1, 1]}

A study is validated like a scenario, and so is every cell of its grid, before anything starts.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import TypeAdapter, ValidationError

from fedsim.bundle import find, is_study
from fedsim.document import Document, InvalidScenario, Path_, parse, shown
from fedsim.errors import ScenarioError, did_you_mean
from fedsim.registry import fields_of, section
from fedsim.scenario import Scenario, load_plugins, validate
from fedsim.strategy import LocalProgram, Strategy
from fedsim.wording import explain

Values = Annotated[tuple[Any, ...], MinLen(1)]
Seed = Annotated[int, Ge(0), Lt(2**63)]

OWN = ("name", "seed", "output.folder")
"""Fields of a scenario that the study sets itself."""


@section
@dataclass(frozen=True)
class Tune:
    """Every strategy gets the best of some values, by a score on examples that are held back from its clients' training data.

    over: values to try, by field of the scenario (strategy.local.lr); all combinations.
    only: more fields for some strategies, by label.
    validation: the fraction of each client's training data that is held back, while tuning only.
    rounds: of a tuning run; null for the scenario's.
    """

    over: dict[str, Values] = field(default_factory=dict)
    only: dict[str, dict[str, Values]] = field(default_factory=dict)
    validation: Annotated[float, Gt(0), Lt(1)] = 0.2
    rounds: Annotated[int, Gt(0)] | None = None


@section
@dataclass(frozen=True)
class Study:
    """A grid of runs, strategies x seeds x settings, paired within each seed.

    study: its name.
    asks: what one wants to know, in a sentence.
    scenario: what all cells share: a file, a name that comes with fedsim, or a scenario written out.
    strategies: label to strategy. What `local` leaves out comes from the scenario's own program.
    seeds: how many (1, 2, ...), or which.
    set: fields of the scenario to override, by dotted path.
    over: fields of the scenario to vary, each with its values; all combinations.
    only: fields to override for one strategy, by label: {fedasync: {pace: ...}}.
    baseline: the label that the others are compared with; null for the first.
    metric: what to compare; null for the headline of the task.
    target: a value of the metric; how many rounds and bytes it takes to reach it.
    tune: choose hyper-parameters for each strategy first.
    """

    study: Annotated[str, MinLen(1)]
    asks: Annotated[str, MinLen(1)]
    scenario: Annotated[str, MinLen(1)] | dict[str, Any]
    strategies: dict[str, Any]
    seeds: Annotated[int, Gt(0), Lt(1000)] | Annotated[tuple[Seed, ...], MinLen(1)] = 3
    set: dict[str, Any] = field(default_factory=dict)
    over: dict[str, Values] = field(default_factory=dict)
    only: dict[str, dict[str, Any]] = field(default_factory=dict)
    baseline: str | None = None
    metric: str | None = None
    target: float | None = None
    tune: Tune | None = None

    def seed_list(self) -> tuple[int, ...]:
        """The seeds."""
        return self.seeds if isinstance(self.seeds, tuple) else tuple(range(1, self.seeds + 1))

    def base_label(self) -> str:
        """The label of the baseline."""
        return self.baseline if self.baseline is not None else next(iter(self.strategies))


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        label: of the strategy.
        seed: of the run.
        setting: values of the swept fields, by dotted path; when tuning, also of the tuned ones.
        place: its run folder, relative to the study's.
        scenario: what runs.
        document: where the scenario's values come from, to explain errors.
    """

    label: str
    seed: int
    setting: dict[str, Any]
    place: str
    scenario: Scenario
    document: Document


Choices = dict[tuple[str, str], dict[str, Any]]
"""What was tuned: of a strategy's label and the name of a setting, values by dotted path."""


@dataclass(frozen=True)
class Plan:
    """A study with the documents it was read from."""

    study: Study
    document: Document
    base: Document

    def settings(self) -> list[dict[str, int]]:
        """Every combination of the swept values, as positions in their lists."""
        over = self.study.over
        return [dict(zip(over, at, strict=True)) for at in product(*(range(len(v)) for v in over.values()))]

    def cells(self, choices: Choices | None = None) -> list[Cell]:
        """The grid, one seed after the other, so that neighbours share their data. Raises `InvalidScenario` with all that is wrong."""
        grid = product(self.study.seed_list(), self.settings(), self.study.strategies)
        return _all_valid([partial(self._cell, seed, setting, label, choices or {}) for seed, setting, label in grid])

    def candidates(self, label: str, setting: dict[str, int]) -> list[Cell]:
        """The runs that tune one strategy for one setting, under the first seed."""
        tune = self.study.tune
        if tune is None:
            return []
        places: dict[str, Path_] = {f: ("tune", "over", f) for f in tune.over}
        places |= {f: ("tune", "only", label, f) for f in tune.only.get(label, {})}
        trials = [dict(zip(places, at, strict=True)) for at in product(*(range(len(self._value(p))) for p in places.values()))]
        return _all_valid([partial(self._candidate, label, setting, trial, places) for trial in trials])

    def _cell(self, seed: int, setting: dict[str, int], label: str, choices: Choices) -> Cell:
        document = self._document(seed, setting, label)
        chosen = {path: self.study.over[path][at] for path, at in setting.items()}
        for path, value in choices.get((label, setting_name(chosen)), {}).items():
            document.place(tuple(path.split(".")), value, "tuned")
        place = "/".join(part for part in (slug(setting_name(chosen)), label, f"seed-{seed}") if part)
        return Cell(label, seed, chosen, place, validate(document), document)

    def _candidate(self, label: str, setting: dict[str, int], trial: dict[str, int], places: dict[str, Path_]) -> Cell:
        assert self.study.tune is not None
        seed = self.study.seed_list()[0]
        document = self._document(seed, setting, label)
        for path, at in trial.items():
            document.graft(tuple(path.split(".")), self.document, (*places[path], at))
        document.place(("data", "validation"), self.study.tune.validation, "tune.validation")
        if self.study.tune.rounds is not None:
            document.place(("rounds",), self.study.tune.rounds, "tune.rounds")
        base = {path: self.study.over[path][at] for path, at in setting.items()}
        tried = {path: self._value((*places[path], at)) for path, at in trial.items()}
        place = "/".join(part for part in ("tuning", slug(setting_name(base)), label, slug(setting_name(tried)) or "only") if part)
        return Cell(label, seed, base | tried, place, validate(document), document)

    def _value(self, path: Path_) -> Any:
        value: Any = self.document.values
        for part in path:
            value = value[part]
        return value

    def _document(self, seed: int, setting: dict[str, int], label: str) -> Document:
        """The scenario of a cell: the shared one, then `set`, the strategy, the setting, and what only this strategy has."""
        document = self.base.copy()
        study = self.document
        for path in self.study.set:
            document.graft(tuple(path.split(".")), study, ("set", path))
        _put_strategy(document, study, label)
        for path, at in setting.items():
            document.graft(tuple(path.split(".")), study, ("over", path, at))
        for path in self.study.only.get(label, {}):
            document.graft(tuple(path.split(".")), study, ("only", label, path))
        document.place(("name",), f"{self.study.study}-{label}", "the study's name and a label")
        document.place(("seed",), seed, "seeds")
        return document


def _all_valid(makers: list[partial[Cell]]) -> list[Cell]:
    cells, wrong = [], dict[str, None]()
    for make in makers:
        try:
            cells.append(make())
        except InvalidScenario as error:
            wrong |= dict.fromkeys(str(error).splitlines())
    if wrong:
        raise InvalidScenario("\n".join(wrong))
    return cells


def _put_strategy(document: Document, study: Document, label: str) -> None:
    """Let the document's strategy be the study's under `label`, with the client program of the one before where it says nothing else."""
    before = document.values.get("strategy")
    local = before.get("local") if isinstance(before, dict) else None
    shared = {k: v for k, v in document.lines.items() if k[:2] == ("strategy", "local")}
    document.graft(("strategy",), study, ("strategies", label))
    strategy = document.values["strategy"]
    if isinstance(strategy, str):
        strategy = document.values["strategy"] = {"name": strategy}
    if not isinstance(strategy, dict):
        return
    merged = _merge_program(strategy.get("local"), {"name": local} if isinstance(local, str) else local, str(strategy.get("name")))
    if merged is not None:
        strategy["local"] = merged
        for path, place in shared.items():
            document.lines.setdefault(path, place)


def _merge_program(own: Any, shared: Any, strategy: str) -> Any:
    """A strategy's client program: its own fields, the shared ones that this program has too, and the name of a program that fits."""
    cls = Strategy.choices.get(strategy)
    if not isinstance(shared, dict) or not isinstance(own, (dict, str, type(None))) or cls is None or "local" not in fields_of(cls):
        return own
    own = {"name": own} if isinstance(own, str) else own or {}
    name = own.get("name") or shared.get("name")
    program = LocalProgram.choices.get(str(name))
    if "name" not in own and program is not None and program.receives is not cls.sends:  # type: ignore[attr-defined]
        default = cls.__dataclass_fields__["local"].default  # type: ignore[attr-defined]
        name = getattr(type(default), "registered_name", name)
        program = LocalProgram.choices.get(str(name))
    kept = {k: v for k, v in shared.items() if program is None or k in fields_of(program)}
    return {"name": name} | {k: v for k, v in kept.items() if k != "name"} | {k: v for k, v in own.items() if k != "name"}


def setting_name(setting: dict[str, Any]) -> str:
    """A setting in a few words: `partition.alpha=0.1, rates.mean=0.5`; empty without one."""
    return ", ".join(f"{short(path)}={shown(value)}" for path, value in setting.items())


def short(path: str) -> str:
    """The last two parts of a field's path, which say enough."""
    return ".".join(path.split(".")[-2:])


def slug(text: str) -> str:
    """A text as a part of a file's name."""
    return re.sub(r"[^\w.=,+-]+", "_", text).strip("_")[:120]


@cache
def adapter() -> TypeAdapter[Study]:
    """The validator of studies."""
    load_plugins()
    return TypeAdapter(Study)


def load_study(path: Path, options: dict[str, str] | None = None, assignments: tuple[str, ...] = ()) -> Plan:
    """Read and validate a study and every cell of its grid.

    `path` may also be a scenario, if `options` say which strategies to compare. `options` are fields of the study as YAML, from the command
    line; `assignments` (`section.field=value`) are added to its `set`. Raises `InvalidScenario` with all that is wrong.
    """
    options = options or {}
    if is_study(path):
        document = parse(path)
    elif "strategies" in options:
        document = Document(str(path), {"study": path.stem, "asks": "Which of these strategies does better here?", "scenario": str(path)})
    else:
        raise InvalidScenario(f"{path}: a scenario, not a study (no field `study`); say what to compare: --strategies fedavg,fedprox")
    for name, text in options.items():
        document.set(f"{name}={text}", f"--{name}")
    for assignment in assignments:
        field_, equals, text = assignment.partition("=")
        given = Document(document.path, {})
        given.set(f"value={text}" if equals and field_ else assignment, f"--set {assignment}")
        given.refuse({})
        document.graft(("set", field_.strip()), given, ("value",))
    study = _validate_study(document)
    plan = Plan(study, document, _base(study, document, path))
    plan.cells()
    for label, setting in product(study.strategies, plan.settings()):
        plan.candidates(label, setting)
    return plan


def _validate_study(document: Document) -> Study:
    problems: dict[Path_, str] = {}
    try:
        study = adapter().validate_json(json.dumps(document.values), strict=True)
        for path, message in _faults(study):
            problems.setdefault(path, message)
    except ValidationError as error:
        problems = explain(Study, document.values, error)
    document.refuse(problems)
    return study


def _faults(study: Study) -> list[tuple[Path_, str]]:
    """What no single field can see to be wrong."""
    found: list[tuple[Path_, str]] = []
    rule = "names folders: at most 80 bytes, without slashes, leading dots and control characters"
    for where, name in [(("study",), study.study), *((("strategies", label), label) for label in study.strategies)]:
        if not name or not name.isprintable() or any(c in name for c in "/\\") or name[0] == "." or len(name.encode()) > 80:
            found.append((where, rule))
    if not study.strategies:
        found.append((("strategies",), "is empty; give at least one, e.g. {fedavg: fedavg}"))
    if len(set(study.seed_list())) < len(study.seed_list()):
        found.append((("seeds",), "has a seed twice"))
    if study.baseline is not None and study.baseline not in study.strategies:
        found.append((("baseline",), _no_label(study.baseline, study)))
    tuned = study.tune.only if study.tune else {}
    found += [(("only", label), _no_label(label, study)) for label in study.only if label not in study.strategies]
    found += [(("tune", "only", label), _no_label(label, study)) for label in tuned if label not in study.strategies]
    for where in [*(("set", f) for f in study.set), *(("over", f) for f in study.over)]:
        if where[-1] in OWN:
            found.append((where, "belongs to the study" + ("; use `seeds`" if where[-1] == "seed" else "")))
        elif not all(str(where[-1]).split(".")):
            found.append((where, "should be the path of a field, e.g. data.partition.alpha"))
    if study.tune and not study.tune.over and not study.tune.only:
        found.append((("tune", "over"), "says what to try, e.g. {strategy.local.lr: [0.03, 0.1, 0.3]}"))
    return found


def _no_label(label: str, study: Study) -> str:
    return f"there is no strategy {shown(label)}{did_you_mean(label, study.strategies)}; there are: {', '.join(study.strategies)}"


def _base(study: Study, document: Document, path: Path) -> Document:
    """The document of what all cells share."""
    if isinstance(study.scenario, dict):
        base = Document(document.path, {})
        for name in study.scenario:
            base.graft((name,), document, ("scenario", name))
        return base
    beside = path.parent / study.scenario
    try:
        found = beside if beside.is_file() else find(study.scenario)
    except InvalidScenario as error:
        raise InvalidScenario(document.explain(ScenarioError("scenario", str(error)))) from None
    if is_study(found):
        raise InvalidScenario(document.explain(ScenarioError("scenario", f"{found} is a study itself; name a scenario")))
    return parse(found)


def options(strategies: str | None, seeds: str | None, over: list[str], baseline: str | None, target: str | None) -> dict[str, str]:
    """What the command line says of a study, as fields in YAML."""
    out = {"seeds": seeds, "baseline": baseline, "target": target}
    if strategies is not None:
        names = [name.strip() for name in strategies.split(",") if name.strip()]
        out["strategies"] = "{" + ", ".join(f"{name}: {name}" for name in names) + "}"
    if over:
        axes = [axis.partition("=")[::2] for axis in over]
        out["over"] = "{" + ", ".join(f"{path.strip()}: [{values}]" for path, values in axes) + "}"
    return {name: text for name, text in out.items() if text is not None}


def study_schema() -> dict[str, Any]:
    """JSON Schema of a study, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | adapter().json_schema()
