"""F5. A YAML file as plain values that remember their lines, so that every error can say where.

Nothing is constructed but maps, lists and scalars; size, depth and aliases are bounded, and a key may not appear twice. Scalars are read
by YAML 1.1 (`yes` and `on` are true, `1_000` is a number), except where that surprises: `1e-3` is a number, dates and times are text, and
so is `010`, which YAML 1.1 takes for 8.
"""

from __future__ import annotations

import json
import math
import re
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from fedsim.errors import FedsimError, ScenarioError

Path_ = tuple[str | int, ...]

LARGEST = 1 << 20  # bytes
MOST_NODES = 20_000  # after aliases are expanded
DEEPEST = 40
LONGEST = 60  # characters of a value that a message shows


class InvalidScenario(FedsimError):
    """Everything that is wrong with a scenario, one line each. Exit code 2."""


class _Unreadable(Exception):
    """What is the matter with a text, and in which line."""

    def __init__(self, why: str, line: int = 1):
        self.why = why
        self.line = line


_TAG = "tag:yaml.org,2002:"
_SCALARS = {  # which plain words are not text: a pattern, and the characters that it may begin with
    "null": (re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"^(yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$"), list("yYnNtTfFoO")),
    "int": (re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$"), list("-+0123456789")),
    "float": (
        re.compile(
            r"^([-+]?(([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(inf|Inf|INF))|\.(nan|NaN|NAN))$"
        ),
        list("-+0123456789."),
    ),
}


