"""`SimPort`: a simulated fleet behind the engine's `Port`."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim import rng
from fedsim.engine import Received, RunPort, Weigh, merge
from fedsim.fleet import ARRIVES, LOST, Fates, Fleet
from fedsim.params import Params
from fedsim.sim.chunk import Chunk, ChunkReply
from fedsim.sim.clock import Clock, Events
from fedsim.sim.cohort import Mode, order
from fedsim.sim.executor import Executor, Failure
from fedsim.sim.harm import Mishaps
from fedsim.sim.jobs import Group, Kept, Team, teams
from fedsim.steps import count_examples
from fedsim.strategy import LocalProgram
from fedsim.table import IN_RAM, Storage, Table
from fedsim.tree import nbytes, rows
from fedsim.types import Arrivals, Job, Metrics, Updates

# What is drawn of the port's key, folded after it (`sim/harm.py` has the next numbers).
_DEVICES = 11

ROWS = 1000
"""Devices whose memory is taken over at a time."""


class SimPort(RunPort):
    """Simulated clients: participation decides who is idle, the clock when they are back, an executor trains, a table is their memory.

    Training is lazy: nothing is trained that never arrives, and jobs train together when the first of them is due, also those of several
    rounds. Results do not depend on it, because programs are pure; what trains together is a function of the virtual clock alone.

    Args:
        executor: runs chunks.
        fleet: who is available, how long devices take, what goes wrong.
        labels: label counts of each client `[N, K]`, where the task has labels.
        sizes: training examples of each client `[N]`.
        blank: the device memory of a client that never took part.
        chunk: clients in a chunk, or None for `default_chunk`.
        key: the run's key, in the FLEET domain.
        storage: where device memory is kept.
    """

    def __init__(
        self,
        executor: Executor,
        fleet: Fleet,
        labels: np.ndarray | None,
        sizes: Tensor,
        blank: Any,
        chunk: int | None,
        key: rng.Key,
        storage: Storage = IN_RAM,
    ):
        self._executor = executor
        self._fleet = fleet
        self._sizes = sizes.numpy()
        self._chunk = chunk
        self._key = key
        clients = len(sizes)
        self._devices = fleet.latency.draw(clients, labels, rng.fold(key, _DEVICES))
        self._mishaps = Mishaps.of(fleet, clients, key)
        self._t = 0  # rounds that have begun
        self._participation = fleet.participation.start(clients, labels, key)
        self._available = self._away = np.zeros(clients, dtype=bool)
        self._memory = Table.of(blank, clients, storage)
        self._clock = Clock()
        self._groups: dict[int, Group] = {}
        self._handed_out = 0  # groups so far
        self._spent = Received()  # bytes sent and clients given up since the last `recv`
        self._upload: dict[tuple[LocalProgram, int], int] = {}
        self._cut = False

    @property
    def time(self) -> float:
        return self._clock.now

    @property
    def busy(self) -> int:
        return int((self._clock.ahead.copy == 0).sum())

    def begin(self) -> None:
        self._available, self._participation = self._fleet.participation.active(self._participation, self._t, self._key)
        self._t += 1
        self._away = np.zeros(len(self._sizes), dtype=bool)
        self._away[self._clock.ahead.client] = True

    def idle(self) -> np.ndarray:
        return np.flatnonzero(self._available & ~self._away & (self._sizes > 0))  # a client without examples has nothing to do

    def send(self, job: Job, version: int, key: rng.Key) -> None:
        if not len(job.ids):
            return
        fates, message = self._mishaps.fates(job.ids, np.array([self._t])), nbytes(job.message)
        number = max(self._groups, default=-1)
        if number < 0 or not self._groups[number].takes(job, version, self._t):
            number, self._handed_out = self._handed_out, self._handed_out + 1
            self._groups[number] = Group(job.program, job.message, version, key, self._t, job.ids[:0], 0)
        self._groups[number] = self._groups[number].joined(job.ids[fates.fate == ARRIVES], len(job.ids))
        due = self.time + _ends(self._phases(job, message) * fates.slower[:, None], fates)
        first = Events(due, job.ids, np.full(len(due), number), fates.fate, np.zeros_like(fates.fate))
        again = (fates.fate == ARRIVES) & fates.twice
        self._clock = self._clock.announce(first).announce(replace(first.take(again), copy=np.ones(again.sum(), dtype=np.int64)))
        self._away[job.ids] = True
        reached = int((fates.fate != LOST.index("dropped out before the download")).sum())
        self._spent = replace(self._spent, bytes_down=self._spent.bytes_down + message * reached)

    def wait(self, count: int | None, until: float, step: bool) -> int:
        self._clock = self._clock.wait(count, until, step)
        return self._clock.ready

    def give_up(self, reason: str) -> None:
        events, self._clock = self._clock.give_up()
        self._spent = replace(self._spent, lost=self._spent.lost | dict.fromkeys(events.client[events.copy == 0].tolist(), reason))
        self._end(events, forget=True)

    def recv(self, version: int, weigh: Weigh | None, recall: bool) -> Received:
        past, self._clock = self._clock.taken()
        parts, self._spent = [self._spent], Received()
        gone = past.take(past.fate != ARRIVES)
        twice = past.client[past.copy > 0].tolist()
        lost = {client: LOST[fate] for client, fate in zip(gone.client.tolist(), gone.fate.tolist(), strict=True)}
        parts.append(Received(lost=lost, rejected=dict.fromkeys(twice, "came a second time")))
        here = past.take((past.fate == ARRIVES) & (past.copy == 0))
        due = {number: np.sort(here.client[here.group == number]) for number in np.unique(here.group).tolist()}
        for team in teams(self._groups, due):
            parts += self._train_due(team, np.isin(team.ids, here.client), version, weigh, recall)
        for number, ids in due.items():
            kept = self._groups[number].kept
            if kept is not None:
                parts.append(self._received_kept(kept.take(ids), Team.single(number, self._groups[number], ids), version, weigh, recall))
        self._end(past)
        return merge(parts)

    def _end(self, events: Events, forget: bool = False) -> None:
        """Events are over: groups of which nothing is ahead any more are forgotten."""
        first = events.take(events.copy == 0)
        for number, count in Counter(first.group.tolist()).items():
            group = self._groups[number]
            ids = np.setdiff1d(group.ids, first.client[first.group == number]) if forget else group.ids
            if group.ahead == count:
                del self._groups[number]
            else:
                self._groups[number] = replace(group, ids=ids, ahead=group.ahead - count)

    def _train_due(self, team: Team, due: np.ndarray, version: int, weigh: Weigh | None, recall: bool) -> list[Received]:
        """Train the jobs of a team that are due now.

        Where they are at least half of it, they train alone, and are summed where they arise. Else the whole team trains, and updates are
        kept until they are due.
        """
        alone = 2 * int(due.sum()) >= len(team)
        now = team.take(due) if alone else team
        trained = self._train(now, version, weigh if alone else None)
        self._groups |= {number: group.without(now.of_group(number)) for number, group in now.groups.items()}
        if alone:
            return [self._received(part, reply, version, weigh, recall) for part, reply in trained]
        kept: dict[int, list[Kept]] = {}
        for part, reply in trained:
            together = _kept(part.ids, reply)
            for number in set(part.number.tolist()):
                kept.setdefault(number, []).append(together.take(np.sort(part.of_group(number))))
        self._groups |= {number: replace(self._groups[number], kept=Kept.of(parts)) for number, parts in kept.items()}
        return [Received(examples=sum(reply.examples for _, reply in trained if isinstance(reply, ChunkReply)))]

    def _train(self, team: Team, version: int, weigh: Weigh | None) -> list[tuple[Team, ChunkReply | Failure]]:
        """Cut a team into chunks and run them; with weights of model `version`, if any."""
        team = team.find(order(team.program, self._sizes, team.ids)).narrow()
        size = self._chunk or default_chunk(len(team), self._executor.mode, self._executor.device)
        cuts = np.array_split(np.arange(len(team)), -(-len(team) // size))  # as equal as can be: no worker waits for a long last chunk
        parts = [team.take(cut) for cut in cuts]
        chunks = [self._chunk_of(part, weigh(self._arrivals(part, version)) if weigh else None) for part in parts]
        replies = self._executor.map("train", (team.program, team.message), chunks)
        self._say_if_cut(chunks, replies)
        return list(zip(parts, replies, strict=True))

    def _chunk_of(self, team: Team, weight: Tensor | None) -> Chunk:
        harm = self._mishaps.harm(team.ids, team.t)
        return Chunk(team.ids, int(team.version.max()), team.keys, self._memory.get(team.ids), weight, harm, team.which)

    def _received(self, team: Team, reply: ChunkReply | Failure, version: int, weigh: Weigh | None, recall: bool) -> Received:
        """One chunk's reply in the engine's terms; devices remember."""
        if isinstance(reply, Failure):
            return Received(lost=dict.fromkeys(team.ids.tolist(), reply.reason))
        if reply.total is None:
            return replace(self._received_kept(_kept(team.ids, reply), team, version, weigh, recall), examples=reply.examples)
        accepted = team.take(reply.accepted)
        self._memory = self._memory.put(accepted.ids, reply.memory)
        return Received(
            arrivals=self._arrivals(accepted, version),
            total=reply.total,
            metrics=_summed(reply.metrics),
            rejected={int(team.ids[c]): why for c, why in reply.refusals.items()},
            examples=reply.examples,
            bytes_up=reply.payload_bytes * len(team),
        )

    def _received_kept(self, kept: Kept, team: Team, version: int, weigh: Weigh | None, recall: bool) -> Received:
        """Updates that were kept apart, in the engine's terms; devices remember."""
        lost, rejected = dict(kept.lost), dict(kept.rejected)
        bytes_up = kept.payload_bytes * (len(kept.ids) + len(rejected))
        if not len(kept.ids):
            return Received(lost=lost, rejected=rejected, bytes_up=bytes_up)
        accepted = team.find(kept.ids.numpy())
        self._memory = self._memory.put(accepted.ids, kept.memory)
        arrivals = self._arrivals(accepted, version)
        updates = Updates(arrivals, kept.payload, accepted.started if recall else None, kept.metrics)
        return Received(
            arrivals=arrivals,
            updates=None if weigh else updates,
            total=updates.total(weigh(arrivals)) if weigh else None,
            metrics=_summed(kept.metrics),
            lost=lost,
            rejected=rejected,
            bytes_up=bytes_up,
        )

    def _phases(self, job: Job, message: int) -> np.ndarray:
        """Seconds of each phase of a job, `[C, 4]`."""
        examples = count_examples(job.program, self._sizes[job.ids]) * len(job.program.passes)
        payload = self._payload_bytes(job) if self._devices.times_uploads else 0
        keys = rng.fold_each(rng.fold(self._key, _DEVICES, self._t), job.ids)
        return self._devices.phases(job.ids, examples.astype(np.float64), message, payload, keys)

    def _payload_bytes(self, job: Job) -> int:
        """What an answer to a job weighs: found out by beginning and finishing one without a step."""
        which = (job.program, nbytes(job.message))
        if which not in self._upload:
            (weight,) = self._executor.map("payload_bytes", (job.program, job.message), [rows(self._memory.get(job.ids[:1]), 0)])
            self._upload[which] = weight
        return self._upload[which]

    def _say_if_cut(self, chunks: list[Chunk], replies: list[ChunkReply | Failure]) -> None:
        """Say once that chunks did not fit into a GPU's memory."""
        parts = max((reply.parts for reply in replies if isinstance(reply, ChunkReply)), default=1)
        if parts > 1 and not self._cut:
            self._cut = True
            size = max(len(chunk.ids) for chunk in chunks)
            warnings.warn(
                f"{size} clients do not fit into the GPU's memory together: they run in {parts} parts, with the same sums; "
                f"engine.chunk: {max(1, size // parts)}, or fewer workers a GPU, would save the detour",
                RuntimeWarning,
                stacklevel=2,
            )

    def _arrivals(self, team: Team, version: int) -> Arrivals:
        began = torch.from_numpy(team.version)
        return Arrivals(torch.from_numpy(team.ids), torch.from_numpy(self._sizes[team.ids]), began, version - began)

    def memory_of(self, client: int) -> Any:
        """What the device of one client remembers."""
        return rows(self._memory.get(np.array([client])), 0)

    def continue_clock(self, before: SimPort) -> None:
        """Take up time and availability where another port left them: a later phase meets the same fleet. What was under way is void."""
        self._t = before._t
        if self._fleet.participation == before._fleet.participation:
            self._participation = before._participation
        self._clock = Clock(before.time)

    def inherit(self, before: SimPort) -> None:
        """Let devices remember what they kept of a model at another port, and have the rest as fresh ones do."""
        old, new = (port._memory.blank for port in (before, self))
        if not isinstance(old, Params) or not isinstance(new, Params) or not old:
            return
        written = np.flatnonzero(before._memory.written)
        for ids in np.array_split(written, max(1, len(written) // ROWS)):
            self._memory = self._memory.put(ids, self._memory.get(ids) | before._memory.get(ids))

    def save(self) -> dict[str, Any]:
        """What a checkpoint needs: the clock, everything that is under way, who is where, and what devices remember."""
        fleet = {name: torch.from_numpy(np.asarray(values)) for name, values in self._participation.items()}
        groups = [[number, group.saved] for number, group in self._groups.items()]
        clock = {"now": self._clock.now, "ahead": self._clock.ahead.save(), "groups": groups, "handed_out": self._handed_out}
        return {"t": self._t, "fleet": fleet, "memory": self._memory, "clock": clock}

    def restore(self, saved: dict[str, Any]) -> None:
        """Inverse of `save`."""
        self._t = saved["t"]
        self._participation = {name: values.numpy() for name, values in saved["fleet"].items()}
        self._memory = saved["memory"]
        clock = saved["clock"]
        self._clock = Clock(clock["now"], Events.load(clock["ahead"]))
        self._groups = {number: Group.load(group) for number, group in clock["groups"]}
        self._handed_out = clock["handed_out"]


def default_chunk(cohort: int, mode: Mode, device: str) -> int:
    """Clients in a chunk where the scenario leaves it open.

    Stacked, half of the cohort, at most 25: a small model's step costs the same few milliseconds for one client and for many. One by one,
    a quarter of the cohort, at most 10: there a chunk only has to be large enough for the way to a worker and back. A GPU wants to be full:
    stacked, all of the cohort, at most 64.
    """
    parts, most = (4, 10) if mode == "loop" else (2, 25) if device == "cpu" else (1, 64)
    return max(1, min(most, -(-cohort // parts)))


def _ends(phases: np.ndarray, fates: Fates) -> np.ndarray:
    """Seconds until each job ends, by arriving or by being lost: in which phase is up to its fate. `[C, 4] -> [C]`."""
    ends = phases.cumsum(1)
    lost_in = np.array([3, 0, 2, 3, 1, 3])[fates.fate]  # the phase in which a fate strikes, by the order of LOST
    c = np.arange(len(phases))
    part = np.where((fates.fate >= 1) & (fates.fate <= 3), fates.when, 1.0)  # dropping out happens within a phase
    return ends[c, lost_in] - phases[c, lost_in] * (1 - part)


def _kept(ids: np.ndarray, reply: ChunkReply | Failure) -> Kept:
    """The reply of a chunk of clients, kept apart by client."""
    if isinstance(reply, Failure):
        return Kept(torch.zeros(0, dtype=torch.int64), None, None, {}, [], [[i, reply.reason] for i in ids.tolist()], 0)
    accepted = torch.from_numpy(ids[reply.accepted])
    rejected = [[int(ids[c]), why] for c, why in reply.refusals.items()]
    return Kept(accepted, reply.payload, reply.memory, reply.metrics, rejected, [], reply.payload_bytes)


def _summed(metrics: dict[str, tuple[Tensor, Tensor]]) -> Metrics:
    return {name: (float(value.sum()), float(weight.sum())) for name, (value, weight) in metrics.items()}
