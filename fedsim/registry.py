"""F0. The things a scenario may name, and how a name finds its class.

A *kind* is an abstract class that lists `Kind` among its bases (`class Partition(Kind, ABC)`); a *choice* is a frozen dataclass of that
kind under a name: `@register("dirichlet")`. In YAML, `{name: dirichlet, alpha: 0.3}` is `Dirichlet(alpha=0.3)`, and a bare
`dirichlet` is `{name: dirichlet}`. Validation and JSON Schema are pydantic's, generated from the dataclasses themselves.
"""

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from fedsim.errors import FedsimError, did_you_mean

T = TypeVar("T", bound="type[Kind]")
S = TypeVar("S", bound=type)


_BUILDING: set[str] = set()
"""Kinds whose schema is being made."""


class Kind:
    """Base of the abstract class of each kind of choice. Gives it `choices` and a place in pydantic schemas."""

    choices: ClassVar[dict[str, type]]
    registered_name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if Kind in cls.__bases__:
            cls.choices = {}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        if "registered_name" in cls.__dict__:
            return _named(cls.registered_name, handler.resolve_ref_schema(handler(source)))  # type: ignore[attr-defined]
        ref = f"{cls.__module__}.{cls.__qualname__}:choices"  # one definition, however many fields are of this kind
        if ref in _BUILDING:  # a choice that holds another of its kind
            return core_schema.definition_reference_schema(ref)
        _BUILDING.add(ref)
        try:
            tags = {name: handler.generate_schema(choice) for name, choice in sorted(cls.choices.items())}  # type: ignore[attr-defined]
        finally:
            _BUILDING.remove(ref)
        if not tags:
            return core_schema.is_instance_schema(cls)
        union = core_schema.tagged_union_schema(tags, discriminator="name")
        return core_schema.no_info_before_validator_function(
            lambda value: {"name": value} if isinstance(value, str) else value,
            union,
            ref=ref,
            metadata={"pydantic_js_functions": [lambda core, handler: _choices_json_schema(cls, handler(core), handler)]},
        )


