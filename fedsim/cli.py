"""The command line: argument parsing, and what happens on errors and Ctrl-C. Everything slow to import is imported where it is used.

Exit codes: 0 done, 1 the run failed, 2 the scenario or the command is wrong, 130 interrupted (and resumable).
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsim.errors import FedsimError, ScenarioError, did_you_mean

if TYPE_CHECKING:
    from fedsim.document import Document
    from fedsim.folder import Folder

app = typer.Typer(
    help="Federated-learning simulation: one YAML scenario, any strategy, the same bits on any number of workers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ScenarioArgument = Annotated[str, typer.Argument(metavar="SCENARIO", help="A YAML file, or the name of a scenario that comes with fedsim.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="A line for every round; a traceback where something fails.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override a field: strategy.server_lr=0.5.")]


def main() -> None:
    """Entry point. Expected failures are messages on stderr, without a traceback."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a scenario may name functions of the user's own modules
    try:
        app()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


@contextmanager
def _explained(document: Document | None = None, verbose: bool = False) -> Iterator[None]:
    """Turn expected failures into a message and an exit code."""
    try:
        yield
    except FedsimError as error:
        if verbose:
            traceback.print_exc()
        _fail(document.explain(error) if document and isinstance(error, ScenarioError) else str(error), _code(error))


def _code(error: FedsimError) -> int:
    from fedsim.document import InvalidScenario

    return 2 if isinstance(error, (InvalidScenario, ScenarioError)) else 1


def _fail(message: str, code: int) -> None:
    for line in message.splitlines():
        print(f"error: {line}" if not line.startswith(" ") else line, file=sys.stderr)
    raise typer.Exit(code)


def _print_json(values: dict[str, Any]) -> None:
    print(json.dumps(values))


SIMULATIONS = ("simulation", "flower-simulation")


