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

from fedsim import rng
from fedsim.data import Lists, count_steps, plan
from fedsim.errors import ClientError
from fedsim.metrics import Record, measure, per_example
from fedsim.models import Link, chain_of, loops, vmappable
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.sim.chunk import Chunk, ChunkReply, Replies, sum_up
from fedsim.sim.descent import descend, descend_alone
from fedsim.sim.feed import Feed
from fedsim.sim.graphs import Graphs
from fedsim.sim.steps import CompiledSteps, compiled_pass, single_pass, stacked_pass
from fedsim.strategy import LocalProgram
from fedsim.tree import concat, nbytes, rows, tree_map
from fedsim.types import Batch, Reply

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


@dataclass(frozen=True)
class Trainer:
    """What a worker holds for the whole run: the problem and the resident training data.

    Attributes:
        x, y: all training examples, `[M, ...]`.
        lists: which of them belong to which client.
        calibration: which of them a client calibrates on, or None where nobody does.
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
    calibration: Lists | None = None

    @cached_property
    def _chain(self) -> tuple[Link, ...] | None:
        return chain_of(self.problem.network.module, self.x.shape[1:], convolutions=self.x.device.type != "cpu")

    @cached_property
    def _compiled(self) -> CompiledSteps:
        return {}

    @cached_property
    def _graphs(self) -> Graphs:
        return Graphs()

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

    def outputs(self, w: Params, index: np.ndarray) -> Tensor:
        """The network's output on some resident examples. `[M] -> [M, ...]`."""
        with torch.no_grad():
            return self._output(w, self.x[torch.from_numpy(index).to(self.x.device)])

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
        feeds = [self._feed(problem, program, chunk, p) for p in reversed(range(len(program.passes)))]
        execute = self._one_by_one if self.mode == "loop" else self._stacked
        try:
            return execute(problem, program, message, chunk, feeds)
        except Exception as error:
            clients = ", ".join(map(str, chunk.ids[:10])) + (", ..." if len(chunk.ids) > 10 else "")
            raise ClientError(
                f"{type(program).__name__} failed in round {chunk.version + 1}, among clients {clients}: {type(error).__name__}: {error}"
            ) from error

    def payload_bytes(self, job: tuple[LocalProgram, Any], memory: Any) -> int:
        """What one client's payload weighs in answer to a job."""
        program, message = job
        with torch.no_grad():
            reply = program.finish(self.problem, message, program.begin(self.problem, message, memory), self.problem.version + 1)
        return nbytes(reply.payload)

    def _feed(self, problem: Problem, program: LocalProgram, chunk: Chunk, p: int) -> Feed:
        lists = self.calibration if program.reads == "calibration" else self.lists
        assert lists is not None  # a scenario without calibration data was refused
        work = plan(program, lists, chunk.ids, _pass_keys(chunk, p, rng.DATA), problem.entropy)
        return Feed(program, problem, self.x, self.y, work, _pass_keys(chunk, p, rng.CLIENT))

    def _stacked(self, problem: Problem, program: LocalProgram, message: Any, chunk: Chunk, feeds: list[Feed]) -> ChunkReply:
        own = chunk.messages(message)
        begins = message if own is None else own
        reply, parts = self._stack_in_parts(problem, program, begins, chunk.memory, feeds, own is not None)
        return replace(sum_up(reply, chunk, feeds), parts=parts)

    def _stack_in_parts(
        self, problem: Problem, program: LocalProgram, message: Any, memory: Any, feeds: list[Feed], apart: bool
    ) -> tuple[Reply, int]:
        """The replies of a stack, which is halved as often as a GPU's memory asks for, and into how many parts.

        Rows stay where they are, so what is summed afterwards, and in which order, does not change.
        """
        try:
            return self._stack(problem, program, message, memory, feeds, apart), 1
        except torch.OutOfMemoryError:
            count = len(feeds[0].keys)
            if count == 1:
                raise
        torch.cuda.empty_cache()
        halves = [slice(0, count // 2), slice(count // 2, count)]
        done = []
        for half in halves:
            begins = rows(message, half) if apart else message
            part = [feed.part(half) for feed in feeds]
            done.append(self._stack_in_parts(problem, program, begins, rows(memory, half), part, apart))
        return concat([reply for reply, _ in done]), sum(parts for _, parts in done)

    def _stack(self, problem: Problem, program: LocalProgram, message: Any, memory: Any, feeds: list[Feed], apart: bool = False) -> Reply:
        """The replies of clients that run as one stacked program. `apart`: `message` is stacked, one for each client."""
        n = torch.from_numpy(feeds[0].work.n).to(self.x.device)
        each = 0 if apart else None
        carry = torch.vmap(lambda message, memory, _: program.begin(problem, message, memory), in_dims=(each, 0, 0))(message, memory, n)
        rule = program.descent(problem)
        for name, feed in zip(program.passes, feeds, strict=True):
            if self._recordable(program, problem):
                assert rule
                assert self._chain
                carry = self._graphs.descend(rule, carry, feed, self._chain)
            elif self.compile:
                carry = compiled_pass(self._compiled, carry, feed, name)
            else:
                carry = descend(rule, carry, feed, self._chain) if rule else stacked_pass(carry, feed, name)
        return torch.vmap(lambda message, carry, n: program.finish(problem, message, carry, n), in_dims=(each, 0, 0))(message, carry, n)

    def _recordable(self, program: LocalProgram, problem: Problem) -> bool:
        """Whether a step of the program can be recorded on a GPU, and replayed in the next round, too."""
        if not self.compile or self.x.device.type != "cuda" or not self._chain:
            return False
        rule = program.descent(problem)
        return rule is not None and rule == program.descent(problem.at(int(problem.version) + 1))

    def _one_by_one(self, problem: Problem, program: LocalProgram, message: Any, chunk: Chunk, feeds: list[Feed]) -> ChunkReply:
        replies = Replies(chunk)
        plain = tree_map(_channels_last, message)
        for c in range(len(chunk.ids)):
            own = chunk.single(c).messages(message)
            begins = plain if own is None else tree_map(_channels_last, rows(own, 0))
            replies.take(c, self._single(problem, program, begins, rows(chunk.memory, c), feeds, c))
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


def _pass_keys(chunk: Chunk, p: int, domain: int) -> rng.Keys:
    """One key for each client in pass `p`, counted from the last: in the domain DATA for batches, CLIENT for what steps draw. `[C]`.

    So the last pass has the batches of a program with a single pass, whatever comes before it.
    """
    return rng.fold_each(rng.fold_each(rng.fold_each(chunk.key, chunk.ids), np.array([p])), np.array([domain]))


def order(program: LocalProgram, sizes: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """`ids` by falling number of steps, then by id: neighbours share a chunk and waste little."""
    return ids[np.lexsort((ids, -count_steps(program, sizes[ids])))]
