"""F5. The figures of one run: curves, clients, fairness, traffic. Each function gives what its data allow, possibly nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedsim.report.figure import Figure, Trace, axis, band, line
from fedsim.report.formats import name_of
from fedsim.results import Run


def curves(run: Run) -> list[Figure]:
    """Loss, the headline with the spread over clients, and the other scores of the server's test set."""
    on = "validation" if run.names("validation.") else "test"
    out = []
    loss = [line(*run.series(f"{stage}.loss"), f"{stage} loss", i) for i, stage in enumerate(("train", on)) if run.names(f"{stage}.loss")]
    if loss:
        out.append(Figure("Loss", loss, {"xaxis": axis("round"), "yaxis": axis("loss")}))
    if run.names(f"{on}.accuracy"):
        note, traces = "", [line(*run.series(f"{on}.accuracy"), f"{on} set on the server", 0)]
        if clients := _client_band(run):
            note = "Band: the middle 80 % of clients, each on its own test data; dashed: the median client."
            traces = clients + traces
        out.append(Figure("Accuracy", traces, {"xaxis": axis("round"), "yaxis": axis("accuracy")}, note))
    classes = run.names(f"{on}.class_")
    if classes:
        traces = [line(*run.series(name), name.split(".")[1].replace("_", " "), i) for i, name in enumerate(classes)]
        out.append(Figure("Accuracy of each class", traces, {"xaxis": axis("round"), "yaxis": axis("accuracy")}, wide=True))
    others = [n for n in run.names(f"{on}.") if n not in {f"{on}.loss", f"{on}.accuracy", *classes}]
    out += [Figure(_title(n), [line(*run.series(n), name_of(n), 0)], {"xaxis": axis("round"), "yaxis": axis(name_of(n))}) for n in others]
    return out


def training(run: Run) -> list[Figure]:
    """What programs and the strategy report: everything under `train.` but the loss, and everything under `server.`."""
    names = [n for n in run.names("train.") if n != "train.loss"] + run.names("server.")
    return [
        Figure(n, [line(*run.series(n), n, 0)], {"xaxis": axis("round"), "yaxis": axis(n.split(".", 1)[1].replace("_", " "))})
        for n in names
    ]


def group(run: Run, prefix: str) -> list[Figure]:
    """Every number under a prefix: the privacy budget, coverage."""
    return [Figure(_title(n), [line(*run.series(n), n, 0)], {"xaxis": axis("round"), "yaxis": axis(name_of(n))}) for n in run.names(prefix)]


def _title(name: str) -> str:
    text = name_of(name)
    return text[0].upper() + text[1:]


def _quantiles(run: Run, name: str, levels: tuple[float, ...]) -> tuple[list[int], list[list[float]]]:
    """Rounds, and quantiles over clients of one of their scores at each."""
    rounds, values = [], []
    for row in run.scores:
        there = [v for v in row.get(name) or [] if v is not None]
        if there:
            rounds.append(row["round"])
            values.append([float(q) for q in np.quantile(there, levels)])
    return rounds, [list(column) for column in zip(*values, strict=True)]


def _client_band(run: Run) -> list[Trace]:
    rounds, found = _quantiles(run, "accuracy", (0.1, 0.5, 0.9))
    if not rounds:
        return []
    low, middle, high = found
    median = line(rounds, middle, "clients, median", 1)
    median["line"] = median["line"] | {"dash": "dash"}
    return [*band(rounds, low, high, "clients, median", 1), median]


