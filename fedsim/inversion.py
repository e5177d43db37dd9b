"""F1. From an update back to data that give it: gradient inversion through a client's own program, for many clients at once.

    find x, y:   min || local(w; x, targets(y)) - w - Delta || / || Delta ||      over the matched entries of Delta

`local` is the client's program itself, differentiated through all of its steps, each on the whole of (x, y): the number of steps is that
of the client. The search is Adam on x, whose gradient is replaced by its sign (Geiping et al., NeurIPS 2020, arXiv 2003.14053), and on y;
the rate falls to a tenth after 3/8, 5/8 and 7/8 of the iterations, and x is kept within what an input can be.

The program must have one pass, must not look at the values of tensors (it runs under `torch.vmap`), and must be differentiable where a
gradient is zero: `sgd` is, `adam` is not under ReLU, and a search that meets a NaN ends with `lowest = inf`. Dropout is off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedsim import rng
from fedsim.errors import FedsimError
from fedsim.params import Params
from fedsim.problem import Inputs, Problem
from fedsim.steps import count_steps
from fedsim.strategy import NOTHING, LocalProgram
from fedsim.tree import concat, record, rows, tree_map
from fedsim.types import Batch

Norm = Literal["l1", "l2"]
"""In which a mismatch is measured. l1 is the paper's; its gradient does not fade near the end, and a search of hundreds of iterations
stalls where one by l2 goes on (scenarios/papers/unstale.yaml has figures)."""


@record
class Guess:
    """Data of a client, as far as an update tells: inputs `x` `[M, ...]`, and numbers `y` `[M, outputs]` that the task makes targets of."""

    x: Tensor
    y: Tensor


@record
class Sent:
    """What a server knows of updates, stacked `[U, ...]`: the model each began with, its version, the client's steps, and the change."""

    started: Params
    version: Tensor
    steps: Tensor
    change: Params


@dataclass(frozen=True)
class Search:
    """How long and how boldly to look. tolerance: relative mismatch that is good enough; keep: share of the entries that are matched."""

    iterations: int
    lr: float
    tolerance: float = 0.0
    keep: float = 1.0
    norm: Norm = "l2"


@record
class Found:
    """Where the search for each update stands, stacked `[U, ...]`: the best guess, its mismatch, and how many iterations it took."""

    guess: Guess
    lowest: Tensor
    iterations: Tensor


@record
class _Hunt:
    sent: Sent
    matched: Params  # 1 where an entry counts, else 0
    guess: Guess
    first: Guess  # moments of Adam
    second: Guess
    best: Found
    who: Tensor  # row in the answer


def inputs_of(problem: Problem) -> Inputs:
    """What an input can be, or an error where inputs are not real numbers."""
    if problem.inputs is None:
        raise FedsimError("inputs cannot be reconstructed: they are tokens, or the problem does not say what they can be")
    return problem.inputs


def sent_by(program: LocalProgram, started: Params, version: Tensor, n: Tensor, change: Params) -> Sent:
    """The record of updates of clients with `n` examples each."""
    steps = torch.from_numpy(count_steps(program, n.cpu().numpy())).to(next(iter(change.values())).device)
    return Sent(started, version, steps, change)


def draw(problem: Problem, w: Params, examples: int, keys: rng.Keys) -> Guess:
    """A first guess for each key: everything standard normal, inputs cut to their range. Stacked `[U, ...]`."""
    inputs, like = inputs_of(problem), next(iter(w.values()))
    shapes = (examples, *inputs.shape), (examples, problem.task.outputs)
    x, y = (torch.from_numpy(rng.normal(rng.fold_each(keys, np.array([i])), shape)).to(like) for i, shape in enumerate(shapes))
    return Guess(x.clamp(inputs.low, inputs.high), y)


def blank(problem: Problem, w: Params, examples: int) -> Guess:
    """A guess of zeros, for one client."""
    like = next(iter(w.values()))
    return Guess(like.new_zeros(examples, *inputs_of(problem).shape), like.new_zeros(examples, problem.task.outputs))


