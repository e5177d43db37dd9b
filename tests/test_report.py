"""Reports as files: complete in themselves, nothing in them without data behind it, and honest where a run was cut short."""

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fedsim.cli import app
from fedsim.compare import compare
from fedsim.errors import FedsimError
from fedsim.grid import load_study
from fedsim.report import render, tables, write_report
from fedsim.report.comparison import Comparison
from fedsim.report.formats import number
from fedsim.report.page import plotly_js
from fedsim.results import read_study

FAST = ("--set", "rounds=4", "--set", "evaluate.every=2", "--quiet")
NASTY = "<script>alert(1)<b>&\"'"
STUDY = """\
study: small
asks: Does <b>anything</b> here differ?
scenario: quickstart
strategies: {"@c0 50 % & <script>": fedavg, "a|b_c": {name: fedavg, server_lr: 0.01}}
seeds: 3
set: {rounds: 4, evaluate.every: 2}
target: 0.2
"""


def fedsim(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that quickstart evaluates, and a name that is a trap."""
    folder = tmp_path_factory.mktemp("run") / "one"
    result = fedsim("run", "quickstart", *FAST, "--output", folder)
    assert result.exit_code == 0, result.output
    scenario = folder / "scenario.yaml"
    scenario.write_text(re.sub(r"^name: .*$", "name: " + json.dumps(NASTY), scenario.read_text(), count=1, flags=re.MULTILINE))
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with labels that are traps for HTML, Markdown and LaTeX."""
    here = tmp_path_factory.mktemp("study")
    (here / "it.yaml").write_text(STUDY)
    for _ in compare(load_study(here / "it.yaml", {}), here / "study"):
        pass
    return here / "study"


def copy_of(one: Path, to: Path) -> Path:
    shutil.copytree(one, to)
    return to


def page_of(folder: Path) -> str:
    """The page without Plotly's own script, which has links in its comments."""
    return render(folder)[0].replace(plotly_js(), "")


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="([^"]+)"', page)


def specs(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return list(json.loads(found[1]))


# Complete in itself


@pytest.mark.parametrize("kind", ["one", "study"])
def test_a_page_needs_no_other_file(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    whole, page = render(folder)[0], page_of(folder)
    assert whole.count(plotly_js()) == 1
    assert not re.search(r"https?://", page)
    assert not re.search(r"<script[^>]+src=|@import|url\(|\bfetch\(|XMLHttpRequest|WebSocket|<iframe|<base|<form", page)
    assert re.findall(r"<link [^>]*>", page) == ['<link rel="icon" href="data:,">']
    assert all(target.startswith("#") for target in re.findall(r'<a href="([^"]*)"', page))
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'")
    assert "connect-src" not in policy
    assert page.count("data-figure=") == len(specs(page)) > 3


def test_a_page_says_the_same_every_time(one: Path, study: Path) -> None:
    assert render(one) == render(one)
    assert render(study) == render(study)


def test_names_are_text_and_never_markup(one: Path, study: Path) -> None:
    page = page_of(one)
    assert "<h1>&lt;script&gt;alert(1)&lt;b&gt;&amp;&#34;&#39;</h1>" in page
    assert "<script>alert" not in page
    page = page_of(study)
    assert "Does &lt;b&gt;anything&lt;/b&gt; here differ?" in page
    assert '<i class="chip c0"></i>@c0 50 % &amp; &lt;script&gt;</td>' in page
    assert page.count("<script") == 3  # data, Plotly's place, the page's own
    assert any(trace.get("name") == "@c0 50 % & <script>" for spec in specs(page) for trace in spec["data"])


# What has no data does not appear


def test_a_run_has_the_sections_it_has_data_for(one: Path) -> None:
    assert sections(page_of(one)) == ["curves", "participation", "clients", "cost", "how-to-reproduce", "resolved-scenario"]


def test_a_run_with_more_data_has_more_sections(one: Path, tmp_path: Path) -> None:
    folder = copy_of(one, tmp_path / "more")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows[1:]:
        row |= {"privacy.epsilon": 0.5 * row["round"], "coverage.mean": 0.9, "server.step": 1.0, "time": 10.0 * row["round"]}
    rows[2] |= {"rejected": 1, "rejected_clients": {"7": "a value that is not finite"}}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "scores.jsonl").unlink()
    page = page_of(folder)
    assert {"privacy-budget", "coverage", "faults-and-rejections", "what-the-strategy-reports"} <= set(sections(page))
    assert "a value that is not finite" in page
    assert "<b>Virtual time</b>" in page
    assert "Clients after round" not in page, "each client's own scores are gone"


def test_a_study_has_the_sections_it_has_data_for(study: Path) -> None:
    found = sections(page_of(study))
    assert found[:4] == ["results", "differences", "curves", "what-it-costs"]
    assert not {"sweeps", "tuning", "failures", "every-pair"} & set(found), "one setting, two strategies, nothing tuned, nothing failed"


# The formats


def test_the_formats_agree(study: Path) -> None:
    results = read_study(study)
    texts = tables.of_study(results)
    rows = list(csv.DictReader(io.StringIO(texts["table.csv"])))
    assert [row["strategy"] for row in rows] == results.labels
    markdown = [line for line in texts["table.md"].splitlines() if line.startswith("| ") and "---" not in line]
    latex = [line for line in texts["table.tex"].splitlines() if line.endswith(r"\\")]
    assert len(markdown) == len(latex) == len(rows) + 1
    page = page_of(study)
    for row, md, tex, line in zip(rows, markdown[1:], latex[1:], Comparison(results).lines, strict=True):
        assert line.score is not None
        assert float(row["score_mean"]) == line.score.mean
        assert row["verdict"] == line.verdict
        shown = number(line.score.mean)
        assert all(f"{shown} " in text for text in (md, tex, page))
        assert ("(worse)" in md) == ("(worse)" in tex) == (line.verdict == "worse")
    cells = list(csv.DictReader(io.StringIO(texts["cells.csv"])))
    for label, row in zip(results.labels, rows, strict=True):
        values = [float(cell["test.accuracy"]) for cell in cells if cell["strategy"] == label]
        assert sum(values) / len(values) == pytest.approx(float(row["score_mean"]))


def test_names_do_not_break_tables(study: Path) -> None:
    texts = tables.of_study(read_study(study))
    assert r"| a\|b_c |" in texts["table.md"]
    assert "| @c0 50 % & &lt;script> |" in texts["table.md"]
    assert r"@c0 50 \% \& $<$script$>$ &" in texts["table.tex"]
    assert r"a|b\_c &" in texts["table.tex"]
    heads = {len(re.findall(r"(?<!\\)\|", line)) for line in texts["table.md"].splitlines() if line.startswith("|")}
    assert len(heads) == 1, "every row has as many cells"


def test_a_runs_table_has_its_rows(one: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(render(one)[1]["metrics.csv"])))
    assert [row["round"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert [bool(row["test.accuracy"]) for row in rows] == [True, False, True, False, True]


# Runs that were cut short


def unfinished(one: Path, to: Path, keep: int) -> Path:
    """The run as if it had been killed after `keep` rows, in the middle of a line."""
    folder = copy_of(one, to)
    (folder / "model.safetensors").unlink()
    for log in ("metrics", "clients", "scores", "timings"):
        lines = (folder / f"{log}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{log}.jsonl").write_text("".join(lines[:keep]) + '{"round": 3, "tor')
    return folder


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_an_unfinished_run_has_a_report(one: Path, tmp_path: Path, keep: int) -> None:
    folder = unfinished(one, tmp_path / "cut", keep)
    page = page_of(folder)
    assert f"This run is not finished: {max(0, keep - 1)} of 4 rounds so far." in page
    assert f"fedsim run --resume {folder}" in page
    assert ("curves" in sections(page)) == (keep > 0)


def test_a_run_that_was_never_evaluated_has_a_report(one: Path, tmp_path: Path) -> None:
    folder = copy_of(one, tmp_path / "blind")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith(("test.", "clients."))} for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "scores.jsonl").unlink()
    page = page_of(folder)
    assert sections(page)[:3] == ["curves", "participation", "cost"]
    assert "test accuracy" not in page


