"""`SimPort`: a simulated fleet behind the engine's `Port`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim import rng
from fedsim.engine import Port, Received, Weigh, merge
from fedsim.fleet import Participation
from fedsim.sim.cohort import Chunk, ChunkReply, Mode, order
from fedsim.sim.executor import Executor, Failure
from fedsim.table import IN_RAM, Storage, Table
from fedsim.tree import nbytes, rows
from fedsim.types import Arrivals, Job, Updates


@dataclass(frozen=True)
class _Sent:
    job: Job
    version: int
    key: rng.Key


class SimPort(Port):
    """Simulated clients: participation decides who is idle, an executor trains, a table is their device memory.

    Args:
        executor: runs chunks.
        participation: who is available in which round.
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
        participation: Participation,
        labels: np.ndarray | None,
        sizes: Tensor,
        blank: Any,
        chunk: int | None,
        key: rng.Key,
        storage: Storage = IN_RAM,
    ):
        self._executor = executor
        self._participation = participation
        self._sizes = sizes.numpy()
        self._chunk = chunk
        self._key = key
        self._t = 0
        self._fleet = participation.start(len(sizes), labels, key)
        self._memory = Table.of(blank, len(sizes), storage)
        self._outbox: list[_Sent] = []
        self._cut = False

    def idle(self) -> np.ndarray:
        available, self._fleet = self._participation.active(self._fleet, self._t, self._key)
        self._t += 1
        return np.flatnonzero(available & (self._sizes > 0))  # a client without examples has nothing to do

    def send(self, job: Job, version: int, key: rng.Key) -> None:
        self._outbox.append(_Sent(job, version, key))

    def recv(self, weigh: Weigh | None) -> Received:
        sent, self._outbox = self._outbox, []
        return merge([part for each in sent if len(each.job.ids) for part in self._train(each, weigh)])

    def _train(self, sent: _Sent, weigh: Weigh | None) -> list[Received]:
        """Cut a job into chunks and run them."""
        program, message = sent.job.program, sent.job.message
        ids = order(program, self._sizes, sent.job.ids)
        size = self._chunk or default_chunk(len(ids), self._executor.mode)
        chunks = []
        for part in np.array_split(ids, -(-len(ids) // size)):  # as equal as can be: no worker waits for a long last chunk
            weight = weigh(self._arrivals(part, sent.version)) if weigh else None
            chunks.append(Chunk(part, sent.version, sent.key, self._memory.get(part), weight))
        out = []
        replies = self._executor.map("train", (program, message), chunks)
        self._say_if_cut(chunks, replies)
        for chunk, reply in zip(chunks, replies, strict=True):
            if isinstance(reply, Failure):
                out.append(Received(lost=dict.fromkeys(chunk.ids.tolist(), reply.reason), bytes_down=nbytes(message) * len(chunk.ids)))
                continue
            accepted = chunk.ids[reply.accepted]
            if len(accepted):
                self._memory = self._memory.put(accepted, reply.memory)
            out.append(_received(self._arrivals(accepted, sent.version), chunk, reply, nbytes(message)))
        return out

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

    def _arrivals(self, ids: np.ndarray, version: int) -> Arrivals:
        versions = torch.full((len(ids),), version)
        return Arrivals(torch.from_numpy(ids), torch.from_numpy(self._sizes[ids]), versions, torch.zeros_like(versions))

    def memory_of(self, client: int) -> Any:
        """What the device of one client remembers."""
        return rows(self._memory.get(np.array([client])), 0)

    def continue_clock(self, before: SimPort) -> None:
        """Take up time and availability where another port left them: a later phase meets the same fleet."""
        self._t, self._fleet = before._t, before._fleet

    def save(self) -> dict[str, Any]:
        """What a checkpoint needs: the clock, who is where, and what devices remember."""
        fleet = {name: torch.from_numpy(np.asarray(values)) for name, values in self._fleet.items()}
        return {"t": self._t, "fleet": fleet, "memory": self._memory}

    def restore(self, saved: dict[str, Any]) -> None:
        """Inverse of `save`."""
        self._t = saved["t"]
        self._fleet = {name: values.numpy() for name, values in saved["fleet"].items()}
        self._memory = saved["memory"]


def default_chunk(cohort: int, mode: Mode) -> int:
    """Clients in a chunk where the scenario leaves it open.

    Stacked, half of the cohort, at most 25: a small model's step costs the same few milliseconds for one client and for many. One by one,
    a quarter of the cohort, at most 10: there a chunk only has to be large enough for the way to a worker and back.
    """
    parts, most = (2, 25) if mode == "vmap" else (4, 10)
    return max(1, min(most, -(-cohort // parts)))


def _received(arrivals: Arrivals, chunk: Chunk, reply: ChunkReply, message_bytes: int) -> Received:
    """One chunk's reply in the engine's terms."""
    count = len(chunk.ids)
    return Received(
        arrivals=arrivals if len(arrivals) else None,
        updates=Updates(arrivals, reply.payload) if reply.payload is not None else None,
        total=reply.total,
        metrics=reply.metrics,
        rejected=dict.fromkeys(chunk.ids[~reply.accepted].tolist(), "update is not finite"),
        examples=reply.examples,
        bytes_down=message_bytes * count,
        bytes_up=reply.payload_bytes * count,
    )