@app.command()
def run(
    scenario: Annotated[str | None, typer.Argument(metavar="[SCENARIO]", help="A YAML file, or the name of one that comes along.")] = None,
    set_: SetOption = None,
    output: Annotated[Path | None, typer.Option(help="The run folder. Default: runs/<name>/<time>.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Go on with the run in this folder.")] = None,
    runtime: Annotated[
        str, typer.Option(metavar="NAME", help="simulation, or flower-simulation: Flower's own, to compare.")
    ] = "simulation",
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a scenario, or resume one."""
    with _explained(verbose=verbose):
        if (scenario is None) == (resume is None):
            _fail("give either a SCENARIO to run, or --resume FOLDER", 2)
        if resume is not None and (set_ or output):
            _fail("--resume goes on with the scenario in the folder; --set and --output do not go with it", 2)
        if runtime not in SIMULATIONS:
            _fail(f"there is no runtime '{runtime}'{did_you_mean(runtime, SIMULATIONS)}; there are: {', '.join(SIMULATIONS)}", 2)
        if resume is not None and runtime != "simulation":
            _fail("Flower's simulation forgets what devices remember, so --resume does not go with it; run the scenario again", 2)
        from fedsim.bundle import find_scenario

        path = find_scenario(scenario) if scenario is not None else None
        from fedsim import session
        from fedsim.folder import Folder
        from fedsim.scenario import load

        folder = Folder.open(resume) if resume is not None else None
        parsed, document = load(path or (resume or Path()) / "scenario.yaml", tuple(set_ or ()))
        finished = folder is not None and folder.finished
        if not finished:
            with _explained(document, verbose):
                if folder is None:
                    world, folder = session.begin(parsed, output, runtime)
                else:
                    world = session.take_up(parsed, folder)
                flower = runtime == "flower-simulation"
                if code := (session.train_in_flower if flower else session.train)(parsed, world, folder, quiet or as_json, verbose):
                    raise typer.Exit(code)
        assert folder is not None
        _tell_run(folder, finished, as_json)


@app.command()
def deploy(
    scenario: Annotated[str | None, typer.Argument(metavar="[SCENARIO]", help="A YAML file, or the name of one that comes along.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the Flower app there, with a README of the commands.")] = None,
    local: Annotated[int | None, typer.Option(min=1, metavar="N", help="Run it here: a SuperLink and N SuperNodes on loopback.")] = None,
    set_: SetOption = None,
    output: Annotated[Path | None, typer.Option(help="With --local: the run folder. Default: runs/<name>/<time>.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="FOLDER", help="With --local: go on with the run in this folder.")] = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Bring a scenario to devices with Flower: write the app (--out), or run all of it on this machine (--local)."""
    with _explained(verbose=verbose):
        if (out is None) == (local is None):
            _fail("give either --out DIR, to write the app, or --local N, to run it here", 2)
        if (scenario is None) == (resume is None) or (resume is not None and (set_ or output)):
            _fail("give either a SCENARIO, or --resume FOLDER, which goes on with the scenario in the folder", 2)
        from fedsim import session
        from fedsim.bundle import find_scenario

        path = find_scenario(scenario) if scenario is not None else None
        from fedsim.flower.bundle import write_app
        from fedsim.flower.deploy import deploy_locally
        from fedsim.folder import Folder
        from fedsim.scenario import load

        parsed, document = load(path or (resume or Path()) / "scenario.yaml", tuple(set_ or ()))
        with _explained(document, verbose):
            if out is not None:
                print(f"Flower app: {write_app(parsed, out)}; {out / 'README.md'} says how to run it")
                return
            folder = Folder.open(resume) if resume is not None else Folder.create(output, parsed.name)
            finished = folder.finished
            if resume is not None and not finished:
                session.same_runtime(folder, "flower")
            if not finished and (code := deploy_locally(parsed, folder, local or 1, resume is not None, quiet or as_json, verbose)):
                raise typer.Exit(code)
            _tell_run(folder, finished, as_json)


def _tell_run(folder: Folder, finished: bool, as_json: bool) -> None:
    """The result of a run."""
    from fedsim.console import headline, report, terminal

    rows = folder.rows()
    name = headline(rows[-1])
    if as_json:
        _print_json({"folder": str(folder.path), "metric": name, "value": rows[-1].get(name) if name else None, "last": rows[-1]})
        return
    report(terminal(), rows)
    if finished:
        print(f"This run is finished: {folder.path}")
        return
    if name:
        print(f"Final {name}: {rows[-1][name]:.4f}")
    print(f"Run folder: {folder.path}")


@app.command()
def compare(
    study: Annotated[str, typer.Argument(metavar="STUDY|SCENARIO", help="A study, or with --strategies a scenario: a file or a name.")],
    strategies: Annotated[str | None, typer.Option(metavar="A,B,...", help="Strategies to compare.")] = None,
    seeds: Annotated[str | None, typer.Option(metavar="N", help="How many seeds, or which: '[3, 7]'.")] = None,
    over: Annotated[list[str] | None, typer.Option(metavar="FIELD=V1,V2", help="Vary a field; may be repeated.")] = None,
    baseline: Annotated[str | None, typer.Option(metavar="LABEL", help="What the others are compared with. Default: the first.")] = None,
    target: Annotated[str | None, typer.Option(metavar="VALUE", help="Report rounds and bytes to this value of the metric.")] = None,
    set_: SetOption = None,
    output: Annotated[Path | None, typer.Option(help="The study folder. Default: runs/studies/<name>. Goes on where it was left.")] = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a study: strategies x seeds x settings, paired; then write its report. Finished cells are kept."""
    with _explained(verbose=verbose):
        from fedsim.bundle import find

        path = find(study)
        from fedsim import session
        from fedsim.grid import load_study
        from fedsim.study import options

        plan = load_study(path, options(strategies, seeds, over or [], baseline, target), tuple(set_ or ()))
        folder = output or Path("runs") / "studies" / plan.study.study
        if code := session.compare(plan, folder, quiet or as_json, verbose):
            raise typer.Exit(code)
        failed = _tell_study(folder, as_json)
        if failed:
            raise typer.Exit(1)


def _tell_study(folder: Path, as_json: bool) -> int:
    """The result of a study, and its report. Returns how many cells failed."""
    from fedsim.report import comparison, tables, write_report
    from fedsim.results import read_study

    results = read_study(folder)
    page = write_report(folder)
    if as_json:
        _print_json(comparison.as_json(results) | {"folder": str(folder), "report": str(page)})
    else:
        from fedsim.console import terminal

        tables.tell(terminal(), results)
        print(f"Report: {page}")
    return results.count("failed")


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN|STUDY...", help="Run folders and study folders.")],
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="The page of a single folder. Default: report.html in it.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write report.html (self-contained, works offline) and tables (CSV, Markdown, LaTeX) into each folder."""
    with _explained():
        if output is not None and len(folders) > 1:
            _fail("--output names the page of one folder; leave it out to write a page into each", 2)
        from fedsim.report import write_report
        from fedsim.results import is_run, is_study_folder

        if wrong := [folder for folder in folders if not (is_run(folder) or is_study_folder(folder))]:  # before any page is written
            what = "no such folder" if not wrong[0].is_dir() else "neither a run folder (scenario.yaml) nor a study folder (study.yaml)"
            _fail(f"{wrong[0]}: {what}", 2)
        pages = [write_report(folder, output) for folder in folders]
        if as_json:
            _print_json({"reports": [str(page) for page in pages]})
        else:
            print(*(f"Report: {page}" for page in pages), sep="\n")


@app.command()
def audit(
    target: Annotated[str, typer.Argument(metavar="RUN|SCENARIO", help="A run folder, or a scenario: a file or a name.")],
    round_: Annotated[int, typer.Option("--round", metavar="R", help="The round, from 1.")] = 1,
    client: Annotated[int | None, typer.Option(metavar="ID", help="The client. Default: the first that took part in the round.")] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Steps of each attack.")] = 1000,
    lr: Annotated[float, typer.Option(min=1e-9, help="Rate of the pictures.")] = 0.1,
    a_lr: Annotated[float, typer.Option(min=1e-9, help="Rate of the surrogate's place a.")] = 1e-3,
    start: Annotated[float, typer.Option(min=0, max=1, help="a at first: 0 is the first model, 1 the client's.")] = 0.5,
    tv: Annotated[float, typer.Option(min=0, help="Weight of the total variation.")] = 0.01,
    seed: Annotated[int, typer.Option(min=0, help="Of the attacks' first guess.")] = 0,
    set_: SetOption = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="The page. Default: in the run folder, or runs/audits.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Attack one client's update: reconstruct its pictures (SME and gradient inversion), and write a page that shows them."""
    with _explained():
        from fedsim import inspection
        from fedsim.audit import Attack

        how = Attack(iterations, lr, a_lr, tv, start)
        page, name, facts, found = inspection.inspect(target, tuple(set_ or ()), round_, client, how, seed, output)
        if as_json:
            _print_json({"page": str(page), "of": name} | facts | {"methods": found.figures()})
            return
        from fedsim.console import plain_table, terminal
        from fedsim.report.audit_page import table, verdict

        figures = found.figures()
        plain_table(terminal(), *table(figures))
        print(verdict(figures))
        print(f"Page: {page}")


@app.command()
def watch(
    runs: Annotated[Path, typer.Argument(metavar="[RUNS]", help="The folder to look for runs in.")] = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8377,
) -> None:
    """Serve a page on 127.0.0.1 that follows the runs in a folder. It only reads."""
    with _explained():
        from fedsim.watch import serve

        serve(runs, port)


@app.command()
def show(
    scenario: ScenarioArgument,
    set_: SetOption = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the partition into this .png, .svg or .pdf.")] = None,
) -> None:
    """Print what would run: clients, skew of the partition, parameters, bytes and steps of a round."""
    with _explained():
        from fedsim.bundle import find_scenario

        path = find_scenario(scenario)
        from fedsim import console, overview
        from fedsim.scenario import load
        from fedsim.world import build

        parsed, document = load(path, tuple(set_ or ()))
        with _explained(document):
            world = build(parsed)
            console.overview(console.terminal(), overview.facts(parsed, world), *overview.skew(world))
            if plot is not None:
                overview.draw(world, plot)
                print(f"Partition drawn in {plot}")


KINDS = (
    *("strategies", "programs", "schedules", "models", "data", "partitions"),
    *("participation", "rates", "modulations", "paces", "scores", "targets", "trackers", "scenarios", "studies"),
)


@app.command(name="list")
def list_(kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help=f"One of: {', '.join(KINDS)}. Default: all.")] = None) -> None:
    """Print the catalogue: what a scenario can name, in one line each."""
    with _explained():
        if kind is not None and kind not in KINDS:
            _fail(f"there is no catalogue of '{kind}'{did_you_mean(kind, KINDS)}; there are: {', '.join(KINDS)}", 2)
        from fedsim.console import terminal
        from fedsim.overview import catalogue

        console = terminal()
        for name in KINDS if kind is None else (kind,):
            entries = catalogue(name)
            if kind is None:
                console.print(f"\n[bold]{name}[/bold]")
            width = max((len(entry) for entry, _ in entries), default=0)
            for entry, line in entries:
                console.print(f"  {entry:<{width}}  {line}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def schema(of: Annotated[str, typer.Argument(metavar="[scenario|study]", help="Of which kind of file.")] = "scenario") -> None:
    """Print the JSON Schema of scenarios, or of studies, for editors."""
    with _explained():
        if of not in {"scenario", "study"}:
            _fail(f"there is no schema of '{of}'{did_you_mean(of, ['scenario', 'study'])}; there are: scenario, study", 2)
        from fedsim.scenario import schema as scenario_schema
        from fedsim.study import study_schema

        print(json.dumps(scenario_schema() if of == "scenario" else study_schema(), indent=2))


@app.command()
def version() -> None:
    """Print the version."""
    from fedsim import __version__

    print(__version__)


if __name__ == "__main__":
    main()
