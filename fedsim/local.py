"""F1. Client programs that everyone shares: SGD and Adam, with what papers add to them (momentum, decay, a proximal term, a schedule)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.registry import Kind, register
from fedsim.strategy import NOTHING, Count, Descent, LocalProgram
from fedsim.tree import record
from fedsim.types import Batch, Draws, Reply


class Schedule(Kind, ABC):
    """How a learning rate changes with the version of the model that a client received."""

    @abstractmethod
    def factor(self, version: Tensor) -> Tensor | float:
        """What the rate is multiplied by: a scalar."""


@register("constant")
@dataclass(frozen=True)
class Constant(Schedule):
    """The rate never changes."""

    def factor(self, version: Tensor) -> float:
        return 1.0


@register("exponential")
@dataclass(frozen=True)
class Exponential(Schedule):
    """The rate is multiplied by `decay` every round."""

    decay: Annotated[float, Gt(0)] = 0.99

    def factor(self, version: Tensor) -> Tensor:
        return torch.exp(version * math.log(self.decay))


@register("step")
@dataclass(frozen=True)
class StepDecay(Schedule):
    """The rate is multiplied by `decay` every `every` rounds."""

    every: Annotated[int, Gt(0)]
    decay: Annotated[float, Gt(0)] = 0.5

    def factor(self, version: Tensor) -> Tensor:
        return torch.exp(torch.floor(version / self.every) * math.log(self.decay))


@register("cosine")
@dataclass(frozen=True)
class Cosine(Schedule):
    """The rate falls to `floor` along half a cosine over `rounds` rounds, and stays there."""

    rounds: Annotated[int, Gt(0)]
    floor: Annotated[float, Ge(0)] = 0.0

    def factor(self, version: Tensor) -> Tensor:
        done = (version / self.rounds).clamp(max=1)
        return self.floor + (1 - self.floor) * 0.5 * (1 + torch.cos(math.pi * done))


@register("inverse-sqrt")
@dataclass(frozen=True)
class InverseSqrt(Schedule):
    """The rate is divided by `sqrt(1 + round / scale)`."""

    scale: Annotated[float, Gt(0)] = 10.0

    def factor(self, version: Tensor) -> Tensor:
        return (1 + version / self.scale).rsqrt()


@record
class Learner:
    """The carry of a gradient program: the model, what its optimiser remembers (empty where it needs none), and running sums."""

    w: Params
    anchor: Params  # the received model, where a proximal term needs it
    first: Params  # momentum, or Adam's first moment
    second: Params  # Adam's second moment
    t: Tensor  # steps taken, where the optimiser counts them
    loss: Tensor  # sum of the losses of the examples seen
    seen: Tensor  # number of examples seen


def clip(g: Params, limit: float | None) -> Params:
    """`g` scaled down to length `limit` where it is longer."""
    return g if limit is None else g * (limit / g.norm().clamp(min=1e-12)).clamp(max=1)


def tally(w: Params) -> Tensor:
    """A zero to count and sum in, beside `w`: float32 at least, because bfloat16 cannot count beyond 256."""
    first = next(iter(w.values()))
    return first.new_zeros((), dtype=torch.promote_types(first.dtype, torch.float32))


def start(w: Params, anchored: bool, first: bool, second: bool, beside: Params | None = None) -> Learner:
    """The carry before the first step. `w` may be empty where there are parameters `beside` it."""
    zero, empty = tally(w | beside if beside else w), Params({})
    return Learner(w, w if anchored else empty, w.zeros() if first else empty, w.zeros() if second else empty, zero, zero, zero)


def counted(carry: Learner, batch: Batch, loss: Tensor) -> Learner:
    """The carry, with a batch of mean loss `loss` counted in."""
    return replace(carry, loss=carry.loss + batch.n * loss, seen=carry.seen + batch.n)


def whole(message: Params, memory: Any) -> Params:
    """The model that a client begins with: what it received, and what it has of its own where a model is split."""
    return message | memory if isinstance(memory, Params) else message


def _reply(message: Params, carry: Learner) -> Reply:
    """The change of what was received, the client's own part as it is now, and the mean training loss along the way."""
    own = {k: v for k, v in carry.w.items() if k not in message}
    moved = Params({k: carry.w[k] for k in message}) if own else carry.w
    return Reply(moved - message, Params(own) if own else NOTHING, {"loss": (carry.loss, carry.seen)})


