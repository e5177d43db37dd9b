"""F5. The page of a study."""

from __future__ import annotations

import shlex

from fedsim.document import write
from fedsim.report import study_figures as figures
from fedsim.report.comparison import Comparison, check_pairing
from fedsim.report.figure import COLOURS, Figure
from fedsim.report.formats import interval, name_of, number, p_value, signed
from fedsim.report.page import Page, Section, Table
from fedsim.report.tables import cost, outcome
from fedsim.results import StudyResults, higher_is_better

MOST_SETTINGS = 12
"""Settings that get figures of their own."""


def render(results: StudyResults) -> str:
    """The page as HTML."""
    comparison = Comparison(results)
    settings = results.settings[:MOST_SETTINGS]
    sections = [
        Section("Results", _reading(results), tables=[_table(comparison, s) for s in results.settings if _any(comparison, s)]),
        Section("Differences", figures=_present(figures.differences(comparison, s) for s in settings)),
        Section("Curves", figures=_present(make(comparison, s) for s in settings for make in (figures.curves, figures.timed_curves))),
        Section("Sweeps", figures=figures.sweeps(comparison)),
        Section(
            "What it costs",
            f"Means over seeds. The area under a curve is its mean height; {'higher' if comparison.higher else 'lower'} is faster.",
            tables=[_costs(comparison, s) for s in results.settings if _any(comparison, s)],
            figures=[f for s in settings for f in figures.pareto(comparison, s)],
        ),
        Section("Ranks", figures=figures.ranks(comparison)),
        Section("Every pair", figures=_present(figures.significance(comparison, s) for s in settings[:4])),
        _tuning(results),
        _failures(results),
        _pairing(results),
        Section("Runs", tables=[_cells(results)], closed=True),
        Section("How to reproduce", code=_commands(results), facts=_facts(results)),
        Section("Resolved study", "Complete: it needs no other file.", code=write(results.study), closed=True),
    ]
    return Page("Study", results.name, str(results.study["asks"]), verdict(comparison), _tiles(comparison), sections).html()


def _present(found: object) -> list[Figure]:
    return [f for f in found if f is not None]  # type: ignore[attr-defined]


def _any(comparison: Comparison, setting: str) -> bool:
    return any(line.score for line in comparison.of(setting))


def verdict(comparison: Comparison) -> str:
    """The outcome, in a sentence or two."""
    results = comparison.results
    if not results.count("finished"):
        return "No run is finished yet."
    compared = [line for line in comparison.lines if line.versus]
    if not compared:
        return ""
    if all(line.versus is not None and line.versus.n < 2 for line in compared):
        return f"One seed says nothing about noise: no difference to {results.baseline} can be tested."
    clear = [line for line in compared if line.verdict]
    if not clear:
        return f"No strategy differs from {results.baseline} beyond the noise (paired t-test, Holm-corrected, 5 %)."
    parts = []
    for line in clear:
        assert line.versus is not None
        where = f" at {line.setting}" if line.setting else ""
        parts.append(f"{line.label} is {line.verdict}{where} ({signed(line.versus.difference)}, p = {p_value(line.p)})")
    within = len(compared) - len(clear)
    rest = f" {within} other difference{'s are' if within > 1 else ' is'} within the noise." if within else ""
    return f"Compared with {results.baseline}: {'; '.join(parts[:8])}{'; ...' if len(parts) > 8 else ''}.{rest}"


def _tiles(comparison: Comparison) -> list[tuple[str, str, str]]:
    results = comparison.results
    done, total = results.count("finished"), len(results.cells)
    tiles = [("runs", f"{done}", "all finished" if done == total else f"finished, of {total}")]
    tiles.append(("strategies", str(len(results.labels)), f"baseline {results.baseline}"))
    tiles.append(("seeds", str(len(results.seeds)), "paired"))
    if len(results.settings) > 1:
        tiles.append(("settings", str(len(results.settings)), ", ".join(results.study.get("over", {}))))
    pick = max if comparison.higher else min
    scored = [(line.score.mean, line) for line in comparison.lines if line.score]
    if scored:
        value, line = pick(scored, key=lambda pair: pair[0])
        remark = f"{line.label}{', ' + line.setting if line.setting else ''}"
        tiles.append((f"{'highest' if comparison.higher else 'lowest'} mean {name_of(results.metric)}", number(value), remark))
    return tiles