def fairness(run: Run) -> list[Figure]:
    """How a score is spread over clients: at the end, and over the rounds."""
    out = []
    last = next((row for row in reversed(run.scores) if any(v is not None for v in row.get("accuracy") or [])), None)
    if last is not None:
        values = [v for v in last["accuracy"] if v is not None]
        counts, edges = np.histogram(values, bins=20, range=(0, 1))  # the last bin holds 1, too
        middles = ((edges[:-1] + edges[1:]) / 2).tolist()
        bars: Trace = {"type": "bar", "x": middles, "y": counts.tolist(), "width": 0.046, "marker": {"color": "@c0"}}
        bars |= {"hovertemplate": "%{y} clients near %{x:.3f}<extra></extra>"}
        layout = {"xaxis": axis("accuracy on the client's own test data", range=[0, 1]), "yaxis": axis("clients")}
        out.append(Figure(f"Clients after round {last['round']}", [bars], layout, f"{len(values)} clients have test data."))
        ordered = sorted(values)
        steps = [100 * (i + 1) / len(ordered) for i in range(len(ordered))]
        trace = line(steps, ordered, "clients", 0) | {"hovertemplate": "%{x:.0f} % of clients have at most %{y:.3f}<extra></extra>"}
        out.append(
            Figure("Clients, from worst to best", [trace], {"xaxis": axis("clients (%)"), "yaxis": axis("accuracy", range=[0, 1.02])})
        )
    parts = {"worst 10 %": "worst_10", "mean": "mean", "best 10 %": "best_10"}
    traces = [
        line(*run.series(f"clients.accuracy.{key}"), label, i)
        for i, (label, key) in enumerate(parts.items())
        if run.names(f"clients.accuracy.{key}")
    ]
    if traces:
        out.append(Figure("Best and worst clients", traces, {"xaxis": axis("round"), "yaxis": axis("accuracy")}))
    if run.names("clients.accuracy.jain"):
        traces = [
            line(*run.series("clients.accuracy.jain"), "Jain index", 0),
            line(*run.series("clients.accuracy.std"), "standard deviation", 1),
        ]
        note = "Jain index: 1 where all clients are served alike. Standard deviation over clients: 0 likewise."
        out.append(Figure("Evenness", traces, {"xaxis": axis("round"), "yaxis": axis("over clients")}, note))
    return out


def traffic(run: Run) -> list[Figure]:
    """Bytes so far, virtual time where the fleet has a clock, and the headline over each."""
    rows = [row for row in run.rows if "bytes_up" in row]
    if not rows:
        return []
    rounds = [row["round"] for row in rows]
    down, up = (np.cumsum([row[k] for row in rows]) / 1e6 for k in ("bytes_down", "bytes_up"))
    traces = [line(rounds, down.tolist(), "to clients", 0), line(rounds, up.tolist(), "from clients", 1)]
    traces[1]["line"] = traces[1]["line"] | {"dash": "dash"}
    out = [Figure("Bytes so far", traces, {"xaxis": axis("round"), "yaxis": axis("MB")})]
    clock = run.clock()
    if clock:
        out.append(Figure("Virtual time", [line(list(clock), list(clock.values()), "time", 0)], _axes("round", "seconds")))
    metric = run.metric()
    if metric:
        sent = dict(zip(rounds, ((a + b) for a, b in zip(down.tolist(), up.tolist(), strict=True)), strict=True))
        when, values = run.series(metric)
        out.append(
            Figure(
                f"{_title(metric)} by bytes",
                [line([sent.get(r, 0) for r in when], values, metric, 0)],
                _axes("MB, both ways", name_of(metric)),
            )
        )
        if clock:
            out.append(
                Figure(
                    f"{_title(metric)} by virtual time",
                    [line([clock.get(r, 0) for r in when], values, metric, 0)],
                    _axes("seconds", name_of(metric)),
                )
            )
    return out


def _axes(x: str, y: str) -> dict[str, Any]:
    return {"xaxis": axis(x), "yaxis": axis(y)}


def cohorts(run: Run) -> list[Figure]:
    """How many took part, and how many were lost or rejected, round by round."""
    names = [n for n in ("participants", "lost", "rejected") if n == "participants" or run.total(n)]
    traces = [line(*run.series(n), n, i) for i, n in enumerate(names) if run.names(n)]
    return (
        [
            Figure(
                "Clients in each round",
                traces,
                {"xaxis": axis("round"), "yaxis": axis("clients", rangemode="tozero")},
                height=240,
                wide=True,
            )
        ]
        if traces
        else []
    )
