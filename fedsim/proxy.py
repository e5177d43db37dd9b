"""F1. Training on the server's own data: mini-batches of a proxy set, and a client's program run on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.rng import Key, fold, generator
from fedsim.strategy import NOTHING, LocalProgram
from fedsim.types import Batch


def proxy_of(problem: Problem) -> Batch:
    """The server's data; a strategy that asks for them lists "proxy" in `needs`."""
    assert problem.proxy is not None
    return problem.proxy


def on_server(problem: Problem) -> Problem:
    """The problem for one model at a time: gradients by the autograd tape, which is faster there."""
    return replace(problem, taped=True)


def epoch(data: Batch, batch_size: int | None, key: Key) -> Iterator[Batch]:
    """All of `data` once, in an order that `key` decides, `batch_size` examples at a time (None: all at once)."""
    size = len(data.y)
    order = torch.from_numpy(generator(key).permutation(size)).to(data.y.device)
    for part in order.split(batch_size or size):
        yield Batch(data.x[part], data.y[part])


def tune(program: LocalProgram, problem: Problem, w: Params, data: Batch, key: Key) -> Params:
    """The model after a client's `program` ran on the server, on `data`. Dropout is off."""
    carry = program.begin(problem, w, NOTHING)
    done, limit = 0, program.steps
    for e in range(program.epochs if limit is None else limit):
        for batch in epoch(data, program.batch_size, fold(key, e)):
            if done == limit:
                break
            carry = program.step(problem, carry, batch, {}, program.passes[0])
            done += 1
    n = data.x.new_tensor(len(data.y), dtype=torch.float32)
    change: Params = program.finish(problem, w, carry, n).payload
    return w + change


def loss(problem: Problem, w: Params, data: Batch) -> Tensor:
    """Mean loss on all of `data`: a scalar."""
    with torch.no_grad():
        return problem.loss(w, data)