def _reading(results: StudyResults) -> str:
    way = "higher" if higher_is_better(results.metric) else "lower"
    text = f"{name_of(results.metric).capitalize()} at the end of training ({way} is better), mean ± standard deviation over seeds. "
    return text + (
        f"Differences are paired by seed; p-values are of paired t-tests, Holm-corrected over the whole study. "
        f"Bold is better than {results.baseline} with p < 0.05; ▼ is worse. What is neither may be noise. "
        "Bootstrap intervals (BCa) assume no shape, but are too narrow for fewer than about ten seeds; the t-test decides."
    )


def _table(comparison: Comparison, setting: str) -> Table:
    results = comparison.results
    head, rows, bold = outcome(comparison), [], set()
    score = [h for h, _ in head].index(name_of(results.metric))
    lines = comparison.of(setting)
    for i, line in enumerate(lines):
        row = [text(line) for _, text in head]
        if line.verdict == "better":
            bold.add((i, score))
        elif line.verdict == "worse":
            row[score] += " ▼"
        rows.append(row)
    names = [h for h, _ in head]
    if comparison.has("versus"):
        at = names.index("95 % interval") + 1
        names.insert(at, "bootstrap interval")
        for row, line in zip(rows, lines, strict=True):
            row.insert(at, interval(line.versus.bootstrap) if line.versus else "-")
    return Table(names, rows, frozenset(bold), setting, chips=_chips(results, [line.label for line in lines]))


def _costs(comparison: Comparison, setting: str) -> Table:
    head, lines = cost(comparison), comparison.of(setting)
    rows = [[line.label, *(text(line) for _, text in head)] for line in lines]
    chips = _chips(comparison.results, [line.label for line in lines])
    return Table(["strategy", *(h for h, _ in head)], rows, caption=setting, chips=chips)


def _chips(results: StudyResults, labels: list[str]) -> tuple[int, ...]:
    """The colours of strategies."""
    return tuple(results.labels.index(label) % COLOURS if label in results.labels else COLOURS - 1 for label in labels)


def _tuning(results: StudyResults) -> Section:
    rows = []
    for group in results.tuning:
        chosen = ", ".join(f"{k}={v}" for k, v in group["chosen"].items()) or "none: every run failed; the scenario's values"
        best = next((t["score"] for t in group["tried"] if t["values"] == group["chosen"]), None)
        rows.append([group["label"], group["setting"], chosen, number(best), str(group["runs"]), f"{group['rounds']:,}"])
    chips = _chips(results, [group["label"] for group in results.tuning])
    head = ["strategy", "setting", "chosen", "validation score", "runs spent", "rounds spent"]
    intro = (
        "Chosen before the study, by a score on examples that were held back from clients' training data. No test example was looked at."
    )
    return Section("Tuning", intro, tables=[Table(head, rows, words=frozenset({0, 1, 2}), chips=chips)] if rows else [])


def _failures(results: StudyResults) -> Section:
    rows = [[c.place, c.run.failure or ""] for c in results.cells if c.run and c.status == "failed"]
    intro = "These runs failed and count nowhere; running the study again tries them again."
    return Section("Failures", intro, tables=[Table(["run", "why"], rows, words=frozenset({0, 1}))] if rows else [])


def _pairing(results: StudyResults) -> Section:
    found = check_pairing(results)
    if not found.groups:
        return Section("Pairing")
    if found.broken:
        return Section(
            "Pairing", "Not everything is shared within a seed, so pairs are less alike than they should be:", code="\n".join(found.broken)
        )
    shared = "partition and initial model (by hash), first scores, and who took part in every round"
    return Section(
        "Pairing", facts=[("shared within each seed", shared), ("checked", f"{found.groups} groups of runs, from their folders")]
    )


def _cells(results: StudyResults) -> Table:
    rows = []
    for cell in results.cells:
        value = cell.run.final(results.metric) if cell.run else None
        rows.append([cell.place, cell.status, str(cell.seed), number(value)])
    return Table(["run folder", "status", "seed", name_of(results.metric)], rows, words=frozenset({0, 1}))


def _facts(results: StudyResults) -> list[tuple[str, str]]:
    m = results.manifest
    versions = {"fedsim": m["fedsim"], **m["versions"]}
    return [("machine", str(m["machine"])), ("versions", ", ".join(f"{k} {v}" for k, v in versions.items()))]


def _commands(results: StudyResults) -> str:
    folder = shlex.quote(results.path.as_posix())
    cell = shlex.quote(results.cells[0].place)
    return f"fedsim compare {folder}/study.yaml --output again\nfedsim report {folder}/{cell}      # the page of a single run"
