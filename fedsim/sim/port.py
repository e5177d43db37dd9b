"""`SimPort`: a simulated fleet behind the engine's `Port`."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim import rng
from fedsim.engine import Port, Received, Weigh, merge
from fedsim.fleet import ARRIVES, LOST, Fates, Fleet
from fedsim.sim.clock import Clock, Events
from fedsim.sim.cohort import Chunk, ChunkReply, Mode, order
from fedsim.sim.executor import Executor, Failure
from fedsim.sim.harm import Harm
from fedsim.sim.jobs import Group, Kept
from fedsim.steps import count_examples
from fedsim.strategy import LocalProgram
from fedsim.table import IN_RAM, Storage, Table
from fedsim.tree import nbytes, rows, tree_map
from fedsim.types import Arrivals, Job, Metrics, Updates

# What is drawn of the port's key, folded after it.
_DEVICES, _BYZANTINE, _FATES, _HARM = range(11, 15)


class SimPort(Port):
    """Simulated clients: participation decides who is idle, the clock when they are back, an executor trains, a table is their memory.

    Training is lazy: nothing is trained that never arrives, and jobs that were handed out in one round train together when the first of
    them is due. Results do not depend on it, because programs are pure; how jobs are grouped is a function of the virtual clock alone.

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
        byzantine = fleet.faults.byzantine
        self._byzantine = byzantine.draw(clients, rng.fold(key, _BYZANTINE)) if byzantine else np.zeros(clients, dtype=bool)
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
        fates, message = self._fates(job.ids, self._t), nbytes(job.message)
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
        for number in np.unique(here.group).tolist():
            parts += self._collect(number, np.sort(here.client[here.group == number]), version, weigh, recall)
        self._end(past)
        return merge(parts)

    def _end(self, events: Events, forget: bool = False) -> None:
        """Events are over: groups of which nothing is ahead any more are forgotten."""
        first = events.take(events.copy == 0)
        for number, count in zip(*np.unique(first.group, return_counts=True), strict=True):
            group = self._groups[int(number)]
            ids = np.setdiff1d(group.ids, first.client[first.group == number]) if forget else group.ids
            self._groups[int(number)] = replace(group, ids=ids, ahead=group.ahead - int(count))
        self._groups = {number: group for number, group in self._groups.items() if group.ahead}

    def _collect(self, number: int, ids: np.ndarray, version: int, weigh: Weigh | None, recall: bool) -> list[Received]:
        """The updates of some clients of a group, which are due now.

        Where they are at least half of those that are still to be trained, they train alone, and are summed where they arise. Else all of
        them train together, and the others' updates are kept until they are due.
        """
        group = self._groups[number]
        if group.kept is None and 2 * len(ids) >= len(group.ids):
            self._groups[number] = replace(group, ids=np.setdiff1d(group.ids, ids))
            return [self._received(part, total, group, version, weigh, recall) for part, total in self._train(group, ids, version, weigh)]
        trained = Received()
        if group.kept is None:
            parts = self._train(group, group.ids, version, None)
            trained = Received(examples=sum(reply.examples for _, reply in parts if isinstance(reply, ChunkReply)))
            group = replace(group, ids=group.ids[:0], kept=Kept.of([_kept(chunk, reply) for chunk, reply in parts]))
            self._groups[number] = group
        assert group.kept is not None
        return [trained, self._received_kept(group.kept.take(ids), group, version, weigh, recall)]

    def _train(self, group: Group, ids: np.ndarray, version: int, weigh: Weigh | None) -> list[tuple[Chunk, ChunkReply | Failure]]:
        """Cut a group into chunks and run them; with weights of model `version`, if any."""
        ids = order(group.program, self._sizes, ids)
        size = self._chunk or default_chunk(len(ids), self._executor.mode)
        chunks = []
        for part in np.array_split(ids, -(-len(ids) // size)):  # as equal as can be: no worker waits for a long last chunk
            weight = weigh(self._arrivals(part, group.version, version)) if weigh else None
            chunks.append(Chunk(part, group.version, group.key, self._memory.get(part), weight, self._harm(part, group.t)))
        replies = self._executor.map("train", (group.program, group.message), chunks)
        self._say_if_cut(chunks, replies)
        return list(zip(chunks, replies, strict=True))

    def _received(
        self, chunk: Chunk, reply: ChunkReply | Failure, group: Group, version: int, weigh: Weigh | None, recall: bool
    ) -> Received:
        """One chunk's reply in the engine's terms; devices remember."""
        if isinstance(reply, Failure):
            return Received(lost=dict.fromkeys(chunk.ids.tolist(), reply.reason))
        if reply.total is None:
            kept = self._received_kept(_kept(chunk, reply), group, version, weigh, recall)
            return replace(kept, examples=reply.examples)
        accepted = chunk.ids[reply.accepted]
        self._memory = self._memory.put(accepted, reply.memory)
        return Received(
            arrivals=self._arrivals(accepted, group.version, version),
            total=reply.total,
            metrics=_summed(reply.metrics),
            rejected={int(chunk.ids[c]): why for c, why in reply.refusals.items()},
            examples=reply.examples,
            bytes_up=reply.payload_bytes * len(chunk.ids),
        )

    def _received_kept(self, kept: Kept, group: Group, version: int, weigh: Weigh | None, recall: bool) -> Received:
        """Updates that were kept apart, in the engine's terms; devices remember."""
        lost, rejected = dict(kept.lost), dict(kept.rejected)
        bytes_up = kept.payload_bytes * (len(kept.ids) + len(rejected))
        if not len(kept.ids):
            return Received(lost=lost, rejected=rejected, bytes_up=bytes_up)
        ids = kept.ids.numpy()
        self._memory = self._memory.put(ids, kept.memory)
        arrivals = self._arrivals(ids, group.version, version)
        started = tree_map(lambda leaf: leaf.expand(len(ids), *leaf.shape), group.message) if recall else None
        updates = Updates(arrivals, kept.payload, started)
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

    def _fates(self, ids: np.ndarray, t: int) -> Fates:
        keys = rng.fold_each(rng.fold(self._key, _FATES, t), ids)
        return self._fleet.faults.draw(keys, self._fleet.channel.down.erasure, self._fleet.channel.up.erasure)

    def _harm(self, ids: np.ndarray, t: int) -> Harm | None:
        """What befalls the messages of a chunk that was asked in round `t`; None where nothing can."""
        fleet, attack = self._fleet, self._fleet.faults.byzantine
        corrupt = fleet.faults.corrupt
        if not (attack or corrupt.nan or corrupt.shape or fleet.channel.down.noise or fleet.channel.up.noise):
            return None
        fates, bad = self._fates(ids, t), torch.from_numpy(self._byzantine[ids])
        factor, noise = torch.ones(len(ids)), torch.zeros(len(ids))
        if attack and attack.attack == "noise":
            noise[bad] = attack.strength
        elif attack:
            factor[bad] = attack.strength * (-1 if attack.attack == "sign-flip" else 1)
        broken = torch.from_numpy(fates.nan), torch.from_numpy(fates.bent)
        keys = rng.fold_each(rng.fold(self._key, _HARM, t), ids)
        return Harm(factor, noise, *broken, fleet.channel.down.noise, fleet.channel.up.noise, keys)

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

    def _arrivals(self, ids: np.ndarray, began: int, version: int) -> Arrivals:
        versions = torch.full((len(ids),), began)
        return Arrivals(torch.from_numpy(ids), torch.from_numpy(self._sizes[ids]), versions, version - versions)

    def memory_of(self, client: int) -> Any:
        """What the device of one client remembers."""
        return rows(self._memory.get(np.array([client])), 0)

    def continue_clock(self, before: SimPort) -> None:
        """Take up time and availability where another port left them: a later phase meets the same fleet. What was under way is void."""
        self._t, self._participation = before._t, before._participation
        self._clock = Clock(before.time)

    def save(self) -> dict[str, Any]:
        """What a checkpoint needs: the clock, everything that is under way, who is where, and what devices remember."""
        fleet = {name: torch.from_numpy(np.asarray(values)) for name, values in self._participation.items()}
        groups = [[number, group.save()] for number, group in self._groups.items()]
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


def default_chunk(cohort: int, mode: Mode) -> int:
    """Clients in a chunk where the scenario leaves it open.

    Stacked, half of the cohort, at most 25: a small model's step costs the same few milliseconds for one client and for many. One by one,
    a quarter of the cohort, at most 10: there a chunk only has to be large enough for the way to a worker and back.
    """
    parts, most = (2, 25) if mode == "vmap" else (4, 10)
    return max(1, min(most, -(-cohort // parts)))


def _ends(phases: np.ndarray, fates: Fates) -> np.ndarray:
    """Seconds until each job ends, by arriving or by being lost: in which phase is up to its fate. `[C, 4] -> [C]`."""
    ends = phases.cumsum(1)
    lost_in = np.array([3, 0, 2, 3, 1, 3])[fates.fate]  # the phase in which a fate strikes, by the order of LOST
    c = np.arange(len(phases))
    part = np.where(np.isin(fates.fate, [1, 2, 3]), fates.when, 1.0)  # dropping out happens within a phase
    return ends[c, lost_in] - phases[c, lost_in] * (1 - part)


def _kept(chunk: Chunk, reply: ChunkReply | Failure) -> Kept:
    """A chunk's reply, kept apart by client."""
    if isinstance(reply, Failure):
        return Kept(torch.zeros(0, dtype=torch.int64), None, None, {}, [], [[i, reply.reason] for i in chunk.ids.tolist()], 0)
    accepted = torch.from_numpy(chunk.ids[reply.accepted])
    rejected = [[int(chunk.ids[c]), why] for c, why in reply.refusals.items()]
    return Kept(accepted, reply.payload, reply.memory, reply.metrics, rejected, [], reply.payload_bytes)


def _summed(metrics: dict[str, tuple[Tensor, Tensor]]) -> Metrics:
    return {name: (float(value.sum()), float(weight.sum())) for name, (value, weight) in metrics.items()}
