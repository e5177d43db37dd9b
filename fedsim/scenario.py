"""F5. The scenario: from YAML to one typed, frozen value, validated once at the door.

YAML is constructor calls: `strategy: {name: fedavg, server_lr: 0.5}` is `FedAvg(server_lr=0.5)`. Validation is pydantic over the very
dataclasses that do the work. Whatever is wrong is refused here, before anything starts, with file, line, field and the allowed values.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema

import fedsim.local
import fedsim.private  # noqa: F401  (registers programs)
from fedsim import trackers
from fedsim.conformal import ConformalStrategy, Target
from fedsim.data import Data
from fedsim.document import Document, Path_, parse
from fedsim.errors import FedsimError, ScenarioError
from fedsim.fleet import Fleet, Participation
from fedsim.models import Model
from fedsim.pace import Pace, Sync
from fedsim.privacy import Accountant, Protection
from fedsim.registry import dump, section
from fedsim.strategy import LocalProgram, Strategy
from fedsim.types import Precision
from fedsim.wording import explain
from fedsim.wrapper import Wrapper


@section
@dataclass(frozen=True)
class Phase:
    """A strategy and for how many rounds it runs. It starts from the model that the phase before it deployed.

    Where both keep a part of the model on the clients (fedalt, local-only, ...), clients come with what they kept.

    adapt: of a model with adapters, whether they are what is trained; false = all weights are, and adapters come later.
    participation: who is available in this phase, where that is not as in the fleet's: `full` lets a last fine-tuning reach everybody.
    """

    strategy: Strategy
    rounds: Annotated[int, Gt(0)]
    adapt: bool = True
    participation: Participation | None = None


@section
@dataclass(frozen=True)
class Evaluate:
    """When and on what the deployed model is measured.

    every: rounds between evaluations (the first model and the last of each phase are always evaluated).
    clients: also on every client's own test data (`data.client_test`), with spread over clients.
    classes: also the accuracy of each class (classification only).
    batch: examples at a time.
    target: a label law under which the coverage of prediction sets is measured, too; that of one client: on its own test data.
    """

    every: Annotated[int, Gt(0)] = 1
    clients: bool = False
    classes: bool = False
    batch: Annotated[int, Gt(0)] = 2000
    target: Target | None = None


@section
@dataclass(frozen=True)
class Engine:
    """How the work is executed. `workers` never changes the answer; the other fields may change its last bits.

    workers: 0 = in this process, N = N Ray actors, auto = by the amount of work.
    chunk: clients that train as one program, or auto.
    device: cpu, cuda, or auto: cuda where there is one.
    dtype: of parameters and inputs.
    precision: of products of float32 on a GPU, in PyTorch's words: highest = float32; high = TF32, three digits; medium = bfloat16.
    mode: loop = one client after the other, vmap = a chunk stacked, auto = by model and device.
    compile: whether every program's step is compiled (torch.compile; on a GPU with CUDA graphs). Starting takes up to a minute longer, so
        it pays in long runs of programs that are not plain gradient descent. On a GPU, plain descent along a chain of layers is recorded as
        a CUDA graph instead, at once and with the same bits.
    threads: of each worker.
    address: of a running Ray cluster to join; null starts Ray on this machine.
    retries: how often a chunk goes to another worker after its worker died, hung or raised.
    timeout: seconds after which a worker that is still busy with a chunk counts as hung; null = never.
    on_failure: what a chunk means that failed too often: stop = the run ends, resumable; lose = its clients are counted as lost.
    """

    workers: Annotated[int, Ge(0), Le(1024)] | Literal["auto"] = "auto"
    chunk: Annotated[int, Gt(0)] | Literal["auto"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    precision: Precision = "highest"
    mode: Literal["auto", "loop", "vmap"] = "auto"
    compile: bool = False
    threads: Annotated[int, Gt(0), Le(1024)] = 1
    address: str | None = None
    retries: Annotated[int, Ge(0)] = 3
    timeout: Annotated[float, Gt(0)] | None = None
    on_failure: Literal["stop", "lose"] = "stop"


@section
@dataclass(frozen=True)
class Privacy:
    """How privacy is accounted for, where a program or a strategy protects somebody.

    delta: of (epsilon, delta); null = 1 / n^1.1, for n examples or clients.
    target_epsilon: every `noise` that is null becomes the least with which the whole run costs at most this.
    budget: the run ends before epsilon passes it; null = target_epsilon, where there is one.
    accountant: rdp = Renyi divergences; pld = privacy loss distributions, tighter and slower.
    """

    delta: Annotated[float, Gt(0), Lt(1)] | None = None
    target_epsilon: Annotated[float, Gt(0)] | None = None
    budget: Annotated[float, Gt(0)] | None = None
    accountant: Accountant = "rdp"


@section
@dataclass(frozen=True)
class Output:
    """What a run leaves behind.

    folder: where, or null for runs/<name>/<time>.
    checkpoint: rounds between checkpoints.
    keep: how many checkpoints to keep.
    trackers: other programs that are told of every round: tensorboard, mlflow, wandb, or a package's own.
    """

    folder: str | None = None
    checkpoint: Annotated[int, Gt(0)] = 10
    keep: Annotated[int, Gt(0)] = 2
    trackers: tuple[str, ...] = ()


@section
@dataclass(frozen=True)
class Scenario:
    """A complete experiment: data, model, fleet, pace, and either one `strategy` for `rounds`, or `phases`."""

    name: Annotated[str, MinLen(1)]
    data: Data
    model: Model
    strategy: Strategy | None = None
    rounds: Annotated[int, Gt(0)] | None = None
    phases: tuple[Phase, ...] | None = None
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    fleet: Fleet = field(default_factory=Fleet)
    pace: Pace = field(default_factory=Sync)
    evaluate: Evaluate = field(default_factory=Evaluate)
    privacy: Privacy = field(default_factory=Privacy)
    engine: Engine = field(default_factory=Engine)
    output: Output = field(default_factory=Output)

    def stages(self) -> tuple[Phase, ...]:
        """What runs, in order: the phases, or the one strategy as a phase."""
        if self.phases is not None:
            return self.phases
        assert self.strategy is not None
        assert self.rounds is not None  # `faults` has seen to it
        return (Phase(self.strategy, self.rounds),)

    def fleet_of(self, stage: Phase) -> Fleet:
        """The fleet in a phase."""
        return self.fleet if stage.participation is None else replace(self.fleet, participation=stage.participation)


def faults(scenario: Scenario) -> Iterator[ScenarioError]:
    """The combinations that no single field can see to be wrong."""
    name = scenario.name
    if not name.isprintable() or any(c in name for c in "/\\") or name.startswith(".") or len(name.encode()) > 200:
        yield ScenarioError("name", "names the folder of a run: at most 200 bytes, without slashes, leading dots and control characters")
    if scenario.evaluate.clients and not scenario.data.client_test:
        yield ScenarioError("evaluate.clients", "needs client test data; set data.client_test, e.g. to 0.2")
    if scenario.data.calibration and not scenario.data.client_test:
        yield ScenarioError(
            "data.calibration", "is a part of each client's test data, and there are none; set data.client_test, e.g. to 0.4"
        )
    if scenario.engine.address is not None and scenario.engine.workers in (0, "auto"):
        yield ScenarioError("engine.workers", "engine.address joins a Ray cluster: say how many workers to start there")
    yield from trackers.faults(scenario.output.trackers)
    if scenario.phases or scenario.strategy is not None:
        yield from _unaccountable(scenario)
    if scenario.phases is None:
        if scenario.strategy is None:
            yield ScenarioError("strategy", f"is required (or `phases`); there are: {', '.join(sorted(Strategy.choices))}")
        else:
            yield from _misfits(scenario.strategy, scenario, "strategy", first=True)
        if scenario.rounds is None:
            yield ScenarioError("rounds", "is required (or `phases`), e.g. rounds: 100")
        return
    if scenario.strategy is not None or scenario.rounds is not None:
        yield ScenarioError("phases", "give either `phases`, or `strategy` and `rounds`, not both")
    if not scenario.phases:
        yield ScenarioError("phases", "is empty; a scenario trains for at least one phase")
    for i, phase in enumerate(scenario.phases):
        yield from _misfits(phase.strategy, scenario, f"phases.{i}.strategy", first=i == 0)


def _misfits(strategy: Strategy, scenario: Scenario, where: str, first: bool) -> Iterator[ScenarioError]:
    name = type(strategy).registered_name
    if scenario.pace.paced not in strategy.paces:
        allowed = ", ".join(sorted(strategy.paces))
        yield ScenarioError(where, f"{name} does not run at the pace '{scenario.pace.paced}'; it declares: {allowed}")
    if "proxy" in strategy.needs and scenario.data.proxy is None:
        yield ScenarioError(where, f"{name} needs proxy data on the server; add data.proxy, e.g. {{source: train, size: 200}}")
    program, below = type(strategy.local), strategy
    while isinstance(below, Wrapper):  # the program is a field of the innermost
        below, where = below.inner, f"{where}.inner"
    if not _fits(program, strategy):
        fitting = sorted(n for n, p in LocalProgram.choices.items() if _fits(p, strategy))
        yield ScenarioError(f"{where}.local", f"{program.registered_name} does not run under {name}; these do: {', '.join(fitting)}")
    if "calibration" in strategy.needs and not scenario.data.calibration:
        yield ScenarioError(
            where,
            f"{name} needs calibration data; set data.client_test, e.g. to 0.4, and data.calibration, the share of it that calibrates",
        )
    if first and isinstance(strategy, ConformalStrategy):
        example = f"phases: [{{strategy: fedavg, rounds: 50}}, {{strategy: {name}, rounds: 1}}]"
        yield ScenarioError(where, f"{name} calibrates the model of an earlier phase, and there is none; e.g. {example}")
    if "adapters" in strategy.needs and scenario.model.adapt is None:
        yield ScenarioError(where, f"{name} trains adapters; add model.adapt, e.g. {{name: lora, rank: 8}}")


def _fits(program: type[LocalProgram], strategy: Strategy) -> bool:
    """Whether a program knows what to do with a strategy's messages, and finds in memory what it needs."""
    return program.receives is strategy.sends and (strategy.personal or not program.remembers)