def _named(name: str, schema: Any) -> Any:
    """A choice's own schema, for a mapping that also carries its `name`."""
    from pydantic_core import core_schema

    def fields(value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        if not isinstance(value, dict):
            return value
        if value.get("name", name) != name:  # where a field is of this very class, not of its kind
            raise ValueError(f"only '{name}' fits here, not '{value['name']}'")
        # Fields of frozen dataclasses are tuples, YAML has lists; strict validation tells the two apart.
        return {k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if (k, v) != ("name", name)}

    return core_schema.no_info_before_validator_function(
        fields,
        {k: v for k, v in schema.items() if k != "ref"},
        ref=schema["ref"],  # pydantic reuses what it knows under a ref: that must be the whole of it
        metadata={"pydantic_js_functions": [lambda core, handler: _named_json_schema(name, handler(core), handler)]},
    )


def _named_json_schema(name: str, schema: dict[str, Any], handler: Any) -> dict[str, Any]:
    schema = dict(handler.resolve_ref_schema(schema))
    schema["properties"] = {"name": {"const": name}, **schema.get("properties", {})}
    schema["required"] = ["name", *schema.get("required", [])]
    return schema


def _choices_json_schema(kind: type[Kind], schema: dict[str, Any], handler: Any) -> dict[str, Any]:
    """A mapping for one of the choices; of those that need no field, also the bare name."""
    schema = dict(handler.resolve_ref_schema(schema))
    bare = [name for name, choice in sorted(kind.choices.items()) if not _required(choice)]
    return {"anyOf": [{"enum": bare, "type": "string"}, schema]} if bare else schema


def _required(choice: type) -> list[str]:
    """The fields that have no default."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(choice) if f.init and f.default is missing and f.default_factory is missing]


def section(cls: S) -> S:
    """Class decorator for a dataclass that YAML fills in: unknown keys are errors, and so are NaN and infinity."""
    cls.__pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # type: ignore[attr-defined]
    return cls


def register(name: str) -> Callable[[T], T]:
    """Class decorator: enter a frozen dataclass under `name` in the choices of its kind. A second class under one name is an error."""

    def enter(cls: T) -> T:
        kind: type[Kind] = next(c for c in cls.__mro__ if Kind in c.__bases__)
        if name in kind.choices and kind.choices[name].__qualname__ != cls.__qualname__:
            raise FedsimError(f"two choices of {kind.__name__} are called '{name}': {kind.choices[name]} and {cls}")
        if not cls.__doc__ or cls.__doc__.startswith(f"{cls.__name__}("):
            raise FedsimError(f"{cls.__name__} has no docstring; its first line is what `fedsim list` prints")
        cls.registered_name = name
        kind.choices[name] = section(cls)
        return cls

    return enter


def lookup(kind: type[Kind], name: str) -> type:
    """The class registered under `name`, or an error that lists what there is."""
    if name not in kind.choices:
        known = ", ".join(sorted(kind.choices))
        raise FedsimError(f"no {kind.__name__} is called '{name}'{did_you_mean(name, kind.choices)}; there are: {known}")
    return kind.choices[name]


def first_line(cls: type) -> str:
    """The first line of a class's docstring: what the catalogue prints."""
    return (cls.__doc__ or "").strip().splitlines()[0]


def dump(value: Any) -> Any:
    """A choice, or anything made of them, as plain values: what YAML would say to get it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {"name": value.registered_name} if isinstance(value, Kind) else {}
        return named | {f.name: dump(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [dump(v) for v in value]
    if isinstance(value, dict):
        return {k: dump(v) for k, v in value.items()}
    return value


def place(values: Any, loc: tuple[str | int, ...], absent: bool, name: bool) -> tuple[str | int, ...]:
    """Where in `values` pydantic's location points: tags of unions are not in there.

    The last part is a field that is `absent`, or a choice whose `name` is meant.
    """
    path: list[str | int] = []
    for i, part in enumerate(loc):
        if _holds(values, part):
            path.append(part)
            values = values[part]
        elif absent and i == len(loc) - 1:
            path.append(part)
    return (*path, "name") if name and isinstance(values, dict) else tuple(path)


def value_at(values: Any, path: tuple[str | int, ...]) -> Any:
    """The value there, or None."""
    for part in path:
        values = values[part] if _holds(values, part) else None
    return values


def declared(root: type, values: Any, path: tuple[str | int, ...]) -> Any:
    """What the value at `path` below `root` is declared to be: a dataclass, a kind whose choice is not known, another type, or None."""
    hint: Any = root
    for part in path:
        if typing.get_origin(hint) is tuple and isinstance(part, int):
            hint = typing.get_args(hint)[0]
        elif typing.get_origin(hint) is dict:
            hint = typing.get_args(hint)[1]
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            hint = typing.get_type_hints(hint).get(str(part))
        else:
            return None
        values = value_at(values, (part,))
        hint = _resolve(hint, values)
    return hint


def _holds(values: Any, part: str | int) -> bool:
    return part in values if isinstance(values, dict) else isinstance(values, list) and isinstance(part, int) and part < len(values)


def _resolve(hint: Any, value: Any) -> Any:
    """The type that an annotation means for this value: unions opened, kinds resolved by name."""
    if typing.get_origin(hint) in {typing.Union, types.UnionType}:
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        known = [o for o in options if typing.get_origin(o) is tuple or dataclasses.is_dataclass(o) or is_kind(o)]
        return _resolve((known or options)[0], value)
    if is_kind(hint):
        name = value.get("name") if isinstance(value, dict) else value
        return hint.choices.get(name, hint) if isinstance(name, str) else hint
    return hint


def is_kind(hint: Any) -> bool:
    """Whether this is an abstract class that choices belong to."""
    return isinstance(hint, type) and issubclass(hint, Kind) and Kind in hint.__bases__


def fields_of(type_: Any) -> list[str]:
    """What a scenario may set of it."""
    return [f.name for f in dataclasses.fields(type_) if f.init] if dataclasses.is_dataclass(type_) else []
