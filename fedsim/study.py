"""F5. A study: one question, asked of several strategies under several seeds and settings. From YAML to one typed, frozen value.

    study: quick
    asks: Which strategy learns digits fastest when labels are skewed?
    scenario: quickstart                     # a file, the name of one that comes with fedsim, or a scenario written out here
    strategies:
      fedavg: fedavg                         # what is not said of `local` comes from the scenario, for everyone alike
      gentle: {name: fedavg, server_lr: 0.5}
    seeds: 3
    over: {data.partition.alpha: [0.1, 1]}

A study is validated like a scenario, and so is every cell of its grid (`fedsim.grid`), before anything starts.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import TypeAdapter, ValidationError

from fedsim.document import Document, Path_, shown
from fedsim.errors import did_you_mean
from fedsim.registry import section
from fedsim.scenario import load_plugins
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
    strategies: label to strategy, or to a list of phases. What a strategy's `local` leaves out comes from the scenario's own program.
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


def validate_study(document: Document) -> Study:
    """The study in a document. Raises `InvalidScenario` with all that is wrong with its own fields; its cells say the rest."""
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
