"""Plain gradient descent in place: what most clients do, without storing a second model or, in a chain of layers, a gradient.

The same as running the program's own `step`, up to rounding; `tests/test_descent.py` holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fedsim.local import Descent, Learner
from fedsim.models import Link, matrix, unshared
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.sim.feed import Feed
from fedsim.tree import nbytes
from fedsim.types import Batch, Draws

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Mover:
    """The model on its way, and what moves it. All tensors are stacks `[C, ...]`, or all are one client's.

    Attributes:
        rule: the constants.
        w: the model, written in place.
        v: momentum, likewise; empty where there is none.
        received: the model that a proximal term holds on to; empty where there is none.
    """

    rule: Descent
    w: Tensors
    v: Tensors
    received: Tensors

    @staticmethod
    def of(rule: Descent, w: Tensors, received: Tensors) -> Mover:
        """At the start, at a private copy of the model."""
        v = {name: torch.zeros_like(value) for name, value in w.items()} if rule.momentum else {}
        return Mover(rule, w, v, received if rule.proximal else {})

    def __len__(self) -> int:
        return len(next(iter(self.w.values())))

    def part(self, own: slice) -> Mover:
        """Some clients of the stack, sharing its memory."""
        return Mover(self.rule, *({k: t[own] for k, t in tensors.items()} for tensors in (self.w, self.v, self.received)))

    def move(self, gradients: list[Tensor]) -> None:
        """One step along gradients in the order of `w`."""
        rule, w = self.rule, list(self.w.values())
        v, away = list(self.v.values()), self._away()
        if not rule.momentum:
            if rule.decay:
                torch._foreach_mul_(w, 1 - rule.rate * rule.decay)
            if away:
                torch._foreach_add_(w, away, alpha=-rule.rate * rule.proximal)
            torch._foreach_add_(w, gradients, alpha=-rule.rate)
            return
        torch._foreach_mul_(v, rule.momentum)
        torch._foreach_add_(v, gradients)
        if rule.decay:
            torch._foreach_add_(v, w, alpha=rule.decay)
        if away:
            torch._foreach_add_(v, away, alpha=rule.proximal)
        torch._foreach_add_(w, v, alpha=-rule.rate)

    def _away(self) -> list[Tensor]:
        """`w - w_received`, where a proximal term asks for it: exactly zero at the start."""
        return [self.w[name] - received for name, received in self.received.items()]

    def move_along(self, name: str, a: Tensor, b: Tensor | None) -> None:
        """One step of the parameter `name` alone: along the gradient `a @ b` `[C, m, n]`, which is never stored, or along `a`."""
        rule, w = self.rule, matrix(self.w[name])
        away = w - matrix(self.received[name]) if rule.proximal else None
        if not rule.momentum:
            _add_product(w, a, b, 1 - rule.rate * rule.decay, -rule.rate)
            if away is not None:
                w.add_(away, alpha=-rule.rate * rule.proximal)
            return
        v = matrix(self.v[name])
        _add_product(v, a, b, rule.momentum, 1.0)
        if rule.decay:
            v.add_(w, alpha=rule.decay)
        if away is not None:
            v.add_(away, alpha=rule.proximal)
        w.add_(v, alpha=-rule.rate)


def _add_product(target: Tensor, a: Tensor, b: Tensor | None, beta: float, alpha: float) -> None:
    """`target = beta * target + alpha * (a @ b)`, in one pass; `a` alone where `b` is None."""
    if b is not None:
        target.baddbmm_(a, b, beta=beta, alpha=alpha)
        return
    if beta != 1:
        target.mul_(beta)
    target.add_(a, alpha=alpha)


def descend(rule: Descent, carry: Learner, feed: Feed, chain: tuple[Link, ...] | None) -> Learner:
    """All steps of a pass for a stack of clients: in closed form along a `chain`, else by gradients under `vmap`."""
    mover = Mover.of(rule, {k: unshared(v) for k, v in carry.w.items()}, dict(carry.w))
    loss, seen = carry.loss.clone(), carry.seen.clone()
    step = by_chain(feed.problem, chain) if chain else _by_vmap(feed.problem)
    for own in _groups(carry) if chain else [slice(0, len(loss))]:
        part, group, losses, count = feed.part(own), mover.part(own), loss[own], seen[own]
        running = group
        for s, active in enumerate(part.active):
            now = slice(0, active)
            if active < len(running):
                running = group.part(now)
            lost, examples = step(running, part.batch(s), part.draws(s))
            losses[now] += lost
            count[now] += examples
    return replace(carry, w=Params(mover.w), loss=loss, seen=seen)


CACHE = 4 << 20
"""Bytes of models that take their steps together: what fits in a core's own cache. Measured on 784-200-10 (636 kB a model), 20 examples a
step: 0.20 ms a client-step in groups of two, 0.18 of five or six, 0.29 of twenty-five."""


def _groups(carry: Learner) -> list[slice]:
    """Neighbours that run all their steps before the next ones begin. On a GPU, everybody."""
    count, size = len(carry.loss), nbytes(carry.w)
    width = count if carry.loss.device.type != "cpu" else max(1, int(CACHE * count // max(size, 1)))
    return [slice(start, min(start + width, count)) for start in range(0, count, width)]


Step = Callable[[Mover, Batch, Draws], tuple[Tensor, Tensor]]
"""One step of a stack of clients: moves them, and gives the sum of their examples' losses and the number of examples, `[C]` each."""


def _by_vmap(problem: Problem) -> Step:
    gradient = torch.vmap(problem.grad)

    def step(mover: Mover, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        assert batch.mask is not None
        g, loss = gradient(Params(mover.w), batch, draws)
        mover.move(list(g.values()))
        count = batch.mask.sum(1)
        return loss * count, count

    return step


def by_chain(problem: Problem, chain: tuple[Link, ...]) -> Step:
    """A step in closed form."""
    lowest = next(i for i, link in enumerate(chain) if link.learns)

    @torch.no_grad()
    def step(mover: Mover, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        assert batch.mask is not None
        count = batch.mask.sum(1)  # [C]
        values, kept = [batch.x], []  # the input of each link, and the output
        for link in chain:
            y, aside = link.forward(mover.w, values[-1], draws)
            values.append(y)
            kept.append(aside)
        each, slope = problem.task.slope(values[-1].flatten(0, 1), batch.y.flatten(0, 1))  # [C * B], [C * B, K]
        d = slope.view(values[-1].shape) * (batch.mask / count[:, None]).to(slope.dtype)[..., None]
        for i, (x, y) in reversed(list(enumerate(pairwise(values)))[lowest:]):
            d = chain[i].backward(mover.w, x, y, kept[i], d, i == lowest, mover.move_along)
        return (each.view(batch.mask.shape) * batch.mask).sum(1), count

    return step


def descend_alone(rule: Descent, carry: Learner, feed: Feed, c: int) -> Learner:
    """All steps of a pass for client `c`, by the autograd tape on resident leaves."""
    leaves = carry.w.map(lambda v: v.detach().clone().requires_grad_())
    mover = Mover.of(rule, dict(leaves), dict(carry.w))
    parameters = list(leaves.values())
    loss, seen = carry.loss, carry.seen
    for s in range(int(feed.work.steps[c])):
        batch, draws = feed.single(c, s)
        mean = feed.problem.loss(leaves, batch, draws)
        gradients: Any = torch.autograd.grad(mean, parameters, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            mover.move(list(gradients))
        loss, seen = loss + batch.n * mean.detach(), seen + batch.n
    return replace(carry, w=leaves.detach(), loss=loss, seen=seen)