def replay(problem: Problem, program: LocalProgram, sent: Sent, guess: Guess) -> Params:
    """The changes that the clients' program makes to `sent.started` on guessed data. Stacked `[U, ...]`; differentiable in `guess`."""
    most = int(sent.steps.max())
    even = bool((sent.steps == most).all())

    def single(w: Params, version: Tensor, steps: Tensor, guess: Guess) -> Params:
        seen = replace(problem, version=version, taped=False)
        batch = Batch(guess.x, problem.task.targets(guess.y))
        carry = program.begin(seen, w, NOTHING)
        for s in range(most):
            after = program.step(seen, carry, batch, {}, program.passes[0])
            carry = after if even else tree_map(lambda new, old, s=s: torch.where(s < steps, new, old), after, carry)
        change: Params = program.finish(seen, w, carry, guess.y.new_tensor(len(guess.y))).payload
        return change

    return torch.vmap(single)(sent.started, sent.version.to(problem.version), sent.steps, guess)


def distance(a: Params, b: Params) -> Tensor:
    """`||a - b||_1` of each row. `[U]`."""
    return (a - b).flat().abs().sum(1)


def largest(change: Params, keep: float) -> Params:
    """1 at the share `keep` of each row's entries that is largest in magnitude (at least one entry), 0 elsewhere. `[U, ...]`."""
    size = change.flat().abs()
    chosen = size.topk(math.ceil(keep * size.shape[1]), dim=1).indices
    mask: Params = torch.vmap(rows(change, 0).from_flat)(torch.zeros_like(size).scatter_(1, chosen, 1.0))
    return mask


def invert(problem: Problem, program: LocalProgram, search: Search, sent: Sent, guess: Guess) -> Found:
    """The best guess for each update, from a first one. What is found for an update does not depend on the others beside it."""
    count = len(sent.steps)
    start = Found(guess, sent.steps.new_full((count,), math.inf, dtype=torch.float64), torch.zeros_like(sent.steps))
    zero = tree_map(torch.zeros_like, guess)
    matched = largest(sent.change, search.keep)
    hunt = _Hunt(sent, matched, guess, zero, zero, start, torch.arange(count, device=sent.steps.device))
    finished = []
    for k in range(search.iterations):
        hunt = _move(problem, program, search, hunt, k)
        over = hunt.best.lowest <= search.tolerance  # [U]
        if bool(over.any()):
            finished.append(rows(hunt, over))
            hunt = rows(hunt, ~over)
        if not len(hunt.who):
            break
    together = concat([*finished, hunt])
    found: Found = rows(together.best, together.who.argsort())
    return found


def _move(problem: Problem, program: LocalProgram, search: Search, hunt: _Hunt, k: int) -> _Hunt:
    """Iteration `k`: note how good the guess is, then step along the gradient of its mismatch."""
    square = search.norm == "l2"

    def size(change: Params) -> Tensor:  # [U]
        entries = (change * hunt.matched).flat()
        return (entries.square() if square else entries.abs()).sum(1)

    whole = size(hunt.sent.change)
    whole = whole + (whole == 0)

    def mismatch(guess: Guess) -> tuple[Tensor, Tensor]:
        each = size(replay(problem, program, hunt.sent, guess) - hunt.sent.change) / whole  # [U]
        return each.sum(), each  # rows do not meet, so the gradient of the sum is that of each

    slope, (_, each) = torch.func.grad_and_value(mismatch, has_aux=True)(hunt.guess)
    each = each.sqrt() if square else each
    better = each < hunt.best.lowest
    best = tree_map(lambda new, old: torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old), hunt.guess, hunt.best.guess)
    noted = Found(best, torch.where(better, each.double(), hunt.best.lowest), hunt.best.iterations + 1)
    guess, first, second = _step(problem, search, hunt, slope, k)
    return replace(hunt, guess=guess, first=first, second=second, best=noted)


def _step(problem: Problem, search: Search, hunt: _Hunt, slope: Guess, k: int) -> tuple[Guess, Guess, Guess]:
    """Adam from a guess along a gradient: the next guess, and both moments."""
    rate = search.lr * 0.1 ** sum(8 * k >= part * search.iterations for part in (3, 5, 7))
    g = Guess(slope.x.sign(), slope.y)
    first = tree_map(lambda m, g: 0.9 * m + 0.1 * g, hunt.first, g)
    second = tree_map(lambda v, g: 0.999 * v + 0.001 * g * g, hunt.second, g)
    ahead = tree_map(lambda m, v: (m / (1 - 0.9 ** (k + 1))) / ((v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8), first, second)
    moved: Guess = tree_map(lambda z, d: z - rate * d, hunt.guess, ahead)
    inputs = inputs_of(problem)
    return Guess(moved.x.clamp(inputs.low, inputs.high), moved.y), first, second
