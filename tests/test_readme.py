"""What the READMEs say of the catalogue is what there is. `python -m tests.test_readme` brings it up to date."""

from pathlib import Path

from fedsim.bundle import bundled, bundled_studies
from fedsim.registry import first_line
from fedsim.scenario import load_plugins
from fedsim.strategy import Strategy, WeightedStrategy

ROOT = Path(__file__).parents[1]
README, CATALOGUE = ROOT / "README.md", ROOT / "strategies" / "README.md"
BEGIN, END = "<!-- strategies: made by `python -m tests.test_readme` -->\n", "<!-- end -->\n"


def table() -> str:
    """A row for each strategy of this project: its name, what it does, its paces, and what travels to the server."""
    load_plugins()
    ours = {name: cls for name, cls in sorted(Strategy.choices.items()) if cls.__module__.startswith("strategies.")}
    papers = {name.removeprefix("papers/") for name in bundled()}
    rows = ["| name | what it does | paces | workers send |", "|---|---|---|---|"]
    for name, cls in ours.items():
        label = f"[{name}](../scenarios/papers/{name}.yaml)" if name in papers else name
        sends = "a sum a chunk" if issubclass(cls, WeightedStrategy) else "every update"
        paces = ", ".join(sorted(cls.paces, reverse=True)) if isinstance(cls.paces, frozenset) else "those of what is inside"
        rows.append(f"| {label} | {first_line(cls)} | {paces} | {sends} |")
    return "\n".join(rows) + "\n"


def parts() -> tuple[str, str, str]:
    """The catalogue before the table, the table, and the rest."""
    before, rest = CATALOGUE.read_text().split(BEGIN)
    inside, after = rest.split(END, 1)
    return before, inside, after


def test_the_table_of_strategies_is_current() -> None:
    assert parts()[1] == table()


def test_every_study_is_listed() -> None:
    text = README.read_text()
    assert [name for name in bundled_studies() if f"(scenarios/{name}.yaml)" not in text] == []


def test_it_is_not_too_long() -> None:
    assert len(README.read_text().splitlines()) <= 350


if __name__ == "__main__":
    before, _, after = parts()
    CATALOGUE.write_text(before + BEGIN + table() + END + after)
