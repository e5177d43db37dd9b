"""Jobs that are under way: what was asked of whom, and updates that are trained but not due yet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.registry import dump, restore
from fedsim.rng import Key
from fedsim.strategy import LocalProgram
from fedsim.tree import concat, record, rows, tree_leaves
from fedsim.types import Job


@record
class Kept:
    """Updates that are trained and wait for their time. A = clients whose update will be accepted.

    Attributes:
        ids: whose they are, `[A]` int64, sorted.
        payload, memory: stacked `[A, ...]`, or None where A = 0.
        metrics: of each, `{name: (value [A], weight [A])}`.
        rejected, lost: `[id, reason]` of the others.
        payload_bytes: what one payload weighs.
    """

    ids: Tensor
    payload: Any
    memory: Any
    metrics: dict[str, tuple[Tensor, Tensor]]
    rejected: list[list[Any]]
    lost: list[list[Any]]
    payload_bytes: int

    @staticmethod
    def of(parts: list[Kept]) -> Kept:
        """All parts as one."""
        rejected, lost = (sorted(each for part in parts for each in reasons(part)) for reasons in (_rejected, _lost))
        full = [part for part in parts if len(part.ids)]
        if not full:
            return Kept(parts[0].ids[:0], None, None, {}, rejected, lost, parts[0].payload_bytes)
        stacks = concat([(part.ids, part.payload, part.memory, part.metrics) for part in full])
        ids, payload, memory, metrics = rows(stacks, torch.argsort(stacks[0]))
        return Kept(ids, payload, memory, metrics, rejected, lost, full[0].payload_bytes)

    def take(self, ids: np.ndarray) -> Kept:
        """Those of some clients, of all who are in here."""
        wanted = set(ids.tolist())
        rejected, lost = ([each for each in reasons(self) if each[0] in wanted] for reasons in (_rejected, _lost))
        index = torch.from_numpy(np.flatnonzero(np.isin(self.ids.numpy(), ids)))
        if not len(index):
            return Kept(self.ids[:0], None, None, {}, rejected, lost, self.payload_bytes)
        mine, payload, memory, metrics = rows((self.ids, self.payload, self.memory, self.metrics), index)
        return Kept(mine, payload, memory, metrics, rejected, lost, self.payload_bytes)


def _rejected(part: Kept) -> list[list[Any]]:
    return part.rejected


def _lost(part: Kept) -> list[list[Any]]:
    return part.lost


@dataclass(frozen=True)
class Group:
    """Jobs of one round that differ in nothing but their clients. They train together, when the first of them is due.

    Attributes:
        program, message: what was asked.
        version: of the model behind the message.
        key: the round's client key.
        t: the round in which it was asked, since the run began.
        ids: whose updates will arrive and were not trained yet, sorted.
        ahead: how many of its jobs have not ended yet.
        kept: what is trained already, or None.
    """

    program: LocalProgram
    message: Any
    version: int
    key: Key
    t: int
    ids: np.ndarray
    ahead: int
    kept: Kept | None = None

    def takes(self, job: Job, version: int, t: int) -> bool:
        """Whether a job may join: asked in the same round, of the same program and message, before any was trained."""
        same = (self.version, self.t, self.kept, self.program) == (version, t, None, job.program)
        mine, its = tree_leaves(self.message), tree_leaves(job.message)
        return same and len(mine) == len(its) and all(a is b for a, b in zip(mine, its, strict=True))

    def joined(self, ids: np.ndarray, ahead: int) -> Group:
        """With more clients, `ids` of which will arrive."""
        return replace(self, ids=np.union1d(self.ids, ids), ahead=self.ahead + ahead)

    def save(self) -> dict[str, Any]:
        """As a pytree, for a checkpoint."""
        fields = {name: getattr(self, name) for name in ("message", "version", "key", "t", "ahead", "kept")}
        return fields | {"program": dump(self.program), "ids": torch.from_numpy(self.ids)}

    @staticmethod
    def load(saved: dict[str, Any]) -> Group:
        """Inverse of `save`."""
        return Group(**saved | {"program": restore(LocalProgram, saved["program"]), "ids": saved["ids"].numpy()})
