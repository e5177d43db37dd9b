"""Jobs that are under way: what was asked of whom, and updates that are trained but not due yet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.registry import dump, restore
from fedsim.rng import Key, Keys
from fedsim.strategy import LocalProgram
from fedsim.tree import concat, record, rows, stack, tree_leaves
from fedsim.types import Job


@record
class Kept:
    """Updates that are trained and wait for their time. A = clients whose update will be accepted.

    Attributes:
        ids: whose they are, `[A]` int64.
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
        ids, payload, memory, metrics = concat([(part.ids, part.payload, part.memory, part.metrics) for part in full])
        return Kept(ids, payload, memory, metrics, rejected, lost, full[0].payload_bytes)

    def take(self, ids: np.ndarray) -> Kept:
        """Those of some clients `ids`, sorted, who may also not be in here."""
        rejected, lost = self.rejected, self.lost
        if rejected or lost:
            wanted = set(ids.tolist())
            rejected, lost = ([each for each in reasons if each[0] in wanted] for reasons in (rejected, lost))
        elif np.array_equal(ids, self.ids):
            return self
        mine = self.ids.numpy()
        by_id = np.argsort(mine)
        place = np.searchsorted(mine, ids, sorter=by_id)
        there = by_id[place[place < len(mine)]]
        index = torch.from_numpy(there[mine[there] == ids[place < len(mine)]])
        if not len(index):
            return Kept(self.ids[:0], None, None, {}, rejected, lost, self.payload_bytes)
        found, payload, memory, metrics = rows((self.ids, self.payload, self.memory, self.metrics), index)
        return Kept(found, payload, memory, metrics, rejected, lost, self.payload_bytes)


def _rejected(part: Kept) -> list[list[Any]]:
    return part.rejected


def _lost(part: Kept) -> list[list[Any]]:
    return part.lost


@dataclass(frozen=True)
class Group:
    """Jobs of one round that differ in nothing but their clients.

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

    def without(self, ids: np.ndarray) -> Group:
        """With some of its updates no longer to be trained."""
        return replace(self, ids=np.setdiff1d(self.ids, ids))

    @cached_property
    def kind(self) -> tuple[Any, ...]:
        """Equal for groups that may train together: one program, messages of one form, and of one version where the program ages."""
        form = tuple((leaf.shape, leaf.dtype) for leaf in tree_leaves(self.message))
        return self.program, form, self.version if self.program.ages() else None

    def joined(self, ids: np.ndarray, ahead: int) -> Group:
        """With more clients, `ids` of which will arrive."""
        return replace(self, ids=np.union1d(self.ids, ids), ahead=self.ahead + ahead)

    @cached_property
    def saved(self) -> dict[str, Any]:
        """As a pytree, for a checkpoint. Inverse: `load`."""
        fields = {name: getattr(self, name) for name in ("message", "version", "key", "t", "ahead", "kept")}
        return fields | {"program": dump(self.program), "ids": torch.from_numpy(self.ids)}

    @staticmethod
    def load(saved: dict[str, Any]) -> Group:
        """Inverse of `saved`."""
        return Group(**saved | {"program": restore(LocalProgram, saved["program"]), "ids": saved["ids"].numpy()})


@dataclass(frozen=True)
class Team:
    """Jobs that may train together: of one round, or of several. C of them, of G groups.

    Attributes:
        groups: what they belong to, by number.
        ids: whose they are, `[C]`. A client has one job at a time.
        number: of the group of each, `[C]`.
    """

    groups: dict[int, Group]
    ids: np.ndarray
    number: np.ndarray

    @staticmethod
    def of(groups: dict[int, Group]) -> Team:
        """All jobs that are to be trained of some groups of one kind, sorted by client."""
        ids = np.concatenate([group.ids for group in groups.values()])
        number = np.repeat(list(groups), [len(group.ids) for group in groups.values()])
        by_id = np.argsort(ids)
        return Team(groups, ids[by_id], number[by_id])

    @staticmethod
    def single(number: int, group: Group, ids: np.ndarray) -> Team:
        """Jobs of one group."""
        return Team({number: group}, ids, np.full(len(ids), number))

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Any) -> Team:
        """The chosen jobs."""
        return replace(self, ids=self.ids[index], number=self.number[index])

    def find(self, ids: np.ndarray) -> Team:
        """The jobs of some of its clients, in their order."""
        by_id = np.argsort(self.ids)
        return self.take(by_id[np.searchsorted(self.ids, ids, sorter=by_id)])

    def narrow(self) -> Team:
        """With the groups of which jobs are left, in the order of their first jobs."""
        return replace(self, groups={number: self.groups[number] for number in dict.fromkeys(self.number.tolist())})

    def of_group(self, number: int) -> np.ndarray:
        """Whose jobs belong to a group."""
        return self.ids[self.number == number]

    @property
    def program(self) -> LocalProgram:
        return next(iter(self.groups.values())).program

    @property
    def message(self) -> Any:
        """What all were sent; or the messages of the groups, stacked `[G, ...]`, where there are several."""
        messages = [group.message for group in self.groups.values()]
        return messages[0] if len(messages) == 1 else stack(messages)

    @property
    def which(self) -> np.ndarray | None:
        """The row of `message` that each was sent, `[C]`; None where all were sent the same."""
        return None if len(self.groups) == 1 else self._row

    @property
    def started(self) -> Any:
        """What each was sent, stacked `[C, ...]`."""
        return rows(stack([group.message for group in self.groups.values()]), torch.from_numpy(self._row))

    @property
    def version(self) -> np.ndarray:
        """Of the model behind each message, `[C]`."""
        return np.array([group.version for group in self.groups.values()])[self._row]

    @property
    def t(self) -> np.ndarray:
        """The round in which each was asked, `[C]`."""
        return np.array([group.t for group in self.groups.values()])[self._row]

    @property
    def keys(self) -> Keys:
        """The client key of each one's round, `[C]`."""
        return np.array([group.key for group in self.groups.values()], dtype=np.uint64)[self._row]

    @property
    def _row(self) -> np.ndarray:
        row = {number: i for i, number in enumerate(self.groups)}
        return np.array([row[number] for number in self.number.tolist()], dtype=np.int64)


def teams(groups: dict[int, Group], due: Iterable[int]) -> list[Team]:
    """What may train together with the groups `due`, where these are not trained yet: by kind, in the order of the first of each."""
    kinds = dict.fromkeys(groups[number].kind for number in due if groups[number].kept is None)
    if not kinds:
        return []
    waiting = [(number, group, group.kind) for number, group in groups.items() if len(group.ids)]
    return [Team.of({number: group for number, group, its in waiting if its == kind}) for kind in kinds]
