"""YAML as values that remember their lines, and `--set`."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsim.document import DEEPEST, LARGEST, LONGEST, MOST_NODES, Document, InvalidScenario, is_number, parse, printable, shown, write
from fedsim.errors import DataError, ScenarioError


def read(tmp_path: Path, text: str | bytes) -> Document:
    """The document of a file `s.yaml`, whose lines begin with its name alone."""
    file = tmp_path / "s.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    document = parse(file)
    document.lines = {path: place.removeprefix(f"{tmp_path}/") for path, place in document.lines.items()}
    document.path = "s.yaml"
    return document


def values(tmp_path: Path, text: str | bytes) -> dict[str, Any]:
    document = read(tmp_path, text)
    assert document.problems == {}
    return document.values


def value_of(tmp_path: Path, scalar: str) -> Any:
    return values(tmp_path, f"a: {scalar}\n")["a"]


TEXT = """\
# one
a: 1
b:
  c: {d: 2,
      e: [3,
          4]}

f: &f
- g: 5
h: *f
"""


def test_every_value_knows_its_line(tmp_path: Path) -> None:
    document = read(tmp_path, TEXT)
    assert document.values == {"a": 1, "b": {"c": {"d": 2, "e": [3, 4]}}, "f": [{"g": 5}], "h": [{"g": 5}]}
    expected = {
        (): 2,
        ("a",): 2,
        ("b",): 3,
        ("b", "c"): 4,
        ("b", "c", "d"): 4,
        ("b", "c", "e"): 5,
        ("b", "c", "e", 0): 5,
        ("b", "c", "e", 1): 6,
    }
    expected |= {("f",): 8, ("f", 0): 9, ("f", 0, "g"): 9, ("h",): 10, ("h", 0): 9, ("h", 0, "g"): 9}
    assert document.lines == {path: f"s.yaml:{line}" for path, line in expected.items()}


@pytest.mark.parametrize("ends", ["\r\n", "\r"])
def test_lines_are_counted_however_they_end(tmp_path: Path, ends: str) -> None:
    assert read(tmp_path, TEXT.replace("\n", ends)).lines == read(tmp_path, TEXT).lines


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    assert values(tmp_path, b"\xef\xbb\xbfa: 1\n") == {"a": 1}


def test_what_is_not_there_is_where_its_section_is(tmp_path: Path) -> None:
    document = read(tmp_path, TEXT)
    assert document.where(("b", "c", "missing")) == "s.yaml:4"
    assert document.where(("b", "missing", "deeper")) == "s.yaml:3"
    assert document.where(("missing",)) == "s.yaml:2"
    assert Document("s.yaml", {}).where(("missing",)) == "s.yaml"


def test_an_error_of_the_scenario_is_explained_with_its_place(tmp_path: Path) -> None:
    document = read(tmp_path, TEXT)
    assert document.explain(ScenarioError("b.c.e.1", "is wrong")) == "s.yaml:6: b.c.e.1: is wrong"
    assert document.explain(DataError("h.0.k", "two\nlines")) == r"s.yaml:9: h.0.k: two\nlines"
    assert document.explain(ScenarioError("", "is wrong")) == "s.yaml:2: is wrong"


SCALARS = [
    ("1e-3", 1e-3),
    ("1E5", 1e5),
    ("-1.5e+3", -1500.0),
    (".5", 0.5),
    ("1.", 1.0),
    ("10.0", 10.0),
    ("10", 10),
    ("-7", -7),
    ("1_000", 1000),
    ("0x1F", 31),
    ("0b101", 5),
    ("010", "010"),
    ("1:30", "1:30"),
    ("1.2.3", "1.2.3"),
    ("2024-01-01", "2024-01-01"),
    ("2024-01-01 10:00:00", "2024-01-01 10:00:00"),
    ("yes", True),
    ("no", False),
    ("on", True),
    ("Off", False),
    ("true", True),
    ("FALSE", False),
    ("y", "y"),
    ("null", None),
    ("~", None),
    ("", None),
    ("=", "="),
    ("<<", "<<"),
    ("'1'", "1"),
    ('"yes"', "yes"),
    ("!!str 1", "1"),
    ("!!float 1", 1.0),
    ("inf", "inf"),
    ("nan", "nan"),
    ("e3", "e3"),
]


@pytest.mark.parametrize(("scalar", "expected"), SCALARS, ids=[scalar or "nothing" for scalar, _ in SCALARS])
def test_scalars(tmp_path: Path, scalar: str, expected: Any) -> None:
    value = value_of(tmp_path, scalar)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(("scalar", "expected"), SCALARS, ids=[scalar or "nothing" for scalar, _ in SCALARS])
def test_what_is_written_reads_back(tmp_path: Path, scalar: str, expected: Any) -> None:
    for value in (expected, scalar):  # the value, and the text that looks like it
        written = write({"a": value, "b": [value]})
        again = values(tmp_path, written)
        assert again == {"a": value, "b": [value]}
        assert type(again["a"]) is type(value)
        if isinstance(value, str):  # other readers of YAML 1.1 agree on what is text
            assert yaml.safe_load(written)["a"] == value


def test_keys_are_text(tmp_path: Path) -> None:
    assert values(tmp_path, "1: a\nyes: b\nnull: c\n2024-01-01: d\n") == {"1": "a", "yes": "b", "null": "c", "2024-01-01": "d"}


def test_values_of_an_alias_are_separate(tmp_path: Path) -> None:
    document = read(tmp_path, "a: &a {x: 1}\nb: *a\n")
    document.set("b.x=2")
    assert document.values == {"a": {"x": 1}, "b": {"x": 2}}
    assert document.where(("a", "x")) == "s.yaml:1"
    assert document.where(("b", "x")) == "--set b.x=2"


def test_limits_are_limits(tmp_path: Path) -> None:
    count = MOST_NODES - 4  # besides: the mapping, its key, the list, and that one mapping more
    assert len(values(tmp_path, "a: [" + ", ".join(["1"] * count) + "]")["a"]) == count
    with pytest.raises(InvalidScenario, match="more than 20000 values"):
        read(tmp_path, "a: [" + ", ".join(["1"] * MOST_NODES) + "]")
    deep = DEEPEST - 1
    assert values(tmp_path, "a: " + "[" * deep + "]" * deep)
    with pytest.raises(InvalidScenario, match="nested more than 40 levels"):
        read(tmp_path, "a: " + "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1))
    assert values(tmp_path, b"a: 1\n#" + b"x" * (LARGEST - 6)) == {"a": 1}
    with pytest.raises(InvalidScenario, match=rf"s.yaml:1: more than {LARGEST} bytes"):
        read(tmp_path, b"a: 1\n#" + b"x" * LARGEST)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file or directory"), (Path("a\0b"), "null")):
        with pytest.raises(InvalidScenario, match=f"cannot be read: .*{why}"):
            parse(path)


def test_problems_wait_until_all_are_found(tmp_path: Path) -> None:
    document = read(tmp_path, "a: !mine 1\nb: {c: .inf}\nb: 2\n")
    assert document.values == {"a": None, "b": {"c": None}}
    with pytest.raises(InvalidScenario) as refusal:
        document.refuse({("a", "x"): "below what cannot be read", ("d",): "is required", ("b", "c"): "again"})
    assert str(refusal.value).splitlines() == [
        "s.yaml:1: a: the tag !mine is not allowed here; a scenario has plain values only",
        "s.yaml:1: d: is required",
        "s.yaml:2: b.c: should be a finite number, not .inf",
        f"s.yaml:3: b: given twice, first at {tmp_path}/s.yaml:2",
    ]


# --set


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("a=2", {"a": 2, "b": {"c": "name"}, "d": [1]}),
        ("a=", {"a": None, "b": {"c": "name"}, "d": [1]}),
        ("a=x=y", {"a": "x=y", "b": {"c": "name"}, "d": [1]}),
        ("a=1e-3", {"a": 1e-3, "b": {"c": "name"}, "d": [1]}),
        ("a=2024-01-01", {"a": "2024-01-01", "b": {"c": "name"}, "d": [1]}),
        ("a.x=2", {"a": {"x": 2}, "b": {"c": "name"}, "d": [1]}),
        ("b.c.lr=2", {"a": 1, "b": {"c": {"name": "name", "lr": 2}}, "d": [1]}),
        ("b.e.f.g=2", {"a": 1, "b": {"c": "name", "e": {"f": {"g": 2}}}, "d": [1]}),
        ("b={x: [1, {y: no}]}", {"a": 1, "b": {"x": [1, {"y": False}]}, "d": [1]}),
        ("d=[]", {"a": 1, "b": {"c": "name"}, "d": []}),
        (" e =3", {"a": 1, "b": {"c": "name"}, "d": [1], "e": 3}),
    ],
)
def test_set(tmp_path: Path, assignment: str, expected: dict[str, Any]) -> None:
    document = read(tmp_path, "a: 1\nb: {c: name}\nd: [1]\n")
    document.set(assignment)
    assert document.values == expected
    assert document.problems == {}
    path = tuple(assignment.split("=")[0].strip().split("."))
    assert document.where(path) == f"--set {assignment}"


def test_set_reaches_into_lists(tmp_path: Path) -> None:
    document = read(tmp_path, "d:\n- {a: 1}\n- name\n- [1,\n   2]\ne: []\n")
    for assignment in ("d.0.a=3", "d.1.lr=2", "d.2.1=[4]", "d.2.1.0=5"):
        document.set(assignment)
    document.refuse({})
    assert document.values == {"d": [{"a": 3}, {"name": "name", "lr": 2}, [1, [5]]], "e": []}
    places = {("d", 0, "a"): "--set d.0.a=3", ("d", 2, 0): "s.yaml:4", ("d", 2, 1): "--set d.2.1=[4]", ("d", 2, 1, 0): "--set d.2.1.0=5"}
    assert {path: document.where(path) for path in places} == places
    for assignment, why in (("e.0=1", "e is a list with no entries;"), ("d.3=1", "d is a list with entries 0 to 2;")):
        document.set(assignment)
        assert document.problems.pop(tuple(assignment[:3].split("."))).startswith(why)


def test_the_last_set_wins_and_lines_below_it_are_forgotten(tmp_path: Path) -> None:
    document = read(tmp_path, "b: {c: 1}\n")
    document.set("b.c=2")
    document.set("b={c: 3, d: {e: 4}}")
    document.set("b.d.e=5")
    assert document.values == {"b": {"c": 3, "d": {"e": 5}}}
    assert document.where(("b", "c")) == document.where(("b", "d")) == "--set b={c: 3, d: {e: 4}}"
    assert document.where(("b", "d", "e")) == "--set b.d.e=5"


def test_set_mends_what_could_not_be_read(tmp_path: Path) -> None:
    document = read(tmp_path, "a: !mine 1\nb: .nan\n")
    document.set("a=1")
    assert list(document.problems) == [("b",)]
    document.set("b=2")
    document.refuse({})
    assert document.values == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("assignment", "why"),
    [
        ("a", "a: write --set section.field=value"),
        ("", "write --set section.field=value"),
        ("a..b=1", "a..b: write --set section.field=value"),
        (".=1", ".: write --set section.field=value"),
        ("d.2=1", "d.2: d is a list with one entry, 0; it can also be set as a whole, e.g. --set d='[...]'"),
        ("d.x.y=1", "d.x.y: d is a list with one entry, 0; it can also be set as a whole"),
        ("d.-1=1", "d.-1: d is a list with one entry, 0"),
        ("a={", "a: not valid YAML: "),
        ("a=\x07", "a: not a text file (it has the character 0x7)"),
        ("a=!mine 1", "a: the tag !mine is not allowed here"),
        ("a=.nan", "a: should be a finite number, not .nan"),
        ("a={b: 1, b: 2}", "a.b: given twice"),
        ("a=[&a [*a]]", "a.0.0: an alias (*) inside of what it stands for"),
        (".".join("a" * 60) + "=1", ".".join("a" * 60) + ": nested more than 40 levels deep"),
    ],
)
def test_a_set_that_is_refused_changes_nothing_else(tmp_path: Path, assignment: str, why: str) -> None:
    document = read(tmp_path, "a: 1\nb: {c: name}\nd: [1]\n")
    document.set(assignment)
    with pytest.raises(InvalidScenario) as refusal:
        document.refuse({})
    assert str(refusal.value).startswith(f"--set {printable(assignment)}: {why}")
    assert "\n" not in str(refusal.value)
    assert document.values["b"] == {"c": "name"}
    assert document.values["d"] == [1]


def test_how_values_are_shown() -> None:
    values = [None, True, 1, 0.1, "a b", [1, "a", {"b": None}], list(range(9))]
    texts = ["null", "true", "1", "0.1", "'a b'", "[1, 'a', {b: null}]", "[0, 1, 2, 3, 4, 5, 6, 7, ...]"]
    assert [shown(value) for value in values] == texts
    assert shown("a\n\x1b[2J\u200b") == r"'a\n\x1b[2J\u200b'"
    for long in ("x" * 1000, ["x" * 10] * 1000, {str(i) * 5: i for i in range(1000)}):
        assert len(shown(long)) == LONGEST
        assert shown(long)[-4:-1] == "..."


def test_which_texts_look_like_numbers() -> None:
    assert all(map(is_number, ["1", "0.1", "1e-3", "-5", ".5", "0x1f"]))
    assert not any(map(is_number, ["", "one", "010", "1:30", "2024-01-01", "1,5", "v1"]))
