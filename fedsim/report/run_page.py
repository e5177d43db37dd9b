"""F5. The page of a run."""

from __future__ import annotations

import shlex
from typing import Any

from fedsim.document import write
from fedsim.manifest import RUNTIMES
from fedsim.report import coverage, maps, run_figures
from fedsim.report.formats import name_of, number, seconds, traffic
from fedsim.report.page import Page, Section, Table
from fedsim.results import Run, higher_is_better


def render(run: Run) -> str:
    """The page as HTML."""
    names = " then ".join(run.strategies())
    data, model = run.scenario["data"], run.scenario["model"]
    lead = f"{names} on {_name(data['source'])}, {_name(model)}, seed {run.scenario['seed']}"
    sections = [
        Section("Curves", figures=run_figures.curves(run)),
        _participation(run),
        Section("What the strategy reports", figures=run_figures.training(run)),
        Section("Clients", "How evenly the model serves them.", figures=run_figures.fairness(run), facts=_fairness(run)),
        Section("Cost", figures=run_figures.traffic(run)),
        Section("Privacy budget", figures=run_figures.group(run, "privacy."), facts=_last(run, "privacy.")),
        _coverage(run),
        _faults(run),
        Section("How to reproduce", facts=_machine(run), code=_commands(run)),
        Section("Resolved scenario", "Every default written out.", code=write(run.scenario), closed=True),
    ]
    return Page("Run", str(run.scenario["name"]), lead, _verdict(run), _tiles(run), sections).html()


def _name(value: Any) -> str:
    return str(value["name"] if isinstance(value, dict) else value)


def _verdict(run: Run) -> str:
    if run.failure:
        return f"This run failed: {run.failure}"
    done = run.rows[-1]["round"] if run.rows else 0
    return "" if run.finished else f"This run is not finished: {done} of {run.rounds} rounds so far."


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    tiles = []
    if metric := run.metric():
        rounds, values = run.series(metric)
        pick = max if higher_is_better(metric) else min
        best = pick(range(len(values)), key=values.__getitem__)
        tiles.append((name_of(metric), number(values[-1]), f"best {number(values[best])} in round {rounds[best]}"))
    if run.names("clients.accuracy.worst_10"):
        tiles.append(("worst tenth of clients", number(run.series("clients.accuracy.worst_10")[1][-1]), "mean accuracy"))
    done = run.rows[-1]["round"] if run.rows else 0
    tiles.append(("rounds", f"{done:,}", "" if done == run.rounds else f"of {run.rounds:,}"))
    took_part = [row["participants"] for row in run.rows if "participants" in row]
    if took_part:
        tiles.append(
            ("clients a round", f"{sum(took_part) / len(took_part):.1f}", f"of {run.manifest.get('clients', maps.population(run)):,}")
        )
    tiles.append(("traffic", traffic(run.total("bytes_down") + run.total("bytes_up")), "both ways"))
    if wall := sum(row["train"] + row["evaluate"] for row in run.timings):
        share = sum(row["evaluate"] for row in run.timings) / wall
        tiles.append(("computing time", seconds(wall), f"{100 * share:.0f} % of it evaluation"))
    return tiles


def _participation(run: Run) -> Section:
    if not run.clients:
        return Section("Participation")
    figures = [maps.participation(run)]
    for name in maps.columns(run):
        if name == "staleness":
            figures.append(maps.spread(run, name))
        elif (figure := maps.column(run, name)) is not None:
            figures.append(figure)
    return Section("Participation", figures=[*figures, *run_figures.cohorts(run)])


def _fairness(run: Run) -> list[tuple[str, str]]:
    last = {n.rpartition(".")[2]: run.series(n)[1][-1] for n in run.names("clients.accuracy.")}
    words = {"mean": "mean accuracy", "std": "standard deviation", "worst_10": "worst 10 %", "best_10": "best 10 %", "jain": "Jain index"}
    return [(text, number(last[key])) for key, text in words.items() if key in last]


def _last(run: Run, prefix: str) -> list[tuple[str, str]]:
    return [(name_of(n), number(run.series(n)[1][-1])) for n in run.names(prefix)]


def _coverage(run: Run) -> Section:
    """Of conformal phases; of other strategies that report something under that name, their numbers."""
    if phases := coverage.calibrated(run):
        return coverage.section(phases)
    return Section("Coverage", figures=run_figures.group(run, "coverage."), facts=_last(run, "coverage."))


def _faults(run: Run) -> Section:
    rows = []
    for row in run.rows:
        for kind in ("lost", "rejected"):
            rows += [[str(row["round"]), client, kind, why] for client, why in row.get(f"{kind}_clients", {}).items()]
    shown = rows[:50]
    intro = f"{len(rows):,} updates did not count" + (", the first 50 of them:" if len(rows) > 50 else ".")
    table = Table(["round", "client", "what", "why"], shown, words=frozenset({2, 3}))
    return Section("Faults and rejections", intro, tables=[table] if rows else [])


def _machine(run: Run) -> list[tuple[str, str]]:
    m = run.manifest
    if not m:
        return []
    engine, machine = m["engine"], m["machine"]
    where = f"{engine['workers']} Ray workers" if engine["workers"] else "one process"
    if (runtime := m.get("runtime", "simulation")) != "simulation":
        where = runtime
    return [
        ("started", str(m["started"])),
        ("machine", f"{machine['processor']}, {machine['cores']} cores, {machine['platform']}"),
        ("engine", f"{where}, {engine['mode']}, {engine['device']}"),
        ("versions", ", ".join(f"{k} {v}" for k, v in {"fedsim": m["fedsim"], **m["versions"]}.items())),
        ("code", str(m["code"] or "not in a git repository")),
        ("partition", str(m["partition"])),
    ]


def _commands(run: Run) -> str:
    folder = shlex.quote(run.path.as_posix())
    lines = [f"fedsim run {folder}/scenario.yaml --output again      # the same bits on this type of machine"]
    if not run.finished and (command := RUNTIMES[run.manifest.get("runtime", "simulation")]):
        lines.append(command.format(folder))
    return "\n".join(lines)
