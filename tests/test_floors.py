"""The import rule: imports go downwards only, and rooms of one floor do not see each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Rooms by floor. Files of floor 0, 1, 2 and 5 are one room each floor: they may use each other.
FLOORS = [
    {"entropy", "errors", "params", "registry", "rng", "steps", "table", "tree", "types"},
    {
        "problem",
        "staleness",
        "strategy",
        "local",
        "intervals",
        "proxy",
        "privacy",
        "wrapper",
        "inversion",
        "conformal",
        "lowrank",
        "private",
        "records",
        "split",
    },
    {"engine", "pace"},
    {"data", "models", "fleet", "metrics", "statistics"},
    {"sim", "audit"},
    {"document", "scenario", "world", "manifest", "experiment", "folder", "console", "overview"}
    | {
        "wording",
        "bundle",
        "session",
        "study",
        "grid",
        "compare",
        "results",
        "report",
        "watch",
        "trackers",
        "ledger",
        "replay",
        "inspection",
        "flower",
        "runtime",
    },
    {"cli"},
]
ONE_ROOM = {0, 1, 2, 5}
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# A name for annotations only, which no import at run time needs.
FILES = sorted([*(ROOT / "fedsim").rglob("*.py"), *(ROOT / "strategies").rglob("*.py")])


def room_of(file: Path) -> str:
    return file.relative_to(ROOT / "fedsim").parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    """Modules that a file imports when it runs: whole dotted names; `if TYPE_CHECKING` blocks left out."""
    tree = ast.parse(file.read_text())
    unused = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in unused:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_used(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(file) if name.startswith("fedsim.")} - {"__version__"}


@pytest.mark.parametrize("file", [f for f in FILES if "strategies" not in f.parts], ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_down(file):
    assert not any(name.split(".")[0] == "strategies" for name in imports(file)), "fedsim never names a strategy package"
    room = room_of(file)
    if room == "__init__":
        assert not rooms_used(file)
        return
    floor = FLOOR[room]
    for used in rooms_used(file):
        below = FLOOR[used] < floor
        inside = used == room or (FLOOR[used] == floor and floor in ONE_ROOM)
        assert below or inside, f"{room} (floor {floor}) imports {used} (floor {FLOOR[used]})"


@pytest.mark.parametrize("file", [f for f in FILES if "strategies" in f.parts], ids=lambda f: str(f.relative_to(ROOT)))
def test_a_strategy_imports_floors_0_and_1_only(file):
    assert all(FLOOR[room] <= 1 for room in rooms_used(file))
    assert not any(name.split(".")[0] == "strategies" for name in imports(file)), "a paper is one file"


def test_every_room_has_a_floor_and_nothing_is_forgotten():
    assert {room_of(f) for f in FILES if "strategies" not in f.parts} - {"__init__"} <= set(FLOOR)
    assert len(FILES) > 40


def test_nothing_is_unpickled():
    for file in FILES:
        used = {name.split(".")[0] for name in imports(file)}
        assert not used & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, file
        assert "torch.load(" not in file.read_text(), file
        assert "allow_pickle=True" not in file.read_text(), file


def test_every_package_says_why_it_is_there():
    for folder in (ROOT / "fedsim").iterdir():
        if (folder / "__init__.py").exists():
            assert (folder / "README.md").exists(), folder