class _Loader(yaml.SafeLoader):
    """PyYAML's reader with our scalars, which gives up early on files that are too large or too deep."""

    nodes = depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.nodes += 1
        self.depth += 1
        line = self.peek_event().start_mark.line + 1
        if self.nodes > MOST_NODES:
            raise _Unreadable(f"more than {MOST_NODES} values", line)
        if self.depth > DEEPEST + 1:
            raise _Unreadable(f"nested more than {DEEPEST} levels deep", line)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader`, or any reader of YAML 1.1, would take for something else."""


_Dumper.add_implicit_resolver(_TAG + "float", *_SCALARS["float"])


def write(values: dict[str, Any]) -> str:
    """YAML that `parse` reads back to the same values, which hold no object twice."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def shown(value: Any) -> str:
    """A value as YAML would write it, on one line, cut where it is long."""
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{k}: {shown(v)}" for k, v in islice(value.items(), 8)) + ", ..." * (len(value) > 8) + "}"
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(shown(v) for v in islice(value, 8)) + ", ..." * (len(value) > 8) + "]"
    else:
        text = f"'{value}'" if isinstance(value, str) else json.dumps(value)
    return printable(text if len(text) <= LONGEST else f"{text[: LONGEST - 4]}...{text[-1]}")


def is_number(text: str) -> bool:
    """Whether a scenario would take this text for a number if it were not in quotes."""
    return any(_SCALARS[name][0].match(text) for name in ("int", "float"))


def printable(text: str) -> str:
    """Control characters escaped: a message is one line, and cannot move a terminal's cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass
class Document:
    """The values of a scenario file, the line of each, and what cannot be read."""

    path: str
    values: dict[str, Any]
    lines: dict[Path_, str] = field(default_factory=dict)
    problems: dict[Path_, str] = field(default_factory=dict)

    def where(self, path: Path_) -> str:
        """`file:line` of a value, or of the nearest enclosing one; or the option that set it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return self.path

    def line(self, path: Path_, message: str) -> str:
        """The line that tells of a problem: place, field, what is the matter."""
        dotted = ".".join(str(p) if len(str(p)) <= LONGEST else f"{str(p)[:LONGEST]}..." for p in path)
        return printable(f"{self.where(path)}: {dotted}: {message}" if dotted else f"{self.where(path)}: {message}")

    def explain(self, error: ScenarioError) -> str:
        """An error with the place it concerns."""
        return self.line(self.locate(error), error.message)

    def locate(self, error: ScenarioError) -> Path_:
        """The path of the field that an error names."""
        return tuple(int(part) if part.isdecimal() else part for part in error.field.split(".")) if error.field else ()

    def refuse(self, more: dict[Path_, str]) -> None:
        """Raise if there is any problem, here or in `more`, in the order of the file. What is below an unreadable value says nothing."""
        clear = {path: why for path, why in more.items() if not any(path[:end] in self.problems for end in range(len(path) + 1))}
        found = list((self.problems | clear).items())
        rank = {place: i for i, place in enumerate(dict.fromkeys(self.lines.values()))}
        found.sort(key=lambda problem: rank.get(self.where(problem[0]), 0))
        if found:
            raise InvalidScenario("\n".join(self.line(path, why) for path, why in found))

    def set(self, assignment: str, option: str = "") -> None:
        """Apply `a.b.c=value`, the value read as YAML. An absent section is made, a bare name gets fields; `a.0` is a list's first entry.

        Errors name the `option` that it came from.
        """
        option = option or f"--set {assignment}"
        dotted, separator, text = assignment.partition("=")
        path: Path_ = tuple(dotted.strip().split("."))
        try:
            if not (separator and all(path)):
                raise _Unreadable("write --set section.field=value")
            above, path = self._way_to(path)
            node = _compose(text)
        except _Unreadable as error:
            self.problems[path] = error.why
        else:
            known = self.lines, self.problems
            self.lines, self.problems = ({p: v for p, v in old.items() if p[: len(path)] != path} for old in known)
            above[path[-1]] = None if node is None else _Builder(self, option).build(node, path)
        for end in range(1, len(path)):
            self.lines.setdefault(path[:end], option)  # sections that the option made
        self.lines[path] = option

    def graft(self, path: Path_, other: Document, source: Path_) -> None:
        """Put what stands at `source` in another document at `path` here, with its lines. Sections on the way are made as by `set`."""
        value: Any = other.values
        for part in source:
            value = value[part]
        place = other.where(source)
        try:
            above, path = self._way_to(path)
        except _Unreadable as error:
            self.problems[path], self.lines[path] = error.why, place
            return
        above[path[-1]] = deepcopy(value)
        for known, theirs in ((self.lines, other.lines), (self.problems, other.problems)):
            for old in [p for p in known if p[: len(path)] == path]:
                del known[old]
            known.update({path + p[len(source) :]: told for p, told in theirs.items() if p[: len(source)] == source})
        for end in range(1, len(path) + 1):
            self.lines.setdefault(path[:end], place)

    def place(self, path: Path_, value: Any, told: str) -> None:
        """Put a plain value at `path`; errors say that it comes from `told`."""
        above, path = self._way_to(path)
        above[path[-1]] = value
        self.lines[path] = told

    def copy(self) -> Document:
        """Another document with the same values, to be changed by itself."""
        return Document(self.path, deepcopy(self.values), dict(self.lines), dict(self.problems))

    def _way_to(self, path: Path_) -> tuple[Any, Path_]:
        """The mapping or list that holds what stands at `path`, and the path with lists' entries by number."""
        if len(path) > DEEPEST:
            raise _Unreadable(f"nested more than {DEEPEST} levels deep")
        above: Any = self.values
        way: Path_ = ()
        for part in path[:-1]:
            key = _key(above, part, way)
            inner = None if isinstance(above, dict) and key not in above else above[key]
            if isinstance(inner, str):  # a bare name has no fields yet
                above[key] = {"name": inner}
            elif not isinstance(inner, (dict, list)):
                above[key] = {}
            above, way = above[key], (*way, key)
        return above, (*way, _key(above, path[-1], way))


def _key(above: dict[str | int, Any] | list[Any], part: str | int, way: Path_) -> str | int:
    """`part` as a key of the mapping or list `above`, which stands at `way`."""
    if isinstance(above, dict):
        return part
    if str(part).isdecimal() and int(part) < len(above):
        return int(part)
    name, last = ".".join(map(str, way)), len(above) - 1
    has = "no entries" if last < 0 else "one entry, 0" if last == 0 else f"entries 0 to {last}"
    raise _Unreadable(f"{name} is a list with {has}; it can also be set as a whole, e.g. --set {name}='[...]'")


def parse(path: Path) -> Document:
    """Read a scenario file. Raises `InvalidScenario` where it is no YAML mapping; smaller problems wait in the document."""
    try:
        with open(path, "rb") as file:
            raw = file.read(LARGEST + 1)
        if len(raw) > LARGEST:
            raise _Unreadable(f"more than {LARGEST} bytes are no scenario")
        node = _compose(raw.decode("utf-8"))
        if node is None:
            raise _Unreadable("the file is empty; a scenario has at least data, model, strategy and rounds")
        if not isinstance(node, yaml.MappingNode):
            raise _Unreadable("a scenario is a mapping of fields (name: ..., data: ..., model: ...)", node.start_mark.line + 1)
    except _Unreadable as error:
        raise InvalidScenario(printable(f"{path}:{error.line}: {error.why}")) from None
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InvalidScenario(printable(f"{path}:{line}: not a text file (byte {error.start} is not UTF-8)")) from None
    except (OSError, ValueError) as error:
        raise InvalidScenario(printable(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}")) from None
    document = Document(str(path), {})
    document.values = _Builder(document).build(node, ())
    return document


def _compose(text: str) -> yaml.Node | None:
    try:
        return _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _Unreadable(f"not valid YAML: {_syntax(error, text)}", mark.line + 1 if mark else 1) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _Unreadable(f"not a text file (it has the character {error.character:#x})", line) from None


def _syntax(error: yaml.MarkedYAMLError, text: str) -> str:
    """A syntax error in words."""
    mark, begin = error.problem_mark, error.context_mark
    rows = re.split(r"\r\n|[\r\n\x85\u2028\u2029]", text)  # as PyYAML counts
    if mark and "\t" in re.findall(r"^\s*", rows[mark.line])[0]:
        return "a tab in the indentation; use spaces"
    if error.context and error.context.startswith("expected"):
        return f"{error.context}, {error.problem}"
    since = f" ({error.context}, which begins in line {begin.line + 1})" if mark and begin and begin.line < mark.line else ""
    return f"{error.problem or error.context}{since}"


_PLAIN: dict[type[yaml.Node], set[str]] = {
    yaml.MappingNode: {_TAG + "map"},
    yaml.SequenceNode: {_TAG + "seq"},
    yaml.ScalarNode: {_TAG + name for name in ("str", *_SCALARS)},
}
_ODD = re.compile("[\0\ud800-\udfff]")


class _Builder:
    """Turns YAML nodes into values, noting lines and counting, so that a few aliases cannot become a billion values."""

    def __init__(self, document: Document, option: str = ""):
        self.document = document
        self.option = option
        self.count = 0
        self.scalars = _Loader("")
        self.open: list[yaml.Node] = []  # the mappings and lists that we are in

    def build(self, node: yaml.Node, path: Path_) -> Any:
        self.document.lines.setdefault(path, self._place(node))
        self.count += 1
        if self.count > MOST_NODES or len(path) > DEEPEST:
            raise InvalidScenario(self.document.line(path[:1], f"more than {MOST_NODES} values or {DEEPEST} levels, aliases expanded"))
        if node.tag not in _PLAIN[type(node)]:
            return self._problem(path, f"the tag {node.tag.replace(_TAG, '!!')} is not allowed here; a scenario has plain values only")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if any(node is outer for outer in self.open):
            return self._problem(path, "an alias (*) inside of what it stands for")
        self.open.append(node)
        if isinstance(node, yaml.MappingNode):
            value: Any = self._mapping(node, path)
        else:
            value = [self.build(child, (*path, i)) for i, child in enumerate(node.value)]
        self.open.pop()
        return value

    def _place(self, node: yaml.Node) -> str:
        return self.option or f"{self.document.path}:{node.start_mark.line + 1}"

    def _problem(self, path: Path_, why: str) -> None:
        self.document.problems.setdefault(path, why)

    def _scalar(self, node: yaml.ScalarNode, path: Path_) -> Any:
        try:
            value = self.scalars.construct_object(node)
        except (yaml.YAMLError, ValueError, KeyError, IndexError):
            return self._problem(path, f"{shown(node.value)} is not a value of type {node.tag.removeprefix(_TAG)}, or too long a number")
        if isinstance(value, float) and not math.isfinite(value):
            return self._problem(path, f"should be a finite number, not {node.value}")
        if isinstance(value, int) and abs(value) >= 2**63:
            return self._problem(path, f"should be a number of at most 18 digits, not {shown(value)}")
        if isinstance(value, str) and _ODD.search(value):
            return self._problem(path, f"{shown(value)} has characters that no text has (NUL, or half a surrogate pair)")
        return value

    def _mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, place = str(key_node.value), self._place(key_node)
            if not isinstance(key_node, yaml.ScalarNode) or _ODD.search(key):
                self.document.lines[(*path, "?")] = place
                self._problem((*path, "?"), "the name of a field must be a plain word")
            elif key in out:
                self._problem((*path, key), f"given twice, first at {self.document.lines.pop((*path, key))}")
                self.document.lines[(*path, key)] = place
            else:
                self.document.lines[(*path, key)] = place
                out[key] = self.build(value_node, (*path, key))
        return out
