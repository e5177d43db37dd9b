"""The scenarios that come with fedsim: each loads, says what it is, and reads back from what a run folder keeps of it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsim.bundle import bundled, is_study
from fedsim.conformal import Score, Target
from fedsim.data import Partition, Source
from fedsim.fleet import Modulation, Participation, Rates
from fedsim.folder import Folder
from fedsim.local import Schedule
from fedsim.models import Model
from fedsim.pace import Pace
from fedsim.registry import Kind
from fedsim.scenario import dump_scenario, load, schema
from fedsim.strategy import LocalProgram, Strategy

ROOT = Path(__file__).parents[1] / "scenarios"
FILES = sorted(path for path in ROOT.rglob("*.yaml") if not is_study(path))
PAPERS = [
    "conformal",
    "conformal-exact",
    "conformal-local",
    "conformal-qq",
    "conformal-sketch",
    "conformal-weights",
    "dc-asgd",
    "fedadagrad",
    "fedadam",
    "fedadmm",
    "fedamd",
    "fedasync",
    "fedau",
    "ditto",
    "fedalt",
    "fedavg",
    "fedavg-cnn",
    "fedavgm",
    "fedawe",
    "dp",
    "dp-lora",
    "fedbuff",
    "feddf",
    "fedlaw",
    "fedpara",
    "fedperfix",
    "fedprox",
    "fedsim",
    "fedstale",
    "fedvarp",
    "fedyogi",
    "flower",
    "known-p",
    "krum",
    "local-only",
    "median",
    "mifa",
    "pfedpara",
    "pretrain",
    "scaffold",
    "server-finetune",
    "trimmed-mean",
    "unstale",
    "weight-prediction",
]
BEDS = ("conformal_fashion", "conformal_har", "conformal_hospitals", "million", "pfl_cifar10")
EXPECTED = {"quickstart", *(f"studies/{name}" for name in BEDS), *(f"papers/{name}" for name in PAPERS)}

everyone = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))


def test_which_scenarios_there_are() -> None:
    assert {file.relative_to(ROOT).with_suffix("").as_posix() for file in FILES} == EXPECTED
    assert set(bundled()) == EXPECTED
    assert not list(ROOT.rglob("*.yml")), "would be seen by nobody"


@everyone
def test_it_loads_under_its_own_name(file: Path) -> None:
    scenario, document = load(file)
    assert scenario.name == file.stem
    assert document.problems == {}
    assert all(place.startswith(f"{file}:") for place in document.lines.values())


@everyone
def test_it_begins_by_saying_what_it_is(file: Path) -> None:
    first = file.read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"# \S.{20,}", first), "the catalogue prints this line"


@everyone
def test_what_a_run_folder_keeps_is_the_same_scenario(file: Path, tmp_path: Path) -> None:
    scenario, _ = load(file, ("seed=77",))
    Folder(tmp_path).write_scenario(dump_scenario(scenario))
    again, _ = load(tmp_path / "scenario.yaml")
    assert again == scenario
    assert again != load(file)[0]
    assert dump_scenario(again) == dump_scenario(scenario)


def test_a_field_of_one_class_takes_its_bare_name() -> None:
    scenario, _ = load(ROOT / "quickstart.yaml", ("strategy={name: scaffold, local: scaffold-sgd}",))
    assert dump_scenario(scenario)["strategy"]["local"]["name"] == "scaffold-sgd"


def test_a_dump_writes_every_default_out() -> None:
    values = dump_scenario(load(ROOT / "quickstart.yaml")[0])
    assert list(values)[:4] == ["name", "seed", "data", "model"]
    assert values["strategy"]["local"]["schedule"] == {"name": "constant"}
    assert values["fleet"]["participation"]["modulation"] == {"name": "none"}
    assert values["pace"] == {"name": "sync", "cohort": None, "over_selection": 0.0, "timeout": None}
    assert values["engine"]["workers"] == "auto"
    assert "phases" not in values


# The JSON Schema, which editors check against. `accepts` is as much of JSON Schema as pydantic writes: a test sees to it that no
# more is needed.

KINDS = (Strategy, LocalProgram, Model, Source, Partition, Participation, Rates, Modulation, Schedule, Pace, Score, Target)
TYPES = {"object": dict, "array": list, "string": str, "null": type(None), "boolean": bool, "number": (int, float), "integer": int}
WORDLESS = {"title", "description", "default", "discriminator", "$defs", "$schema"}


def accepts(whole: dict[str, Any], rule: dict[str, Any] | bool, value: Any) -> bool:
    if isinstance(rule, bool):
        return rule
    return all(obeys(whole, rule, word, value) for word in rule.keys() - WORDLESS)


def obeys(whole: dict[str, Any], rule: dict[str, Any], word: str, value: Any) -> bool:
    said = rule[word]
    if word == "$ref":
        return accepts(whole, whole["$defs"][said.removeprefix("#/$defs/")], value)
    if word in {"anyOf", "oneOf"}:
        count = sum(accepts(whole, option, value) for option in said)
        return count == 1 if word == "oneOf" else count > 0
    if word in {"enum", "const"}:
        return value in said if word == "enum" else value == said
    if word == "type":
        return isinstance(value, TYPES[said]) and (said == "boolean" or not isinstance(value, bool))
    if isinstance(value, dict):
        if word == "properties":
            return all(accepts(whole, said[k], v) for k, v in value.items() if k in said)
        if word == "additionalProperties":
            return all(accepts(whole, said, v) for k, v in value.items() if k not in rule.get("properties", {}))
        return word != "required" or set(said) <= set(value)
    if isinstance(value, list):
        sizes = {
            "minItems": len(value) >= said if word == "minItems" else True,
            "maxItems": len(value) <= said if word == "maxItems" else True,
        }
        if word == "prefixItems":
            return all(accepts(whole, r, v) for r, v in zip(said, value, strict=False))
        return all(accepts(whole, said, v) for v in value) if word == "items" else sizes.get(word, True)
    if isinstance(value, str):
        return word != "minLength" or len(value) >= said
    if isinstance(value, (int, float)):
        bounds = {"minimum": value.__ge__, "maximum": value.__le__, "exclusiveMinimum": value.__gt__, "exclusiveMaximum": value.__lt__}
        return word not in bounds or bool(bounds[word](said))
    return True


KNOWN = {
    "$ref",
    "anyOf",
    "oneOf",
    "enum",
    "const",
    "type",
    "properties",
    "additionalProperties",
    "required",
    "minItems",
    "maxItems",
    "prefixItems",
}
KNOWN |= {"items", "minLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}


def rules(node: Any) -> Iterator[dict[str, Any]]:
    """Every schema within a schema."""
    if not isinstance(node, dict):
        return
    yield node
    for word in ("properties", "$defs"):
        for child in node.get(word, {}).values():
            yield from rules(child)
    for word in ("anyOf", "oneOf", "prefixItems"):
        for child in node.get(word, []):
            yield from rules(child)
    for word in ("items", "additionalProperties"):
        yield from rules(node.get(word))


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return json.loads(json.dumps(schema()))


@pytest.fixture
def quickstart() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "quickstart.yaml").read_text(encoding="utf-8"))


def test_the_schema_is_made_of_words_that_this_test_knows(whole: dict[str, Any]) -> None:
    assert {word for rule in rules(whole) for word in rule} <= KNOWN | WORDLESS
    assert whole["$schema"].startswith("https://json-schema.org/draft/2020-12/")
    references = {rule["$ref"].removeprefix("#/$defs/") for rule in rules(whole) if "$ref" in rule}
    assert references == set(whole["$defs"])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_choice_is_in_the_schema(whole: dict[str, Any], kind: type[Kind]) -> None:
    rule = whole["$defs"][kind.__name__]
    tagged = next(option for option in rule.get("anyOf", [rule]) if "oneOf" in option)
    names = [whole["$defs"][option["$ref"].removeprefix("#/$defs/")]["properties"]["name"]["const"] for option in tagged["oneOf"]]
    assert sorted(names) == sorted(kind.choices)
    assert sorted(tagged["discriminator"]["mapping"]) == sorted(kind.choices)
    assert not accepts(whole, rule, "no such name")
    assert not accepts(whole, rule, {"name": "no such name"})
    assert not accepts(whole, rule, {})


def test_a_bare_name_is_in_the_schema_where_no_field_is_required(whole: dict[str, Any]) -> None:
    bare = {name for name, rule in whole["$defs"].items() if name == "Source" for name in rule["anyOf"][0]["enum"]}
    assert {"digits", "mnist"} <= bare
    assert not {"npz", "csv", "jsonl", "huggingface", "python"} & bare
    partition = whole["$defs"]["Partition"]
    assert accepts(whole, partition, "iid")
    assert accepts(whole, partition, {"name": "iid"})
    assert not accepts(whole, partition, {"name": "iid", "alpha": 1})
    assert not accepts(whole, whole["$defs"]["Participation"], "uniform")


def test_defaults_in_the_schema_are_what_one_would_write(whole: dict[str, Any]) -> None:
    program = whole["$defs"]["FedAvg"]["properties"]["local"]["default"]
    assert program["name"] == "sgd"
    assert program["schedule"] == {"name": "constant"}
    for rule in rules(whole):
        for field in rule.get("properties", {}).values():
            if "default" in field:
                assert accepts(whole, field, field["default"]), field


@everyone
def test_the_schema_accepts_it(whole: dict[str, Any], file: Path) -> None:
    assert accepts(whole, whole, yaml.safe_load(file.read_text(encoding="utf-8")))
    assert accepts(whole, whole, json.loads(json.dumps(dump_scenario(load(file)[0]))))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("seeds",), 1),
        (("rounds",), 0),
        (("rounds",), "60"),
        (("rounds",), True),
        (("pace",), "snyc"),
        (("strategy", "name"), "fedavgg"),
        (("strategy", "local", "lr"), 0),
        (("strategy", "local", "momentun"), 0.9),
        (("strategy", "weights"), "sample"),
        (("data", "client_test"), 1),
        (("data", "source"), "npz"),
        (("model", "hidden"), [8, "x"]),
        (("evaluate",), 5),
    ],
    ids=lambda part: str(part),
)
def test_the_schema_refuses(whole: dict[str, Any], quickstart: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    node = quickstart
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    assert not accepts(whole, whole, quickstart)


def test_a_scenario_without_a_name_has_that_of_its_file(whole: dict[str, Any], quickstart: dict[str, Any], tmp_path: Path) -> None:
    del quickstart["name"]
    assert accepts(whole, whole, quickstart)
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(quickstart))
    assert load(tmp_path / "other.yaml")[0].name == "other"
