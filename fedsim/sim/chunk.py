"""A chunk of clients: what is asked of it, and what it gives back.

Payloads that arrive are checked here, and kept or summed under their weights, in the order of the chunk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim import rng
from fedsim.sim.feed import Feed
from fedsim.sim.harm import Harm, received, refused, sent
from fedsim.tree import add, concat, finite, nbytes, record, rows, tree_leaves, tree_map, weighted_sum
from fedsim.types import Reply, Total


@record
class Chunk:
    """Clients that run together, sorted by falling number of steps.

    Attributes:
        ids: `[C]` int64.
        version: of the model they received; the newest, where it does not matter to the program.
        key: the round's client key, or one for each client `[C]`.
        memory: their device memories, stacked.
        weight: what each payload counts in the sum `[C]`, or None to keep the payloads apart.
        harm: what befalls messages and payloads on their way, or None.
        which: the message of each client `[C]`, of several that are stacked; None where all received the same.
    """

    ids: np.ndarray
    version: int
    key: rng.Key | rng.Keys
    memory: Any
    weight: Tensor | None
    harm: Harm | None = None
    which: np.ndarray | None = None

    def messages(self, sent: Any) -> Any | None:
        """What each client begins with, stacked `[C, ...]`; None where that is simply what was sent."""
        noisy = self.harm is not None and self.harm.down > 0
        if self.which is None and not noisy:
            return None
        if self.which is None:
            own = tree_map(lambda leaf: leaf.expand(len(self.ids), *leaf.shape), sent)
        elif (np.diff(self.which) == 1).all():  # a client each, neighbours: nothing to copy
            own = rows(sent, slice(int(self.which[0]), int(self.which[-1]) + 1))
        else:
            own = rows(sent, torch.from_numpy(self.which))
        return received(own, self.harm) if self.harm is not None and noisy else own

    def single(self, c: int) -> Chunk:
        """Client `c` alone."""
        key = self.key if isinstance(self.key, int) else self.key[c : c + 1]
        weight = None if self.weight is None else self.weight[c : c + 1]
        harm, which = self.harm and self.harm.take([c]), None if self.which is None else self.which[c : c + 1]
        return Chunk(self.ids[c : c + 1], self.version, key, rows(self.memory, slice(c, c + 1)), weight, harm, which)


@record
class ChunkReply:
    """What a chunk gives back. Rows of rejected clients are in neither `payload` nor `total`, nor in `memory` and `metrics`.

    A = accepted clients, in the order of the chunk.

    Attributes:
        accepted: which clients passed the checks, `[C]` bool.
        refusals: why the others did not, `{position in the chunk: reason}`.
        payload: of the accepted clients, stacked, where no weights were given.
        total: the weighted sum of the accepted payloads, where weights were given.
        memory: new device memories of the accepted clients, stacked.
        metrics: of each accepted client, `{name: (value [A], weight [A])}` float64.
        examples: training examples processed by all clients of the chunk.
        payload_bytes: what one client's payload weighs.
        parts: into how many parts the stack was cut for want of memory; 1 = it was not.
    """

    accepted: np.ndarray
    refusals: dict[int, str]
    payload: Any
    total: Total | None
    memory: Any
    metrics: dict[str, tuple[Tensor, Tensor]]
    examples: int
    payload_bytes: int
    parts: int = 1


class Replies:
    """Replies that come one by one: payloads are added to a running sum as they arrive, or kept."""

    def __init__(self, chunk: Chunk):
        self.chunk = chunk
        self.refusals: dict[int, str] = {}
        self.total: Any = None
        self.payloads: list[Any] = []
        self.memories: list[Any] = []
        self.metrics: list[dict[str, tuple[Tensor, Tensor]]] = []
        self.payload_bytes = 0

    def take(self, c: int, reply: Reply) -> None:
        self.payload_bytes = nbytes(reply.payload)
        reply = tree_map(lambda leaf: leaf[None].contiguous(), reply)  # as it comes from a worker: sums read it in that order
        payload, why = _arrived(reply.payload, self.chunk.harm and self.chunk.harm.take([c]))
        if why:
            self.refusals[c] = why[0]
            return
        self.memories.append(reply.memory)
        self.metrics.append(reply.metrics)
        if self.chunk.weight is None:
            self.payloads.append(payload)
        else:
            weight = self.chunk.weight[c]
            scaled = tree_map(lambda leaf: leaf[0] * weight.to(leaf.dtype), payload)
            self.total = scaled if self.total is None else add(self.total, scaled)

    def sum_up(self, feeds: list[Feed]) -> ChunkReply:
        accepted, weight = _accepted(self.chunk, self.refusals), self.chunk.weight
        total = None
        if weight is not None and accepted.any():
            total = Total(self.total, weight[torch.from_numpy(accepted)].sum())
        return ChunkReply(
            accepted=accepted,
            refusals=self.refusals,
            payload=concat(self.payloads) if self.payloads else None,
            total=total,
            memory=concat(self.memories) if self.memories else None,
            metrics=_double(concat(self.metrics)) if self.metrics else {},
            examples=_examples(feeds),
            payload_bytes=self.payload_bytes,
        )


def sum_up(reply: Reply, chunk: Chunk, feeds: list[Feed]) -> ChunkReply:
    """Check stacked replies, leave out what is refused, and sum under the weights where there are any."""
    count = len(chunk.ids)
    payload, refusals = _arrived(reply.payload, chunk.harm)
    accepted = _accepted(chunk, refusals)
    ok = torch.from_numpy(accepted)
    good = Reply(payload, reply.memory, reply.metrics)
    good = rows(good, ok.to(tree_leaves(good)[0].device)) if refusals else good
    total = None
    if chunk.weight is not None and accepted.any():
        weight = chunk.weight[ok]
        total = Total(weighted_sum(good.payload, weight), weight.sum())
    return ChunkReply(
        accepted=accepted,
        refusals=refusals,
        payload=good.payload if chunk.weight is None and accepted.any() else None,
        total=total,
        memory=good.memory if accepted.any() else None,
        metrics=_double(good.metrics) if accepted.any() else {},
        examples=_examples(feeds),
        payload_bytes=nbytes(reply.payload) // count,
    )


def _arrived(payload: Any, harm: Harm | None) -> tuple[Any, dict[int, str]]:
    """Payloads `[C, ...]` as they arrive, and which of them are refused, for what reason."""
    refusals = {} if harm is None else refused(payload, harm)
    if not tree_leaves(payload):
        return payload, refusals  # nothing is sent
    payload = payload if harm is None else sent(payload, harm)
    ok = finite(payload)
    if not bool(ok.all()):
        refusals = dict.fromkeys(torch.nonzero(~ok)[:, 0].tolist(), "update is not finite") | refusals
    return payload, refusals


def _accepted(chunk: Chunk, refusals: dict[int, str]) -> np.ndarray:
    accepted = np.ones(len(chunk.ids), dtype=bool)
    accepted[list(refusals)] = False
    return accepted


def _double(metrics: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (value.double().cpu(), weight.double().cpu()) for name, (value, weight) in metrics.items()}


def _examples(feeds: list[Feed]) -> int:
    return int(sum(feed.work.mask.sum() for feed in feeds))
