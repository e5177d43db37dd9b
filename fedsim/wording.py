"""F5. What is wrong with a value, in words: pydantic's errors as fields, what should be there, and what was probably meant."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from fedsim.document import Path_, is_number, shown
from fedsim.errors import did_you_mean
from fedsim.registry import declared, fields_of, is_kind, place, value_at

_WORDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "string_too_short": "text of at least {min_length} character(s)",
    "too_short": "a list of at least {min_length} item(s)",
    "too_long": "a list of at most {max_length} item(s)",
}
"""What a value should be, by pydantic's types of error."""


def explain(root: type, values: Any, error: ValidationError) -> dict[Path_, str]:
    """What is the matter with each field that is wrong, and what is allowed there; `root` is the dataclass that was asked for."""
    found: dict[Path_, list[Any]] = {}
    for e in error.errors(include_url=False):
        path = place(values, e["loc"], absent=e["type"].startswith("missing"), name=e["type"] == "union_tag_invalid")
        found.setdefault(path, []).append(e)
    # Of a union's alternatives, the one that got furthest is the one that was meant.
    near = {p: es for p, es in found.items() if not any(q != p and q[: len(p)] == p and es[0]["type"].endswith("_type") for q in found)}
    return {path: _message(root, values, path, es) for path, es in near.items()}


def _message(root: type, values: Any, path: Path_, errors: list[Any]) -> str:
    kind, given = errors[0]["type"], value_at(values, path)
    if kind in {"unexpected_keyword_argument", "extra_forbidden"}:
        fields = fields_of(declared(root, values, path[:-1]))
        return f"unknown field{did_you_mean(str(path[-1]), fields)}; fields: {', '.join(fields) or '(none)'}"
    if kind.startswith("missing"):
        return f"is required{_choices(declared(root, values, path))}"
    if kind == "union_tag_invalid":
        tags = errors[0]["ctx"]["expected_tags"].replace("'", "")
        if not isinstance(given, str):
            return f"should be a name, not {shown(given)}; there are: {tags}"
        return f"there is no {shown(given)}{did_you_mean(given, tags.split(', '))}; there are: {tags}"
    if kind in {"union_tag_not_found", "model_attributes_type", "dataclass_type"}:
        return _shape(declared(root, values, path), given)
    if kind in {"value_error", "assertion_error"}:
        return str(errors[0]["msg"]).split(", ", 1)[-1]
    wanted = dict.fromkeys(_wanted(e) for e in errors)
    return f"should be {' or '.join(wanted)}, not {shown(given)}{_advice(errors, given)}"


def _wanted(e: Any) -> str:
    bounds = {k: f"{v:g}" if isinstance(v, float) else v for k, v in e.get("ctx", {}).items()}
    return _WORDS[e["type"]].format(**bounds) if e["type"] in _WORDS else str(e["msg"]).removeprefix("Input should be ")


def _shape(type_: Any, given: Any) -> str:
    if not is_kind(type_):
        return f"should be a mapping, not {shown(given)}; fields: {', '.join(fields_of(type_))}"
    wrong = "needs a `name`" if isinstance(given, dict) else f"should be a name, or {{name: ..., field: value}}, not {shown(given)}"
    return f"{wrong}{_choices(type_)}"


def _choices(type_: Any) -> str:
    return f"; there are: {', '.join(sorted(type_.choices))}" if is_kind(type_) else ""


def _advice(errors: list[Any], given: Any) -> str:
    """How to write what was probably meant."""
    kinds = {e["type"] for e in errors}
    if isinstance(given, str) and kinds & {"int_type", "float_type"} and is_number(given):
        return "; leave out the quotes"
    if "string_type" in kinds and isinstance(given, (bool, int, float)):
        return "; put it in quotes"
    allowed = [w for e in errors if e["type"] == "literal_error" for w in e["ctx"]["expected"].split("'")[1::2]]
    return did_you_mean(given, allowed) if isinstance(given, str) else ""
