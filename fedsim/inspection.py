"""F5. `fedsim audit`: the update of a client in a round of a run or scenario, attacked, and the page of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsim import rng
from fedsim.audit import Attack, Audit, Seen, audit
from fedsim.bundle import find_scenario
from fedsim.document import InvalidScenario
from fedsim.errors import FedsimError, ScenarioError
from fedsim.folder import Folder, write_file
from fedsim.manifest import as_began
from fedsim.problem import Classification
from fedsim.replay import update_of
from fedsim.report import audit_page
from fedsim.scenario import load
from fedsim.steps import count_steps
from fedsim.world import build

AUDIT = 99
"""Folded after the seed of an attack's first guess."""


def inspect(
    target: str, assignments: tuple[str, ...], round: int, client: int | None, how: Attack, seed: int, output: Path | None
) -> tuple[Path, str, dict[str, Any], Audit]:
    """Audit an update. Returns the page, the scenario's name, what is to be said of the update and the attack, and the audit."""
    folder = Folder(Path(target)) if (Path(target) / "scenario.yaml").is_file() else None
    if folder is None and Path(target).is_dir():
        raise FedsimError(f"{target}: not a run folder (no scenario.yaml in it); name one, or a scenario")
    if folder is not None and assignments:
        raise FedsimError("--set changes what ran: audit the scenario file instead of the run folder, or leave it out")
    if folder is not None and (runtime := folder.manifest().get("runtime", "simulation")) != "simulation":
        raise FedsimError(
            f"{target}: this run's clients were in the runtime '{runtime}', so what they sent cannot be made again here; "
            f"audit its scenario in simulation instead: fedsim audit {folder.path / 'scenario.yaml'}"
        )
    scenario, document = load(folder.path / "scenario.yaml" if folder else find_scenario(target), assignments)
    try:
        world = build(as_began(scenario, folder.manifest()) if folder else scenario)
        if len(world.data.input_shape) != 3 or not isinstance(world.data.task, Classification):
            raise ScenarioError("data.source", "the audit reconstructs labelled pictures, and these are none; take, e.g., fashion-mnist")
        update = update_of(scenario, world, folder, round, client)
    except ScenarioError as error:
        raise InvalidScenario(document.explain(error)) from None
    seen = Seen(update.started, update.change, update.data.y)
    others = world.data.test_x if len(world.data.test_x) else world.data.x
    found = audit(update.problem, seen, update.data.x, others, how, rng.fold(seed, AUDIT))
    steps = int(count_steps(update.program, world.data.train.sizes[[update.client]])[0])
    facts = {
        "round": round,
        "client": update.client,
        "pictures": len(update.data.y),
        "program": type(update.program).registered_name,
        "local_steps": steps,
        "parameters_sent": update.change.size,
        "iterations": how.iterations,
        "seed": seed,
    }
    page = output or (folder.path if folder else Path("runs") / "audits" / scenario.name) / f"audit-{round}-{update.client}.html"
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_file(page, audit_page.render(scenario.name, facts, found).encode())
    except OSError as error:
        raise FedsimError(f"{page}: cannot be written: {error.strerror}; choose another --output") from None
    return page, scenario.name, facts, found
