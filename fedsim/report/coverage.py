"""F5. Prediction sets in a report: what each conformal phase of a run promises and keeps, as a table and as figures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fedsim.report.figure import Figure, Trace, axis, colour, line, rule
from fedsim.report.formats import number, traffic
from fedsim.report.page import Section, Table
from fedsim.results import Row, Run


@dataclass(frozen=True)
class Calibrated:
    """A conformal phase.

    Attributes:
        label: its method in a few words.
        alpha: what it may miss.
        rows: its rounds.
        last: its last evaluation.
        clients: coverage of each client at that.
        classes: coverage of each class at that; empty where there are none.
    """

    label: str
    alpha: float
    rows: list[Row]
    last: Row
    clients: list[float]
    classes: list[float | None]

    def value(self, name: str) -> float | None:
        """A number of the last evaluation, e.g. "coverage.marginal", or else the last of the phase."""
        found = [v for row in [*self.rows, self.last] if isinstance(v := row.get(name), (int, float))]
        return float(found[-1]) if found else None

    def total(self, name: str) -> float:
        """The sum of a number over the phase."""
        return float(sum(row.get(name) or 0 for row in self.rows))


def calibrated(run: Run) -> list[Calibrated]:
    """The conformal phases of a run that were evaluated, in order."""
    stages = run.scenario.get("phases") or []
    by_round = {row["round"]: row for row in run.scores}
    out = []
    for number_, stage in enumerate(stages):
        rows = [row for row in run.rows if row.get("phase") == number_]
        judged = [row for row in rows if "coverage.marginal" in row]
        if judged:
            scores = by_round.get(judged[-1]["round"], {})
            clients = [v for v in scores.get("coverage") or [] if v is not None]
            label, alpha = _label(stage["strategy"]), float(stage["strategy"]["alpha"])
            out.append(Calibrated(label, alpha, rows, judged[-1], clients, scores.get("class_coverage") or []))
    names = [one.label for one in out]
    return [replace(one, label=f"{one.label} ({i + 1})") if names.count(one.label) > 1 else one for i, one in enumerate(out)]


def _label(strategy: dict[str, Any]) -> str:
    target, budget = strategy.get("target"), strategy.get("epsilon")
    parts = [str(strategy["name"])]
    if isinstance(target, dict):
        parts.append(f"client {target['id']}" if target["name"] == "client" else str(target["name"]))
    return ", ".join(parts + ([f"epsilon {budget:g}"] if budget else []))


def table(phases: list[Calibrated]) -> Table:
    """A row for each phase."""
    columns = [
        ("method", lambda p: p.label),
        ("promised", lambda p: number(1 - p.alpha, 2)),
        ("coverage", lambda p: _with_interval(p, "marginal", "low", "high")),
        ("for the target law", lambda p: _with_interval(p, "target", "target_low", "target_high")),
        ("worst client", lambda p: number(p.value("coverage.worst_client"), 3)),
        ("clients below", lambda p: _percent(p.value("coverage.clients_below"))),
        ("mean gap of clients", lambda p: number(p.value("coverage.client_gap"), 3)),
        ("mean gap of classes", lambda p: number(p.value("coverage.class_gap"), 3)),
        ("set size", lambda p: number(p.value("coverage.set_size"), 2)),
        ("singletons", lambda p: _percent(p.value("coverage.singletons"))),
        ("epsilon", lambda p: number(p.value("privacy.epsilon"), 2)),
        ("rounds", lambda p: str(len(p.rows))),
        ("bytes", lambda p: traffic(p.total("bytes_up") + p.total("bytes_down"))),
    ]
    texts = [[text(p) for p in phases] for _, text in columns]
    kept = [i for i, column in enumerate(texts) if set(column) != {"-"}]
    return Table([columns[i][0] for i in kept], [[texts[i][j] for i in kept] for j in range(len(phases))])


def _with_interval(phase: Calibrated, name: str, low: str, high: str) -> str:
    middle = phase.value(f"coverage.{name}")
    if middle is None:
        return "-"
    return f"{number(middle, 3)} ({number(phase.value(f'coverage.{low}'), 3)} to {number(phase.value(f'coverage.{high}'), 3)})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def section(phases: list[Calibrated]) -> Section:
    """The part of a page."""
    intro = (
        "How often prediction sets hold the true label, on each client's own test data, with exact binomial 95 % intervals. "
        "Clients below: those that miss the promise by more than the noise of their test data."
    )
    figures = [*_clients(phases), *_classes(phases), *_privacy(phases), *_sizes(phases), *_rounds(phases)]
    return Section("Coverage", intro, tables=[table(phases)], figures=figures)


def markdown(phases: list[Calibrated]) -> str:
    """The table as Markdown."""
    made = table(phases)
    return "\n".join(f"| {' | '.join(row)} |" for row in [made.head, ["---"] * len(made.head), *made.rows]) + "\n"


def _promise(phases: list[Calibrated]) -> dict[str, Any]:
    alphas = {p.alpha for p in phases}
    return rule(1 - alphas.pop(), "promised") if len(alphas) == 1 else {}


def _across(phases: list[Calibrated]) -> dict[str, Any]:
    """What is promised, as a vertical line."""
    alphas = {p.alpha for p in phases}
    if len(alphas) > 1:
        return {}
    at = 1 - alphas.pop()
    return {
        "shapes": [{"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": at, "x1": at, "line": {"color": "@muted", "dash": "dash"}}]
    }


def _clients(phases: list[Calibrated]) -> list[Figure]:
    """A box and all clients, method by method."""
    traces: list[Trace] = []
    for i, phase in enumerate(phases):
        look = {"marker": {"color": colour(i), "size": 4, "opacity": 0.6}, "line": {"color": colour(i), "width": 1.5}}
        box = {"type": "box", "x": phase.clients, "name": phase.label, "orientation": "h", "boxpoints": "all", "jitter": 0.6, "pointpos": 0}
        traces += (
            [box | look | {"showlegend": False, "hovertemplate": "%{x:.3f}<extra>" + phase.label + "</extra>"}] if phase.clients else []
        )
    layout = {"xaxis": axis("coverage on the client's own test data"), "yaxis": {"automargin": True, "autorange": "reversed"}}
    note = "Each dot is a client, the dashed line what is promised. Small test sets scatter by themselves."
    return [Figure("Coverage of clients", traces, layout | _across(phases), note, 90 + 42 * len(traces), True)] if traces else []


def _classes(phases: list[Calibrated]) -> list[Figure]:
    """A line for each method over the classes."""
    traces = [line(list(range(len(p.classes))), p.classes, p.label, i) for i, p in enumerate(phases) if p.classes]
    layout = {"xaxis": axis("class", dtick=1), "yaxis": axis("coverage")} | _promise(phases)
    return (
        [Figure("Coverage of classes", traces, layout, "Nobody promises this; label shift is why it matters.", 380, True)] if traces else []
    )


def _privacy(phases: list[Calibrated]) -> list[Figure]:
    """Coverage over epsilon, where several phases spend one."""
    spent = [(p.value("privacy.epsilon"), p) for p in phases]
    private = sorted(((e, p) for e, p in spent if e is not None), key=lambda pair: pair[0])
    if len(private) < 2:
        return []
    name = "target" if all(p.value("coverage.target") is not None for _, p in private) else "marginal"
    low, high = ("target_low", "target_high") if name == "target" else ("low", "high")
    y = [p.value(f"coverage.{name}") or 0.0 for _, p in private]
    bars = {
        "type": "data",
        "symmetric": False,
        "array": [(p.value(f"coverage.{high}") or v) - v for (_, p), v in zip(private, y, strict=True)],
        "arrayminus": [v - (p.value(f"coverage.{low}") or v) for (_, p), v in zip(private, y, strict=True)],
    }
    trace: Trace = line([e for e, _ in private], y, "coverage", 0) | {"error_y": bars}
    ticks = {"type": "log", "tickvals": [round(e, 2) for e, _ in private]}
    layout = {"xaxis": axis("epsilon", **ticks), "yaxis": axis("coverage")} | _promise([p for _, p in private])
    return [Figure("Coverage and privacy", [trace], layout, "With 95 % intervals of the test data; one calibration each.")]


def _sizes(phases: list[Calibrated]) -> list[Figure]:
    values = [p.value("coverage.set_size") for p in phases]
    bars: Trace = {"type": "bar", "orientation": "h", "x": values[::-1], "y": [p.label for p in phases][::-1], "marker": {"color": "@c0"}}
    layout = {"xaxis": axis("labels in a set, or width"), "yaxis": {"automargin": True}}
    return [Figure("Size of sets", [bars], layout)] if len(phases) > 1 else []


def _rounds(phases: list[Calibrated]) -> list[Figure]:
    """Coverage over the rounds of phases that were evaluated more than once."""
    traces = []
    for i, phase in enumerate(phases):
        judged = [row for row in phase.rows if row.get("coverage.marginal") is not None]
        if len(judged) > 1:
            first = phase.rows[0]["round"]
            traces.append(line([row["round"] - first + 1 for row in judged], [row["coverage.marginal"] for row in judged], phase.label, i))
    layout = {"xaxis": axis("round of the phase"), "yaxis": axis("coverage")} | _promise(phases)
    return [Figure("Coverage while calibrating", traces, layout)] if traces else []
