"""F5. The update of one client in one round of a run, made again: a run is a function of its scenario, so nothing has to be recorded.

A run folder's last checkpoint before the round is taken up where there is one; else the rounds before are run once more.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsim.errors import FedsimError
from fedsim.experiment import train
from fedsim.folder import Folder
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.scenario import Evaluate, Scenario
from fedsim.sim.chunk import Chunk, ChunkReply
from fedsim.sim.cohort import Trainer
from fedsim.sim.executor import Executor, Inline
from fedsim.strategy import LocalProgram
from fedsim.tree import rows
from fedsim.types import Batch
from fedsim.world import World


@dataclass(frozen=True)
class Update:
    """What the server sent to a client and what came back, and the data behind it.

    Attributes:
        client, round: whose, and in which round it came in.
        program: what the client ran.
        problem: what was learned, with the frozen model that the client had.
        started, change: the model that it was sent, and what it answered.
        data: the client's examples.
    """

    client: int
    round: int
    program: LocalProgram
    problem: Problem
    started: Params
    change: Params
    data: Batch


class _Tap(Executor):
    """An executor that also keeps the chunks that it trained, until they are taken."""

    def __init__(self, trainer: Trainer, threads: int):
        self._inner = Inline(trainer, threads)
        self.mode, self.device = trainer.mode, trainer.x.device.type
        self.trainer = trainer
        self.trained: list[tuple[tuple[LocalProgram, Any], Chunk]] = []

    def map(self, method: str, shared: Any, items: list[Any]) -> list[Any]:
        if method == "train":
            self.trained += [(shared, chunk) for chunk in items]
        return self._inner.map(method, shared, items)

    def freeze(self, frozen: Params | None) -> None:
        self.trainer = self.trainer.freeze(frozen)
        self._inner.freeze(frozen)

    def close(self) -> None:
        self._inner.close()


def update_of(scenario: Scenario, world: World, folder: Folder | None, round: int, client: int | None) -> Update:
    """The update that came in from a client in a round (from 1); from the first that trained in it, where none is named."""
    total = sum(stage.rounds for stage in scenario.stages())
    if not 1 <= round <= total:
        raise FedsimError(f"--round {round}: the scenario has rounds 1 to {total}; name one of them")
    if client is not None and not 0 <= client < world.data.clients:
        raise FedsimError(f"--client {client}: the scenario has clients 0 to {world.data.clients - 1}; name one of them")
    quiet = replace(scenario, evaluate=Evaluate(every=total + 1), output=replace(scenario.output, trackers=(), checkpoint=total + 1))
    tap = _Tap(world.trainer(), scenario.engine.threads)
    with tempfile.TemporaryDirectory() as there, closing(tap):
        again = Folder(Path(there))
        if folder is not None:
            _take_checkpoint(folder, again, before=round)
        with closing(train(quiet, world, again, tap)) as training:
            for row in training:
                if row["round"] == round:
                    break
                tap.trained.clear()
            else:
                raise FedsimError(f"--round {round}: the run stopped before it, because its privacy budget was spent")
    return _update(world, tap, round, client)


def _update(world: World, tap: _Tap, round: int, client: int | None) -> Update:
    there = sorted({int(i) for _, chunk in tap.trained for i in chunk.ids})
    if not there:
        raise FedsimError(f"--round {round}: no client trained in it; choose another round")
    who = there[0] if client is None else client
    found = [(job, chunk, chunk.ids.tolist().index(who)) for job, chunk in tap.trained if who in chunk.ids]
    if not found:
        shown = ", ".join(map(str, there[:20])) + (", ..." if len(there) > 20 else "")
        raise FedsimError(f"--client {who}: it sent no update in round {round}; these did: {shown}")
    (program, message), chunk, c = found[0]
    reply: ChunkReply = tap.trainer.train((program, message), replace(chunk.single(c), weight=None))
    if not reply.accepted[0]:
        raise FedsimError(f"--client {who}: its update of round {round} was refused ({reply.refusals[0]}); choose another client or round")
    sent = message if chunk.which is None else rows(message, int(chunk.which[c]))
    started, change = _model(sent), _model(rows(reply.payload, 0))
    if started is None or change is None or {k: v.shape for k, v in started.items()} != {k: v.shape for k, v in change.items()}:
        name = type(program).registered_name
        raise FedsimError(f"the audit reads changes of a model, and {name} sends something else; take one that sends changes")
    problem = replace(tap.trainer.problem, taped=False)
    places = torch.from_numpy(np.asarray(world.data.train.of(who))).to(world.data.x.device)
    data = Batch(world.data.x[places], world.data.y[places])
    return Update(who, round, program, problem, started.map(torch.Tensor.contiguous), change.map(torch.Tensor.contiguous), data)


def _model(value: Any) -> Params | None:
    """The model, or the change of one, in a message or payload: itself, or its part `w`."""
    part = getattr(value, "w", value) if not isinstance(value, Params) else value
    return part if isinstance(part, Params) else None


def _take_checkpoint(folder: Folder, again: Folder, before: int) -> None:
    """Copy the newest checkpoint of a run before a round. One whose tables are files stays: they are too large to copy."""
    fitting = [path for path in folder.checkpoints() if int(path.stem.removeprefix("round-")) < before]
    if not fitting or (folder.path / "tables").is_dir():
        return
    (again.path / "checkpoints").mkdir()
    for path in (fitting[-1].with_suffix(".safetensors"), fitting[-1]):
        shutil.copy(path, again.path / "checkpoints" / path.name)