def _unaccountable(scenario: Scenario) -> Iterator[ScenarioError]:
    """Noise that nobody sets, and targets that nothing can meet."""
    found = [(i, p) for i, stage in enumerate(scenario.phases or ()) for p in _protections(stage.strategy)]
    if scenario.strategy is not None:
        found += [(-1, p) for p in _protections(scenario.strategy)]
    open_ = [i for i, p in found if p.noise is None]
    if open_ and scenario.privacy.target_epsilon is None:
        where = "strategy" if open_[0] < 0 else f"phases.{open_[0]}.strategy"
        yield ScenarioError(where, "its `noise` is left open; set it, or set privacy.target_epsilon, which solves for it")
    for field_ in ("target_epsilon", "budget"):
        if getattr(scenario.privacy, field_) is not None and not found:
            reason = "clipping or noise without a bounded sensitivity has no epsilon; take local: dp-sgd or dp-adam, or the strategy dp"
            yield ScenarioError(f"privacy.{field_}", f"nothing in this scenario protects examples or clients: {reason}")
    if scenario.privacy.target_epsilon is not None and found and not open_:
        yield ScenarioError("privacy.target_epsilon", "solves for `noise`, but every `noise` is given; set those to null, or use `budget`")


def _protections(strategy: Strategy) -> list[Protection]:
    return [p for p in (strategy.protects(), strategy.local.protects()) if p is not None]


