"""F5. The figures of a study: differences, curves with bands, costs, sweeps, ranks. One colour a strategy, everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedsim import statistics
from fedsim.report.comparison import Comparison, Line
from fedsim.report.figure import COLOURS, DASHES, SYMBOLS, Figure, Trace, axis, band, colour, line, rule
from fedsim.report.formats import interval, name_of, number, p_value, signed
from fedsim.statistics import Summary
from fedsim.study import short


def differences(comparison: Comparison, setting: str) -> Figure | None:
    """The paired difference of each strategy to the baseline with its 95 % interval; hollow where it is within the noise."""
    labels = comparison.results.labels
    lines = [each for each in comparison.of(setting) if each.versus is not None]
    if not lines:
        return None
    traces = []
    for each in lines:
        assert each.versus is not None
        i, d = labels.index(each.label), each.versus.difference
        low, high = each.versus.interval or (d, d)
        symbol = "circle" if each.verdict else "circle-open"
        hover = f"{each.label}: {signed(d)}<br>95 % interval {interval((low, high))}<br>p = {p_value(each.p)}<extra></extra>"
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [d],
                "y": [each.label],
                "name": each.label,
                "showlegend": False,
                "error_x": {"type": "data", "symmetric": False, "array": [high - d], "arrayminus": [d - low], "thickness": 2, "width": 5},
                "marker": {"color": colour(i), "size": 11, "symbol": symbol, "line": {"width": 2, "color": colour(i)}},
                "hovertemplate": hover,
            }
        )
    zero = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": 0, "x1": 0, "line": {"color": "@muted", "width": 1, "dash": "dash"}}
    better = "right" if comparison.higher else "left"
    note = f"Seed by seed. {better.capitalize()} is better. Filled: p < 0.05 after correction; hollow: within the noise."
    layout = {
        "xaxis": axis(f"{name_of(comparison.results.metric)}, difference to {comparison.results.baseline}"),
        "yaxis": _rows(len(lines)),
        "shapes": [zero],
    }
    return Figure(_in("Difference to " + comparison.results.baseline, setting), traces, layout, note, 130 + 44 * len(lines))


def curves(comparison: Comparison, setting: str) -> Figure | None:
    """The metric over the rounds: mean over seeds, and from the lowest to the highest seed."""
    results, traces = comparison.results, list[Trace]()
    for i, label in enumerate(results.labels):
        series = [run.series(results.metric) for run in results.runs(setting, label).values() if run.finished]
        rounds = sorted(set.intersection(*(set(x) for x, _ in series))) if series else []
        if not rounds:
            continue
        table = np.array([[dict(zip(x, y, strict=True))[r] for r in rounds] for x, y in series])
        if len(series) > 1:
            traces += band(rounds, table.min(0).tolist(), table.max(0).tolist(), label, i)
        traces.append(line(rounds, table.mean(0).tolist(), label, i))
    if not traces:
        return None
    note = "Line: mean over seeds. Band: from the lowest to the highest seed." if len(results.seeds) > 1 else ""
    layout = _to_target(comparison, "round")
    return Figure(_in("Learning curves", setting), traces, layout, note, 400, wide=len(results.settings) == 1)


def timed_curves(comparison: Comparison, setting: str) -> Figure | None:
    """The metric over virtual time, where anything takes time: mean over seeds, and from the lowest to the highest seed.

    Seeds are read off at common times, between evaluations on a straight line, as long as all of them ran.
    """
    results, traces = comparison.results, list[Trace]()
    for i, label in enumerate(results.labels):
        runs = [run for run in results.runs(setting, label).values() if run.finished and run.clock()]
        series = [([run.clock()[r] for r in rounds], values) for run in runs for rounds, values in [run.series(results.metric)] if rounds]
        if not series:
            continue
        times = np.linspace(0, min(x[-1] for x, _ in series), 101)
        table = np.array([np.interp(times, x, y) for x, y in series])
        if len(series) > 1:
            traces += band(times.tolist(), table.min(0).tolist(), table.max(0).tolist(), label, i)
        traces.append(line(times.tolist(), table.mean(0).tolist(), label, i))
    if not traces:
        return None
    layout = _to_target(comparison, "virtual time (s)")
    note = "Line: mean over seeds. Band: from the lowest to the highest seed." if len(results.seeds) > 1 else ""
    return Figure(_in("Learning curves by virtual time", setting), traces, layout, note, 400, wide=len(results.settings) == 1)


def _to_target(comparison: Comparison, x: str) -> dict[str, Any]:
    """The layout of learning curves, with a rule at the target where the study has one."""
    layout: dict[str, Any] = {"xaxis": axis(x), "yaxis": axis(name_of(comparison.results.metric))}
    target = comparison.results.study.get("target")
    return layout if target is None else layout | rule(float(target), "target")


COSTS = {
    "bytes": ("traffic in all (MB)", 1e-6),
    "time": ("virtual time in all (s)", 1.0),
    "epsilon": ("privacy spent (epsilon)", 1.0),
    "worst": ("accuracy of the worst tenth of clients", 1.0),
}


def pareto(comparison: Comparison, setting: str) -> list[Figure]:
    """The metric against what it costs, and against the worst clients; bars are standard deviations over seeds."""
    out = []
    for cost, (title, scale) in COSTS.items():
        points = [(each, each.score, getattr(each, cost)) for each in comparison.of(setting) if each.score and getattr(each, cost)]
        if len(points) < 2:
            continue
        traces = [_point(comparison, each, score, x, scale) for each, score, x in points]
        layout = {"xaxis": axis(title), "yaxis": axis(name_of(comparison.results.metric))}
        wanted = ("upper" if comparison.higher else "lower") + (" right" if cost == "worst" else " left")
        out.append(
            Figure(
                _in(f"{name_of(comparison.results.metric).capitalize()} and {title.split(' (')[0]}", setting),
                traces,
                layout,
                f"Best: {wanted}.",
            )
        )
    return out


def _point(comparison: Comparison, each: Line, score: Summary, x: Summary, scale: float) -> Trace:
    i = comparison.results.labels.index(each.label)
    return {
        "type": "scatter",
        "mode": "markers",
        "name": each.label,
        "x": [x.mean * scale],
        "y": [score.mean],
        "error_x": {"type": "data", "array": [(x.std or 0) * scale], "thickness": 1, "width": 3, "color": colour(i)},
        "error_y": {"type": "data", "array": [score.std or 0], "thickness": 1, "width": 3, "color": colour(i)},
        "marker": {"color": colour(i), "size": 12, "symbol": SYMBOLS[i % len(SYMBOLS)]},
        "hovertemplate": f"{each.label}<br>%{{x:.4g}}<br>{number(score.mean)}<extra></extra>",
    }


def sweeps(comparison: Comparison) -> list[Figure]:
    """The metric at the end over each swept field, for every combination of the other fields."""
    results = comparison.results
    values = {cell.setting: cell.values for cell in results.cells}
    fields = list(next(iter(values.values()), {}))
    out = []
    for field in fields:
        others: dict[str, list[str]] = {}
        for setting, at in values.items():
            rest = ", ".join(f"{short(f)}={at[f]}" for f in fields if f != field)
            others.setdefault(rest, []).append(setting)
        out += [_sweep(comparison, field, rest, settings, values) for rest, settings in others.items() if len(settings) > 1]
    return out


def _sweep(comparison: Comparison, field: str, rest: str, settings: list[str], values: dict[str, dict[str, Any]]) -> Figure:
    numeric = all(isinstance(values[s][field], (int, float)) and not isinstance(values[s][field], bool) for s in settings)
    x = [values[s][field] if numeric else str(values[s][field]) for s in settings]
    traces = []
    for i, label in enumerate(comparison.results.labels):
        scores = [next(each.score for each in comparison.of(s) if each.label == label) for s in settings]
        bars = {"type": "data", "array": [(s.std or 0) if s else None for s in scores], "thickness": 1, "width": 3, "color": colour(i)}
        trace = line(x, [s.mean if s else None for s in scores], label, i, error_y=bars)
        traces.append(trace | {"mode": "lines+markers"})
    spread = numeric and _wide([float(v) for v in x])
    ticks = {"type": "log", "tickvals": x, "ticktext": [f"{v:g}" for v in x]} if spread else {"type": "linear" if numeric else "category"}
    layout = {"xaxis": axis(field, **ticks), "yaxis": axis(name_of(comparison.results.metric))}
    return Figure(_in(f"Over {short(field)}", rest), traces, layout, "Mean over seeds, bars: standard deviation.")


def _rows(count: int) -> dict[str, Any]:
    """An axis of names, the first on top."""
    return {"range": [count - 0.5, -0.5], "automargin": True, "type": "category"}


def _wide(x: list[float]) -> bool:
    """Whether values are better seen on a logarithmic axis."""
    return min(x) > 0 and max(x) / min(x) >= 10


def ranks(comparison: Comparison) -> list[Figure]:
    """Mean ranks over settings (or seeds) with Nemenyi's critical difference, and the ranks in each setting."""
    names, scores = comparison.blocks()
    labels = comparison.results.labels
    if len(names) < 2 or len(labels) < 2:
        return []
    mean = statistics.mean_ranks(scores, comparison.higher)
    what = "settings" if len(comparison.results.settings) > 1 else "seeds"
    apart = statistics.critical_difference(len(labels), len(names))
    p = statistics.friedman(scores)
    order = np.argsort(mean, kind="stable")
    dots = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [float(mean[i])],
            "y": [labels[i]],
            "name": labels[i],
            "showlegend": False,
            "marker": {"color": colour(int(i)), "size": 12, "symbol": SYMBOLS[int(i) % len(SYMBOLS)]},
            "error_x": {"type": "data", "array": [apart / 2], "thickness": 1.5, "width": 4, "color": colour(int(i))},
            "hovertemplate": f"{labels[i]}: mean rank {mean[i]:.2f}<extra></extra>",
        }
        for i in order
    ]
    note = f"Over {len(names)} {what}; 1 is best. Bars that do not overlap differ (Nemenyi, 5 %)."
    note += f" Friedman's test: p = {p_value(p)}." if p is not None else ""
    ends = min(1 - 0.2, float(mean.min()) - apart / 2), max(len(labels) + 0.2, float(mean.max()) + apart / 2)  # no bar is cut off
    layout = {
        "xaxis": axis("mean rank", range=[ends[0] - 0.1, ends[1] + 0.1], tickvals=list(range(1, len(labels) + 1))),
        "yaxis": _rows(len(labels)),
    }
    out = [Figure("Mean ranks", dots, layout, note, 130 + 40 * len(labels))]
    if what == "settings":
        each = np.array([statistics.mean_ranks(row[None], comparison.higher) for row in scores])
        traces = [line(names, each[:, i].tolist(), label, i, mode="lines+markers") for i, label in enumerate(labels)]
        axes = {"xaxis": axis("", automargin=True), "yaxis": axis("rank of the mean over seeds", autorange="reversed", dtick=1)}
        out.append(Figure("Ranks in each setting", traces, axes, "1 is best.", 400))
    return out