@register("sgd")
@dataclass(frozen=True)
class Sgd(LocalProgram):
    """Stochastic gradient descent, with momentum, weight decay, gradient clipping, a proximal term and a schedule, all off by default.

        g = grad f(w; batch) + weight_decay * w + proximal * (w - w_received)
        v = momentum * v + g ;  d = g + momentum * v if nesterov else v ;  w = w - lr * schedule(version) * d

    `proximal` is FedProx's mu (Li et al., MLSys 2020). `clip` bounds the length of the loss's gradient, before decay and proximal term.
    Momentum starts at zero in every round.
    """

    joins: ClassVar[bool] = True

    lr: Annotated[float, Gt(0)] = 0.05
    epochs: Count = 1
    steps: Count | None = None
    batch_size: Count | None = 32
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0
    nesterov: bool = False
    weight_decay: Annotated[float, Ge(0)] = 0.0
    clip: Annotated[float, Gt(0)] | None = None
    proximal: Annotated[float, Ge(0)] = 0.0
    schedule: Schedule = Constant()

    def begin(self, problem: Problem, message: Params, memory: Any) -> Learner:
        return start(whole(message, memory), self.proximal > 0, self.momentum > 0, second=False)

    def step(self, problem: Problem, carry: Learner, batch: Batch, draws: Draws, passname: str) -> Learner:
        g, loss = problem.grad(carry.w, batch, draws)
        return counted(self.along(problem, carry, clip(g, self.clip)), batch, loss)

    def along(self, problem: Problem, carry: Learner, g: Params) -> Learner:
        """The carry after a step along the gradient `g`, however it was come by."""
        if self.weight_decay:
            g = g + self.weight_decay * carry.w
        if self.proximal:
            g = g + self.proximal * (carry.w - carry.anchor)
        v = carry.first
        if self.momentum:
            v = self.momentum * v + g
            g = g + self.momentum * v if self.nesterov else v
        w = carry.w.plus(g, -self.lr * self.schedule.factor(problem.version))
        return Learner(w, carry.anchor, v, carry.second, carry.t, carry.loss, carry.seen)

    def finish(self, problem: Problem, message: Params, carry: Learner, n: Tensor) -> Reply:
        return _reply(message, carry)

    def ages(self) -> bool:
        return type(self) is not Sgd or self.schedule != Constant()

    def descent(self, problem: Problem) -> Descent | None:
        if self.clip is not None or (self.nesterov and self.momentum) or type(self).step is not Sgd.step:
            return None
        rate = float(self.lr * self.schedule.factor(problem.version))
        return Descent(rate, self.momentum, self.weight_decay, self.proximal)


@register("adam")
@dataclass(frozen=True)
class Adam(LocalProgram):
    """Adam (Kingma & Ba, ICLR 2015); with `decoupled` weight decay it is AdamW (Loshchilov & Hutter, ICLR 2019).

        m = beta1 m + (1 - beta1) g ;  v = beta2 v + (1 - beta2) g^2
        w = w - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Moments start at zero in every round. `proximal` and `clip` as in `sgd`.
    """

    joins: ClassVar[bool] = True

    lr: Annotated[float, Gt(0)] = 1e-3
    epochs: Count = 1
    steps: Count | None = None
    batch_size: Count | None = 32
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    eps: Annotated[float, Gt(0)] = 1e-8
    weight_decay: Annotated[float, Ge(0)] = 0.0
    decoupled: bool = False
    clip: Annotated[float, Gt(0)] | None = None
    proximal: Annotated[float, Ge(0)] = 0.0
    schedule: Schedule = Constant()

    def begin(self, problem: Problem, message: Params, memory: Any) -> Learner:
        return start(whole(message, memory), self.proximal > 0, first=True, second=True)

    def step(self, problem: Problem, carry: Learner, batch: Batch, draws: Draws, passname: str) -> Learner:
        g, loss = problem.grad(carry.w, batch, draws)
        return counted(self.along(problem, carry, clip(g, self.clip)), batch, loss)

    def along(self, problem: Problem, carry: Learner, g: Params) -> Learner:
        """The carry after a step along the gradient `g`, however it was come by."""
        lr = self.lr * self.schedule.factor(problem.version)
        w = carry.w
        if self.weight_decay and self.decoupled:
            w = w * (1 - lr * self.weight_decay)
        elif self.weight_decay:
            g = g + self.weight_decay * w
        if self.proximal:
            g = g + self.proximal * (carry.w - carry.anchor)
        t = carry.t + 1
        m = self.beta1 * carry.first + (1 - self.beta1) * g
        v = self.beta2 * carry.second + (1 - self.beta2) * (g * g)
        w = w.plus((m / (1 - self.beta1**t)) / ((v / (1 - self.beta2**t)).sqrt() + self.eps), -lr)
        return Learner(w, carry.anchor, m, v, t, carry.loss, carry.seen)

    def finish(self, problem: Problem, message: Params, carry: Learner, n: Tensor) -> Reply:
        return _reply(message, carry)

    def ages(self) -> bool:
        return type(self) is not Adam or self.schedule != Constant()
