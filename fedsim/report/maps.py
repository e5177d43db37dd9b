"""F5. Clients over rounds: who took part, and what a strategy said of each, as heat maps that stay readable for many clients and rounds."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.report.figure import Figure, axis
from fedsim.results import Run

MOST_ROUNDS, MOST_CLIENTS = 300, 120
"""Cells of a map; beyond, neighbouring rounds and groups of clients share one."""


def population(run: Run) -> int:
    """How many clients there are."""
    known = int(run.manifest.get("clients") or 0)
    return max(known, 1 + max((max(row["ids"], default=-1) for row in run.clients), default=-1))


def columns(run: Run) -> list[str]:
    """What the strategy said of each client that took part."""
    return list(dict.fromkeys(k for row in run.clients for k, v in row.items() if k not in {"round", "ids"} and isinstance(v, list)))


def participation(run: Run) -> Figure:
    """Who took part when."""
    clients, rounds = population(run), len(run.clients)
    counts = _gather(run, lambda row: np.ones(len(row["ids"])))[1]
    z, x, y, grouped = _grid(counts, run)
    each = _divide(z, *_cell_sizes(clients, rounds, z.shape)) if grouped else z
    unit = "share of clients and rounds in the cell" if grouped else "took part"
    note = f"{clients:,} clients. " + ("A cell stands for several clients or rounds: darker is more often. " if grouped else "")
    total = counts.sum()
    note += f"On average {total / max(rounds, 1):.1f} clients a round; a client took part {total / max(clients, 1):.1f} times."
    trace: dict[str, Any] = {"type": "heatmap", "z": each.tolist(), "x": x, "y": y, "zmin": 0, "zmax": 1}
    trace["colorscale"] = "@heat" if grouped else [[0, "@grid"], [1, "@c0"]]
    hover = "round %{x}<br>client %{y}<br>" + unit + " %{z:.2f}<extra></extra>"
    return _figure("Who took part", trace | {"showscale": grouped, "hovertemplate": hover}, clients, note)


def column(run: Run, name: str) -> Figure | None:
    """What the strategy said of each client that took part, or None where it never said anything."""
    clients = population(run)
    share = name == "weight"

    def values(row: dict[str, Any]) -> NDArray[np.float64]:
        given = np.array([np.nan if v is None else v for v in row.get(name) or [np.nan] * len(row["ids"])], dtype=np.float64)
        total = np.nansum(np.abs(given))
        return given / total if share and total > 0 else given

    sums, counts = _gather(run, values)
    if not counts.any():
        return None
    (top, x, y, _), (bottom, *_) = _grid(sums, run), _grid(counts, run)
    z = np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)
    note = (
        "Share of the round's total weight; empty where a client did not take part." if share else "Empty where a client did not take part."
    )
    hover = "round %{x}<br>client %{y}<br>" + name + (" %{z:.1%}" if share else " %{z:.4g}") + "<extra></extra>"
    bar = {"thickness": 12, "outlinewidth": 0} | ({"tickformat": ".0%"} if share else {})
    trace = {"type": "heatmap", "z": z.tolist(), "x": x, "y": y, "colorscale": "@heat", "colorbar": bar, "hovertemplate": hover}
    return _figure("Weights over time" if share else f"{name} over time", trace, clients, note)


def spread(run: Run, name: str) -> Figure:
    """How often each value of a column occurred."""
    values = [v for row in run.clients for v in row.get(name) or [] if v is not None]
    whole = all(v == int(v) for v in values)
    trace: dict[str, Any] = {"type": "histogram", "x": values, "marker": {"color": "@c0"}, "hovertemplate": "%{x}: %{y}<extra></extra>"}
    if whole and values:
        trace["xbins"] = {"start": min(values) - 0.5, "end": max(values) + 0.5, "size": max(1, round((max(values) - min(values)) / 40))}
    layout = {"xaxis": axis(f"{name} (versions)" if name == "staleness" else name), "yaxis": axis("updates"), "bargap": 0.08}
    return Figure(f"{name.capitalize()} of updates", [trace], layout, f"{len(values):,} updates; mean {np.mean(values):.2f}.")


def _figure(title: str, trace: dict[str, Any], clients: int, note: str) -> Figure:
    height = int(min(560, max(220, 120 + 9 * min(clients, MOST_CLIENTS))))
    layout = {"xaxis": axis("round", showgrid=False), "yaxis": axis("client", showgrid=False, autorange="reversed")}
    return Figure(title, [trace], layout, note, height, wide=True)


def _gather(run: Run, values: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums of values and counts of them, `[N, R]`."""
    shape = population(run), len(run.clients)
    if shape[0] * shape[1] > 20_000_000:  # a million clients: only those that were ever seen, squeezed together
        shape = min(shape[0], 2000), shape[1]
    sums, counts = np.zeros(shape), np.zeros(shape)
    for r, row in enumerate(run.clients):
        ids = np.array(row["ids"], dtype=np.int64) * shape[0] // max(population(run), 1)
        given = values(row)
        known = ~np.isnan(given)
        np.add.at(sums[:, r], ids[known], given[known])
        np.add.at(counts[:, r], ids[known], 1)
    return sums, counts


def _grid(table: NDArray[np.float64], run: Run) -> tuple[NDArray[np.float64], list[Any], list[Any], bool]:
    """The table with neighbours summed up until it is small enough, names of its columns and rows, and whether that was needed."""
    clients, rounds = population(run), len(run.clients)
    numbers = [row["round"] for row in run.clients]
    cols = np.array_split(np.arange(table.shape[1]), min(table.shape[1], MOST_ROUNDS))
    rows = np.array_split(np.arange(table.shape[0]), min(table.shape[0], MOST_CLIENTS))
    small = np.array([[table[np.ix_(r, c)].sum() for c in cols] for r in rows]) if table.size else table
    grouped = len(cols) < rounds or len(rows) < clients
    x = [numbers[c[0]] for c in cols]
    y = [int(r[0] * clients // max(table.shape[0], 1)) for r in rows]
    return small, x, y, grouped


def _cell_sizes(clients: int, rounds: int, shape: tuple[int, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rows = np.array([len(part) for part in np.array_split(np.arange(clients), shape[0])])
    cols = np.array([len(part) for part in np.array_split(np.arange(rounds), shape[1])])
    return rows[:, None].astype(np.float64), cols[None, :].astype(np.float64)


def _divide(z: NDArray[np.float64], rows: NDArray[np.float64], cols: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(z / (rows * cols))