def test_a_run_that_failed_before_it_began_has_a_report(one: Path, tmp_path: Path) -> None:
    (tmp_path / "scenario.yaml").write_bytes((one / "scenario.yaml").read_bytes())
    (tmp_path / "failure.json").write_text(json.dumps({"reason": "ValueError: <no> data", "trace": ""}))
    assert "This run failed: ValueError: &lt;no&gt; data" in page_of(tmp_path)


def test_a_study_at_half_time_has_a_report(study: Path, tmp_path: Path) -> None:
    folder = copy_of(study, tmp_path / "half")
    places = [cell.place for cell in read_study(folder).cells]
    for place in places[2:]:
        shutil.rmtree(folder / place)
    page = page_of(folder)
    assert "finished, of 6" in page
    assert "One seed says nothing about noise" in page
    for place in places[:2]:
        shutil.rmtree(folder / place)
    assert "No run is finished yet." in page_of(folder)


# The command


def test_report_writes_page_and_tables(one: Path, study: Path, tmp_path: Path) -> None:
    run, whole = copy_of(one, tmp_path / "run"), copy_of(study, tmp_path / "study")
    result = fedsim("report", run, whole)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [f"Report: {run}/report.html", f"Report: {whole}/report.html"]
    assert (run / "metrics.csv").is_file()
    assert all((whole / name).is_file() for name in ("table.csv", "cells.csv", "table.md", "table.tex"))
    before = (run / "metrics.jsonl").read_bytes()
    told = fedsim("report", run, "--output", tmp_path / "page.html", "--json")
    assert json.loads(told.stdout) == {"reports": [str(tmp_path / "page.html")]}
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(("name", "why"), [("none", "no such folder"), ("empty", "neither a run folder (scenario.yaml) nor a study")])
def test_what_is_no_folder_of_ours_is_refused(one: Path, tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "empty").mkdir()
    run = copy_of(one, tmp_path / "run")
    result = fedsim("report", run, tmp_path / name)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {tmp_path / name}: {why}")
    assert not (run / "report.html").exists(), "all folders are looked at before any page is written"


def test_a_log_that_is_damaged_in_the_middle_is_named(one: Path, tmp_path: Path) -> None:
    folder = copy_of(one, tmp_path / "damaged")
    with open(folder / "metrics.jsonl", "a") as log:
        log.write("{damaged}\n")
    with pytest.raises(FedsimError, match=r"damaged/metrics\.jsonl: cannot be read: "):
        write_report(folder)
    assert fedsim("report", folder).exit_code == 1
