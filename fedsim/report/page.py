"""F5. A page: sections of figures and tables in one self-contained file, with Plotly inlined once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from fedsim import __version__
from fedsim.report.figure import Figure


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        head: of the columns.
        rows: texts.
        bold: positions (row, column) that are bold.
        caption: above it.
        words: columns that hold words, not numbers (left-aligned).
        chips: for each row the number of the colour that stands before its first text; empty for none.
    """

    head: list[str]
    rows: list[list[str]]
    bold: frozenset[tuple[int, int]] = frozenset()
    caption: str = ""
    words: frozenset[int] = frozenset({0})
    chips: tuple[int, ...] = ()


@dataclass(frozen=True)
class Grid:
    """Rows of pictures under one another: the name of each, and its pictures as addresses that hold them."""

    rows: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Section:
    """A part of a page. One without content is left out."""

    title: str
    intro: str = ""
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    code: str = ""
    grid: Grid | None = None
    closed: bool = False  # folded up at first

    @property
    def empty(self) -> bool:
        return not (self.tables or self.figures or self.facts or self.code or self.grid)

    @property
    def anchor(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        kind: "Run" or "Study".
        title: its name.
        lead: what it is about, in a sentence.
        verdict: the outcome, in a sentence.
        tiles: the few numbers one wants first: label, value, remark.
        sections: the rest.
    """

    kind: str
    title: str
    lead: str
    verdict: str
    tiles: list[tuple[str, str, str]]
    sections: list[Section]

    def html(self) -> str:
        """The whole file."""
        sections = [s for s in self.sections if not s.empty]
        figures = [f.spec() for s in sections for f in s.figures]
        return (
            _template()
            .get_template("page.html")
            .render(
                page=self,
                sections=sections,
                specs=_for_script(figures),
                style=_text("style.css"),
                script=_text("page.js"),
                plotly=plotly_js(),
                version=__version__,
            )
        )


def plotly_js() -> str:
    """Plotly's script, from the installed package."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _for_script(value: Any) -> str:
    """JSON that may stand in a script element, whatever names it holds."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("fedsim.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _text(name: str) -> str:
    return (files("fedsim.report") / "templates" / name).read_text(encoding="utf-8")
