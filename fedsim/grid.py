"""F5. The grid of a study: the scenario of each cell, made of the documents that it was written in, so that errors can say where.

plan = load_study(Path("quick.yaml"))
for cell in plan.cells():
    print(cell.place, cell.scenario.seed)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from fedsim.bundle import find, is_study
from fedsim.document import Document, InvalidScenario, Path_, parse
from fedsim.errors import ScenarioError
from fedsim.registry import fields_of
from fedsim.scenario import Scenario, validate
from fedsim.strategy import LocalProgram, Strategy
from fedsim.study import Study, setting_name, slug, validate_study


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
    outer, before = _innermost(document.values.get("strategy"))
    local = before.get("local") if isinstance(before, dict) else None
    if isinstance(study.values["strategies"][label], list):  # phases, which say themselves how long they are
        for name in ("strategy", "rounds"):
            document.values.pop(name, None)
        document.graft(("phases",), study, ("strategies", label))
        return
    shared = {k[len(outer) + 1 :]: v for k, v in document.lines.items() if k[: len(outer) + 2] == ("strategy", *outer, "local")}
    document.graft(("strategy",), study, ("strategies", label))
    if isinstance(document.values["strategy"], str):
        document.values["strategy"] = {"name": document.values["strategy"]}
    outer, strategy = _innermost(document.values["strategy"])
    if not isinstance(strategy, dict):
        return
    merged = _merge_program(strategy.get("local"), {"name": local} if isinstance(local, str) else local, str(strategy.get("name")))
    if merged is not None:
        strategy["local"] = merged
        for path, place in shared.items():
            document.lines.setdefault(("strategy", *outer, *path), place)


def _innermost(strategy: Any) -> tuple[Path_, Any]:
    """Where below a strategy the one is that none is inside of, and what it says: it has the client program."""
    path: Path_ = ()
    while isinstance(strategy, dict) and "inner" in strategy:
        if isinstance(strategy["inner"], str):
            strategy["inner"] = {"name": strategy["inner"]}
        path, strategy = (*path, "inner"), strategy["inner"]
    return path, strategy


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
    study = validate_study(document)
    plan = Plan(study, document, _base(study, document, path))
    plan.cells()
    for label, setting in product(study.strategies, plan.settings()):
        plan.candidates(label, setting)
    return plan


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
