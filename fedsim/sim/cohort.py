"""A chunk of clients as one program: the unit of work, of vectorisation and of reduction.

`Trainer.train` runs a client program for the clients of one chunk, stacked under `torch.vmap` or one after the other, and either keeps
their payloads or sums them under weights. What it computes is a function of its arguments alone, so a chunk may run anywhere, twice, or
again after a worker died.

How a chunk is executed (`mode`) changes speed, and results only by rounding; `choose_mode` is the documented rule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fedsim import rng
from fedsim.data import Lists, count_steps, plan
from fedsim.errors import ClientError
from fedsim.metrics import Record, measure, per_example
from fedsim.models import Link, chain_of, loops, vmappable
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.sim.descent import descend, descend_alone
from fedsim.sim.feed import Feed
from fedsim.sim.steps import CompiledSteps, compiled_pass, single_pass, stacked_pass
from fedsim.strategy import LocalProgram
from fedsim.tree import add, concat, finite, nbytes, record, rows, stack, tree_map, weighted_sum
from fedsim.types import Batch, Metrics, Reply, Total, add_metrics

Mode = Literal["loop", "vmap"]

LARGE = 200_000
"""Parameters beyond which a dense model on a CPU runs one client at a time. Measured on perceptrons, ten clients of 20 examples a step:
stacked is 1.5 times faster up to 160,000 parameters, 1.2 times at 320,000, and 2.3 times slower at 1.3 million."""


FEW = 100
"""Examples that a convolutional network sees at a time in evaluation on a CPU. Measured on pfl's CNN: 0.5 ms an example in hundreds, 0.8 in
two thousands, 1.3 of them in PyTorch's own layout."""


def choose_mode(module: nn.Module, parameters: int, device: str) -> Mode:
    """How chunks are executed where the scenario leaves it open.

    One client after the other for recurrent layers (which do not vectorise), and on a CPU for convolutions and for models of more than
    `LARGE` parameters, where stacking costs more memory traffic than it saves in dispatch. Otherwise stacked.
    """
    if not vmappable(module):
        return "loop"
    if device == "cpu" and (loops(module) or parameters > LARGE):
        return "loop"
    return "vmap"


@record
class Chunk:
    """Clients that run together, sorted by falling number of steps.

    Attributes:
        ids: `[C]` int64.
        version: of the model they received.
        key: the round's client key.
        memory: their device memories, stacked.
        weight: what each payload counts in the sum `[C]`, or None to keep the payloads apart.
    """

    ids: np.ndarray
    version: int
    key: rng.Key
    memory: Any
    weight: Tensor | None


@record
class ChunkReply:
    """What a chunk gives back. Rows of rejected clients are in neither `payload` nor `total`, nor in `memory`.

    Attributes:
        accepted: which clients passed the checks, `[C]` bool.
        payload: of the accepted clients, stacked, where no weights were given.
        total: the weighted sum of the accepted payloads, where weights were given.
        memory: new device memories of the accepted clients, stacked.
        metrics: summed over the accepted clients, `{name: (sum, weight)}`.
        examples: training examples processed by all clients of the chunk.
        payload_bytes: what one client's payload weighs.
        parts: into how many parts the stack was cut for want of memory; 1 = it was not.
    """

    accepted: np.ndarray
    payload: Any
    total: Total | None
    memory: Any
    metrics: Metrics
    examples: int
    payload_bytes: int
    parts: int = 1


