"""F5. Reports: one self-contained page and tables, from run folders and study folders only."""

from __future__ import annotations

from pathlib import Path

from fedsim.errors import FedsimError
from fedsim.folder import write_file
from fedsim.results import is_run, is_study_folder, read_run, read_study


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the page (default `report.html`) and the tables of a folder. Returns the page's path. Raises `FedsimError` for others."""
    page = output or folder / "report.html"
    html, tables = render(folder)
    try:
        for name, text in tables.items():
            write_file(folder / name, text.encode())
        write_file(page, html.encode())
    except OSError as error:
        raise FedsimError(f"{error.filename or page}: cannot be written: {error.strerror}") from None
    return page


def render(folder: Path) -> tuple[str, dict[str, str]]:
    """The page of a folder, and its tables by file name."""
    from fedsim.report import run_page, study_page, tables

    if is_study_folder(folder):
        results = read_study(folder)
        return study_page.render(results), tables.of_study(results)
    if is_run(folder):
        run = read_run(folder)
        return run_page.render(run), tables.of_run(run)
    raise FedsimError(f"{folder}: neither a run folder (scenario.yaml) nor a study folder (study.yaml, manifest.json)")