def load_plugins() -> None:
    """Import every package (with its modules) under the entry-point group `fedsim.strategies`."""
    for point in entry_points(group="fedsim.strategies"):
        try:
            package = importlib.import_module(point.value)
            for module in pkgutil.iter_modules(getattr(package, "__path__", [])):
                importlib.import_module(f"{package.__name__}.{module.name}")
        except ImportError as error:
            raise FedsimError(f"the strategy package '{point.value}' (entry point '{point.name}') does not import: {error}") from error


@cache
def adapter() -> TypeAdapter[Scenario]:
    """The validator of scenarios, over everything that is registered."""
    load_plugins()
    return TypeAdapter(Scenario)


def load(path: Path, assignments: tuple[str, ...] = ()) -> tuple[Scenario, Document]:
    """Read, override (`section.field=value`) and validate a scenario. Raises `InvalidScenario` with everything that is wrong."""
    document = parse(path)
    document.values.setdefault("name", path.stem)
    for assignment in assignments:
        document.set(assignment)
    return validate(document), document


def validate(document: Document) -> Scenario:
    """The scenario in a document."""
    problems: dict[Path_, str] = {}
    try:
        scenario = adapter().validate_json(json.dumps(document.values), strict=True)
        for fault in faults(scenario):
            problems.setdefault(document.locate(fault), fault.message)
    except ValidationError as error:
        problems = explain(Scenario, document.values, error)
    except ScenarioError as error:  # a dataclass that knows its place
        problems = {document.locate(error): error.message}
    document.refuse(problems)
    return scenario


def dump_scenario(scenario: Scenario) -> dict[str, Any]:
    """`dump`, in the order people write, without the alternatives that were not taken."""
    values = dump(scenario)
    for absent in ("strategy", "rounds", "phases"):
        if values[absent] is None:
            del values[absent]
    first = [k for k in ("name", "seed", "data", "model", "fleet", "pace", "strategy", "rounds", "phases") if k in values]
    return {k: values[k] for k in [*first, *(k for k in values if k not in first)]}


class _Schema(GenerateJsonSchema):
    """Prints the defaults of nested choices as a scenario would write them."""

    def encode_default(self, dft: Any) -> Any:
        return super().encode_default(dump(dft))


def schema() -> dict[str, Any]:
    """JSON Schema of a scenario, for editors. A bare name is short for `{name: ...}`; a scenario without a name has that of its file."""
    out = {"$schema": _Schema.schema_dialect} | adapter().json_schema(schema_generator=_Schema)
    out["required"] = [name for name in out["required"] if name != "name"]
    return out