@dataclass(frozen=True)
class Trainer:
    """What a worker holds for the whole run: the problem and the resident training data.

    Attributes:
        x, y: all training examples, `[M, ...]`.
        lists: which of them belong to which client.
        mode: how chunks are executed.
        test: the server's test examples, or None where nothing is evaluated.
        compile: compile every program's step.
    """

    problem: Problem
    x: Tensor
    y: Tensor
    lists: Lists
    mode: Mode
    test: Batch | None = None
    compile: bool = False

    @cached_property
    def _chain(self) -> tuple[Link, ...] | None:
        return chain_of(self.problem.network.module, self.x.shape[1:])

    @cached_property
    def _compiled(self) -> CompiledSteps:
        return {}

    def freeze(self, frozen: Params | None) -> Trainer:
        """The same trainer, whose programs see `frozen` as the model of an earlier phase."""
        return replace(self, problem=replace(self.problem, frozen=frozen))

    def measure(self, w: Params, part: slice) -> Record:
        """The additive record of a model on a part of the test set."""
        assert self.test is not None
        x, y = self.test.x[part], self.test.y[part]
        with torch.no_grad():
            return measure(self.problem.task, self._output(w, x), y, torch.ones(len(y), device=y.device))

    def score(self, w: Params, index: np.ndarray) -> Record:
        """Loss and correctness of a model on each of some resident examples. `[M] -> {name: [M]}`."""
        places = torch.from_numpy(index).to(self.x.device)
        with torch.no_grad():
            return per_example(self.problem.task, self._output(w, self.x[places]), self.y[places])

    def _output(self, w: Params, x: Tensor) -> Tensor:
        """The network's output in evaluation. On a CPU convolutions get a few pictures at a time, so that activations stay in the cache."""
        if self.mode != "loop" or x.device.type != "cpu":
            return self.problem.output(w, x)
        w = tree_map(_channels_last, w)
        return torch.cat([self.problem.output(w, part) for part in x.split(FEW)])

    def train(self, job: tuple[LocalProgram, Any], chunk: Chunk) -> ChunkReply:
        """Run a program on a message for every client of the chunk. One that raises is a `ClientError`: program, round and clients."""
        program, message = job
        problem = replace(self.problem.at(chunk.version), taped=self.mode == "loop" and not self.compile)
        chunk = replace(chunk, memory=tree_map(lambda leaf: leaf.to(self.x.device), chunk.memory))
        feeds = [self._feed(problem, program, chunk, p) for p in range(len(program.passes))]
        execute = self._one_by_one if self.mode == "loop" else self._stacked
        try:
            return execute(problem, program, message, chunk, feeds)
        except Exception as error:
            clients = ", ".join(map(str, chunk.ids[:10])) + (", ..." if len(chunk.ids) > 10 else "")
            raise ClientError(
                f"{type(program).__name__} failed in round {chunk.version + 1}, among clients {clients}: {type(error).__name__}: {error}"
            ) from error

    def _feed(self, problem: Problem, program: LocalProgram, chunk: Chunk, p: int) -> Feed:
        work = plan(program, self.lists, chunk.ids, _pass_keys(chunk, p, rng.DATA), problem.entropy)
        return Feed(program, problem, self.x, self.y, work, _pass_keys(chunk, p, rng.CLIENT))

    def _stacked(self, problem: Problem, program: LocalProgram, message: Any, chunk: Chunk, feeds: list[Feed]) -> ChunkReply:
        reply, parts = self._stack_in_parts(problem, program, message, chunk.memory, feeds)
        return replace(_sum_up(reply, chunk, feeds), parts=parts)

    def _stack_in_parts(self, problem: Problem, program: LocalProgram, message: Any, memory: Any, feeds: list[Feed]) -> tuple[Reply, int]:
        """The replies of a stack, which is halved as often as a GPU's memory asks for, and into how many parts.

        Rows stay where they are, so what is summed afterwards, and in which order, does not change.
        """
        try:
            return self._stack(problem, program, message, memory, feeds), 1
        except torch.OutOfMemoryError:
            count = len(feeds[0].keys)
            if count == 1:
                raise
        torch.cuda.empty_cache()
        halves = [slice(0, count // 2), slice(count // 2, count)]
        done = [self._stack_in_parts(problem, program, message, rows(memory, h), [f.part(h) for f in feeds]) for h in halves]
        return concat([reply for reply, _ in done]), sum(parts for _, parts in done)

    def _stack(self, problem: Problem, program: LocalProgram, message: Any, memory: Any, feeds: list[Feed]) -> Reply:
        """The replies of clients that run as one stacked program."""
        n = torch.from_numpy(feeds[0].work.n).to(self.x.device)
        carry = torch.vmap(lambda memory, _: program.begin(problem, message, memory))(memory, n)
        rule = program.descent(problem)
        for name, feed in zip(program.passes, feeds, strict=True):
            if self.compile:
                carry = compiled_pass(self._compiled, carry, feed, name)
            else:
                carry = descend(rule, carry, feed, self._chain) if rule else stacked_pass(carry, feed, name)
        return torch.vmap(lambda carry, n: program.finish(problem, message, carry, n))(carry, n)

    def _one_by_one(self, problem: Problem, program: LocalProgram, message: Any, chunk: Chunk, feeds: list[Feed]) -> ChunkReply:
        replies = _Replies(chunk)
        message = tree_map(_channels_last, message)
        for c in range(len(chunk.ids)):
            replies.take(c, self._single(problem, program, message, rows(chunk.memory, c), feeds, c))
        return replies.sum_up(feeds)

    def _single(self, problem: Problem, program: LocalProgram, message: Any, memory: Any, feeds: list[Feed], c: int) -> Reply:
        """The reply of client `c` alone."""
        rule = program.descent(problem)
        if self.compile or (rule and self._chain):
            alone, stack = [feed.part(slice(c, c + 1)) for feed in feeds], tree_map(lambda leaf: leaf[None], memory)
            return rows(self._stack(problem, program, message, stack, alone), 0)
        carry = program.begin(problem, message, memory)
        for name, feed in zip(program.passes, feeds, strict=True):
            carry = descend_alone(rule, carry, feed, c) if rule else single_pass(carry, feed, c, name)
        return program.finish(problem, message, carry, torch.tensor(feeds[0].work.n[c], device=self.x.device))


def _channels_last(leaf: Any) -> Any:
    """A convolution's weights in the layout that is faster on a CPU (pooling most of all), and carries over to what is computed with them.

    `contiguous(memory_format=...)` would leave weights of a single input channel as they are.
    """
    if not isinstance(leaf, Tensor) or leaf.ndim != 4:
        return leaf
    _, channels, height, width = leaf.shape
    strides = (channels * height * width, 1, channels * width, channels)
    return torch.empty_strided(leaf.shape, strides, dtype=leaf.dtype, device=leaf.device).copy_(leaf)


class _Replies:
    """Replies that come one by one: payloads are added to a running sum as they arrive, or kept."""

    def __init__(self, chunk: Chunk):
        self.chunk = chunk
        self.accepted = np.zeros(len(chunk.ids), dtype=bool)
        self.total: Any = None
        self.payloads: list[Any] = []
        self.memories: list[Any] = []
        self.metrics: Metrics = {}
        self.payload_bytes = 0

    def take(self, c: int, reply: Reply) -> None:
        self.payload_bytes = nbytes(reply.payload)
        if not bool(finite(tree_map(lambda leaf: leaf[None], reply.payload))):
            return
        self.accepted[c] = True
        self.memories.append(reply.memory)
        self.metrics = add_metrics(self.metrics, {k: (float(value), float(weight)) for k, (value, weight) in reply.metrics.items()})
        if self.chunk.weight is None:
            self.payloads.append(reply.payload)
        else:
            scaled = pytree.tree_map(lambda leaf: leaf * self.chunk.weight[c].to(leaf.dtype), reply.payload)  # type: ignore[index]
            self.total = scaled if self.total is None else add(self.total, scaled)

    def sum_up(self, feeds: list[Feed]) -> ChunkReply:
        weight = self.chunk.weight
        total = None
        if weight is not None and self.accepted.any():
            total = Total(self.total, weight[torch.from_numpy(self.accepted)].sum())
        return ChunkReply(
            accepted=self.accepted,
            payload=stack(self.payloads) if self.payloads else None,
            total=total,
            memory=stack(self.memories) if self.memories else None,
            metrics=self.metrics,
            examples=_examples(feeds),
            payload_bytes=self.payload_bytes,
        )


def _sum_up(reply: Reply, chunk: Chunk, feeds: list[Feed]) -> ChunkReply:
    """Check stacked replies, leave out what is not finite, and sum under the weights where there are any."""
    ok = finite(reply.payload)
    count, any_ok = len(chunk.ids), bool(ok.any())
    good = reply if bool(ok.all()) else rows(reply, ok)
    total = None
    if chunk.weight is not None and any_ok:
        weight = chunk.weight.to(ok.device)[ok]
        total = Total(weighted_sum(good.payload, weight), weight.sum())
    return ChunkReply(
        accepted=ok.cpu().numpy(),
        payload=good.payload if chunk.weight is None and any_ok else None,
        total=total,
        memory=good.memory if any_ok else None,
        metrics={k: (float(value.double().sum()), float(weight.double().sum())) for k, (value, weight) in good.metrics.items()},
        examples=_examples(feeds),
        payload_bytes=nbytes(reply.payload) // count,
    )


def _examples(feeds: list[Feed]) -> int:
    return int(sum(feed.work.mask.sum() for feed in feeds))


def _pass_keys(chunk: Chunk, p: int, domain: int) -> rng.Keys:
    """One key for each client in pass `p`: in the domain DATA for batches, CLIENT for what steps draw. `[C]`."""
    return rng.fold_each(rng.fold_each(rng.fold_each(chunk.key, chunk.ids), np.array([p])), np.array([domain]))


def order(program: LocalProgram, sizes: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """`ids` by falling number of steps, then by id: neighbours share a chunk and waste little."""
    return ids[np.lexsort((ids, -count_steps(program, sizes[ids])))]
