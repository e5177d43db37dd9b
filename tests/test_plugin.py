"""What the README says about a strategy of one's own, done to the letter: an outside package, a study, its report."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def block(language: str) -> str:
    """The first fenced block of a language in the README's section on strategies of one's own."""
    section = README.read_text().split("\n## Add a strategy\n", 1)[1].split("\n## ", 1)[0]
    return re.search(rf"```{language}\n(.*?)```", section, re.DOTALL).group(1)


def install(folder: Path) -> None:
    """What pip would leave in site-packages of the package that the README describes."""
    points = tomllib.loads(block("toml"))["project"]["entry-points"]["fedsim.strategies"]
    (module,) = points.values()
    (folder / f"{module}.py").write_text(block("python"))
    info = folder / f"{module}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[fedsim.strategies]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))


def fedsim(folder: Path, *arguments: str) -> str:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(README.parent)])}
    command = [sys.executable, "-m", "fedsim.cli", *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_strategy_of_an_outside_package_runs_in_a_study_and_is_in_its_report(tmp_path):
    install(tmp_path)
    assert "plain-mean" in fedsim(tmp_path, "list", "strategies")
    (tmp_path / "mine.yaml").write_text(block("yaml"))
    fedsim(tmp_path, "compare", "mine.yaml", "--set", "rounds=3", "--output", "study")
    page, table = (tmp_path / "study" / "report.html").read_text(), (tmp_path / "study" / "table.csv").read_text()
    assert "plain-mean" in page
    assert "plain-mean" in table
    assert len(list((tmp_path / "study").rglob("model.safetensors"))) == 4  # two strategies, two seeds
