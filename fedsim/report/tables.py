"""F5. The comparison as CSV (full precision), Markdown and LaTeX (rounded). A value is bold only where the corrected test says so."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from typing import Any

from fedsim.report import coverage
from fedsim.report.comparison import Comparison, Line
from fedsim.report.formats import interval, name_of, number, p_value, seconds, signed, traffic
from fedsim.results import Run, StudyResults

Column = tuple[str, Callable[[Line], str]]

NOTE = (
    "Bold: better than {base} beyond the noise (paired t-test, Holm-corrected p < 0.05). Marked (worse): worse, likewise. "
    "± is the standard deviation over seeds."
)


def columns(comparison: Comparison) -> list[Column]:
    """All columns that have something in them: heading, and the text of a line."""
    return [*outcome(comparison), *cost(comparison)]


def outcome(comparison: Comparison) -> list[Column]:
    """What came out, and whether it is more than noise."""
    base, target = comparison.results.baseline, comparison.results.study.get("target")
    out: list[Column] = [
        ("strategy", lambda line: line.label),
        ("seeds", lambda line: str(len(line.seeds))),
        (name_of(comparison.results.metric), _score),
    ]
    if comparison.has("versus"):
        out += [
            (f"difference to {base}", lambda line: signed(line.versus.difference) if line.versus else "-"),
            ("95 % interval", lambda line: interval(line.versus.interval) if line.versus else "-"),
            ("p", lambda line: p_value(line.p)),
        ]
    if target is not None:
        out.append((f"rounds to {target:g}", _rounds))
    return out


def cost(comparison: Comparison) -> list[Column]:
    """How fast it came, what it cost, and whom it served worst; means over seeds."""
    target = comparison.results.study.get("target")
    out: list[Column] = [("area under curve", lambda line: number(line.area.mean if line.area else None))]
    if target is not None:
        out.append((f"bytes to {target:g}", lambda line: traffic(line.target.bytes if line.target else None)))
        if any(line.target and line.target.time is not None for line in comparison.lines):
            out.append((f"time to {target:g}", lambda line: seconds(line.target.time if line.target else None)))
    out.append(("bytes in all", lambda line: traffic(line.bytes.mean if line.bytes else None)))
    if comparison.has("time"):
        out.append(("virtual time in all", lambda line: seconds(line.time.mean if line.time else None)))
    if comparison.has("worst"):
        out.append(("worst 10 % of clients", lambda line: number(line.worst.mean if line.worst else None)))
    if comparison.has("epsilon"):
        out.append(("epsilon", lambda line: number(line.epsilon.mean if line.epsilon else None, 2)))
    return out


def _score(line: Line) -> str:
    if line.score is None:
        return "-"
    return number(line.score.mean) + (f" ± {number(line.score.std)}" if line.score.std is not None else "")


def _rounds(line: Line) -> str:
    if line.target is None:
        return "-"
    if line.target.hits == 0:
        return "never"
    reached = "" if line.target.hits == line.target.n else f" ({line.target.hits} of {line.target.n})"
    return f"{line.target.rounds:.0f}{reached}"


def marked(heading: str, text: str, line: Line, comparison: Comparison, bold: Callable[[str], str]) -> str:
    """A cell of a table: the score is bold, or marked, where the test says so."""
    if heading != name_of(comparison.results.metric):
        return text
    return bold(text) if line.verdict == "better" else f"{text} (worse)" if line.verdict == "worse" else text


def of_study(results: StudyResults) -> dict[str, str]:
    """The files of a study's tables."""
    comparison = Comparison(results)
    return {
        "table.csv": _csv(_long(comparison)),
        "cells.csv": _csv(_cells(results)),
        "table.md": _markdown(comparison),
        "table.tex": _latex(comparison),
    }


def of_run(run: Run) -> dict[str, str]:
    """A run's metrics as CSV, a row a round; and what its prediction sets are worth as Markdown, where it has any."""
    names = list(dict.fromkeys(k for row in run.rows for k, v in row.items() if isinstance(v, (int, float))))
    phases = coverage.calibrated(run)
    found = {"coverage.md": coverage.markdown(phases)} if phases else {}
    return {"metrics.csv": _csv([{name: row.get(name) for name in names} for row in run.rows])} | found


