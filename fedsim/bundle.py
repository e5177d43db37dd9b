"""F5. The scenarios and studies that come with fedsim: inside the installed package, or beside it in a checkout."""

from __future__ import annotations

import re
from pathlib import Path

from fedsim.document import InvalidScenario
from fedsim.errors import did_you_mean

_STUDY = re.compile(r"^study\s*:", re.MULTILINE)


def is_study(path: Path) -> bool:
    """Whether a YAML file has the field `study` at its top, which no scenario has."""
    try:
        return _STUDY.search(path.read_text(encoding="utf-8")) is not None
    except (OSError, ValueError):
        return False  # whoever reads it next says what is the matter


def bundled() -> dict[str, Path]:
    """The scenarios that come with fedsim, by name."""
    return {name: path for name, path in _files().items() if not is_study(path)}


def bundled_studies() -> dict[str, Path]:
    """The studies that come with fedsim, by name."""
    return {name: path for name, path in _files().items() if is_study(path)}


def find(name: str) -> Path:
    """The file of a scenario or a study: a path, or the name of one that comes with fedsim (`quickstart`, `studies/quick`)."""
    path = Path(name)
    if path.exists() and not path.is_dir():
        return path
    files = _files()
    if name in files:
        return files[name]
    what = "a folder, not a scenario file" if path.is_dir() else "no such file"
    raise InvalidScenario(f"{name}: {what}{did_you_mean(name, files)}; scenarios that come with fedsim: {', '.join(files)}")


def find_scenario(name: str) -> Path:
    """`find`, of a scenario that runs by itself."""
    path = find(name)
    if is_study(path):
        raise InvalidScenario(f"{path}: a study, not a scenario; run it with: fedsim compare {name}")
    return path


def _files() -> dict[str, Path]:
    here = Path(__file__).parent
    root = here / "scenarios" if (here / "scenarios").is_dir() else here.parent / "scenarios"
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}
