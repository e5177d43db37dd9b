"""F5. A figure: a Plotly specification with what it shows in words. Colours are names (`@c0`, `@ink`) that the page resolves by theme."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

Trace = dict[str, Any]

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")
COLOURS = 8
"""In a palette; strategies beyond differ by dash and symbol, too."""


@dataclass(frozen=True)
class Figure:
    """One plot.

    Attributes:
        title: what one sees.
        traces, layout: for Plotly.
        note: how to read it, in a sentence.
        height: in pixels.
        wide: whether it takes the whole width of the page.
    """

    title: str
    traces: list[Trace]
    layout: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    height: int = 340
    wide: bool = False

    def spec(self) -> dict[str, Any]:
        """For the page's script."""
        return {"data": plain(self.traces), "layout": plain(self.layout), "height": self.height}


def plain(value: Any) -> Any:
    """Plain values for JSON: numbers to six digits, null for what is not finite."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.6g}")
    return value


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with its title."""
    return {"title": {"text": title}} | more


def colour(index: int) -> str:
    """The colour of the i-th strategy, everywhere."""
    return f"@c{index % COLOURS}"


def line(x: list[Any], y: list[Any], name: str, index: int, **more: Any) -> Trace:
    """A curve of the i-th strategy; markers where it has few points."""
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(x) <= 12 else "lines",
        "x": x,
        "y": y,
        "name": name,
        "legendgroup": name,
        "line": {"color": colour(index), "width": 2, "dash": DASHES[index // COLOURS % len(DASHES)]},
        "marker": {"size": 6, "symbol": SYMBOLS[index % len(SYMBOLS)]},
    } | more


def band(x: list[Any], low: list[Any], high: list[Any], name: str, index: int) -> list[Trace]:
    """The area between two curves, which belongs to the curve of that name."""
    edge: Trace = {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": name,
    }
    return [edge | {"y": low}, edge | {"y": high, "fill": "tonexty", "fillcolor": f"{colour(index)}~"}]


def rule(at: float, text: str) -> dict[str, Any]:
    """A horizontal line across a figure with its meaning."""
    shape = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": at, "y1": at, "line": {"color": "@muted", "width": 1, "dash": "dash"}}
    note = {
        "xref": "paper",
        "x": 0.005,
        "xanchor": "left",
        "y": at,
        "yanchor": "bottom",
        "text": text,
        "showarrow": False,
        "font": {"color": "@muted", "size": 11},
    }
    return {"shapes": [shape], "annotations": [note]}