def _long(comparison: Comparison) -> list[dict[str, Any]]:
    rows = []
    for line in comparison.lines:
        row: dict[str, Any] = {"setting": line.setting, "strategy": line.label, "n": len(line.seeds)}
        for name in ("score", "area", "bytes", "time", "worst", "epsilon"):
            if comparison.has(name):
                value = getattr(line, name)
                row |= {f"{name}_mean": value.mean if value else None, f"{name}_std": value.std if value else None}
        low, high = (line.score.interval if line.score else None) or (None, None)
        row |= {"score_low": low, "score_high": high}
        versus = line.versus
        row["difference"] = versus.difference if versus else None
        for name in ("interval", "bootstrap"):
            low, high = (getattr(versus, name) if versus else None) or (None, None)
            row |= {f"difference_{name}_low": low, f"difference_{name}_high": high}
        row |= {"p": versus.p if versus else None, "p_holm": line.p, "verdict": line.verdict}
        if comparison.has("target"):
            reached = line.target
            row |= {f"target_{k}": getattr(reached, k) if reached else None for k in ("hits", "rounds", "bytes", "time")}
        rows.append(row)
    return rows


def _cells(results: StudyResults) -> list[dict[str, Any]]:
    out = []
    for cell in results.cells:
        value = cell.run.final(results.metric) if cell.run else None
        out.append({"setting": cell.setting, "strategy": cell.label, "seed": cell.seed, "status": cell.status, results.metric: value})
    return out


def _csv(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    if rows:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return out.getvalue()


def _markdown(comparison: Comparison) -> str:
    parts = [f"# {comparison.results.name}", comparison.results.study["asks"]]
    head = columns(comparison)
    for setting in comparison.results.settings:
        if setting:
            parts.append(f"## {setting}")
        rows = ["| " + " | ".join(_cell_md(h) for h, _ in head) + " |", "|" + " --- |" * len(head)]
        for line in comparison.of(setting):
            texts = [marked(h, _cell_md(text(line)), line, comparison, lambda s: f"**{s}**") for h, text in head]
            rows.append("| " + " | ".join(texts) + " |")
        parts.append("\n".join(rows))
    parts.append(NOTE.format(base=comparison.results.baseline))
    return "\n\n".join(parts) + "\n"


def _cell_md(text: str) -> str:
    return re.sub(r"<(?=[a-zA-Z/!])", "&lt;", text.replace("|", "\\|"))  # what begins a tag would be taken for one


_TEX = {c: "\\" + c for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_TEX |= {"−": "$-$", "±": r"$\pm$", "<": "$<$", ">": "$>$"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in text)


def _latex(comparison: Comparison) -> str:
    """A table for the package booktabs."""
    head = columns(comparison)
    lines = [r"\begin{tabular}{l" + "r" * (len(head) - 1) + "}", r"\toprule", " & ".join(_tex(h) for h, _ in head) + r" \\"]
    for setting in comparison.results.settings:
        lines.append(r"\midrule")
        if setting:
            lines.append(rf"\multicolumn{{{len(head)}}}{{l}}{{{_tex(setting)}}} \\")
        for line in comparison.of(setting):
            texts = [marked(h, _tex(text(line)), line, comparison, lambda s: rf"\textbf{{{s}}}") for h, text in head]
            lines.append(" & ".join(texts) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", "% " + NOTE.format(base=comparison.results.baseline)]
    return "\n".join(lines) + "\n"


def tell(console: Any, results: StudyResults) -> None:
    """The comparison in a terminal, with its verdict and what failed."""
    from rich.table import Table as Grid

    from fedsim.report.study_page import verdict

    comparison = Comparison(results)
    head = outcome(comparison)  # the rest is on the page and in the files: a terminal is narrow
    for setting in results.settings:
        table = Grid(title=setting or None, title_justify="left", header_style="bold")
        for i, (heading, _) in enumerate(head):
            table.add_column(heading, justify="left" if i == 0 else "right", no_wrap=True)
        for line in comparison.of(setting):
            table.add_row(*(marked(h, text(line), line, comparison, lambda s: f"[bold]{s}[/bold]") for h, text in head))
        console.print(table, highlight=False)
    console.print(verdict(comparison), highlight=False, markup=False)
    for cell in results.cells:
        if cell.run and cell.status == "failed":
            console.print(f"{cell.place} failed: {cell.run.failure}", highlight=False, markup=False)