def significance(comparison: Comparison, setting: str) -> Figure | None:
    """Every two strategies: the row's mean minus the column's, with the corrected p-value."""
    pairs, labels = comparison.pairs(setting), comparison.results.labels
    if len(labels) < 3 or not pairs:
        return None
    z: list[list[float | None]] = [[None] * len(labels) for _ in labels]
    text = [[""] * len(labels) for _ in labels]
    for (a, b), (each, p) in pairs.items():
        i, j = labels.index(a), labels.index(b)
        z[i][j], z[j][i] = each.difference, -each.difference
        star = "<b>*</b>" if statistics.significant(p) else ""
        text[i][j], text[j][i] = (f"{signed(sign * each.difference)}{star}<br>p {p_value(p)}" for sign in (1, -1))
    most = max((abs(v) for row in z for v in row if v is not None), default=0) or 1
    trace = {
        "type": "heatmap",
        "z": z,
        "x": labels,
        "y": labels,
        "text": text,
        "texttemplate": "%{text}",
        "textfont": {"size": 11},
        "colorscale": "@diverging",
        "zmin": -most,
        "zmax": most,
        "showscale": False,
        "xgap": 2,
        "ygap": 2,
        "hovertemplate": "%{y} minus %{x}<br>%{text}<extra></extra>",
    }
    layout = {"xaxis": axis("", side="bottom", showgrid=False), "yaxis": axis("", autorange="reversed", automargin=True, showgrid=False)}
    note = "Row minus column, paired by seed; p-values Holm-corrected over all pairs; * is p < 0.05."
    return Figure(_in("Every two strategies", setting), [trace], layout, note, 120 + 62 * len(labels))


def _in(title: str, setting: str) -> str:
    return f"{title} ({setting})" if setting else title


__all__ = ["COLOURS", "DASHES", "curves", "differences", "pareto", "ranks", "significance", "sweeps"]
