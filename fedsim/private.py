"""F1. Client programs that protect each example: DP-SGD and DP-Adam.

Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang, "Deep Learning with Differential Privacy", CCS 2016 (arXiv 1607.00133),
Algorithm 1. On a client with n examples, in each step:

    S = each example with chance q = min(1, batch_size / n), independently              Poisson sampling
    g_i = grad f(w; x_i),  i in S
    g = (sum_{i in S} clip(g_i) + noise * clip * N(0, I)) / batch_size                  one norm over all trainable tensors
    w = what SGD or Adam does along g

The noise is added once a step to all tensors together, and what follows is a function of g: so a reply protects each example by itself,
whoever looks at it and whatever the server does, at `noise` and q a step. No loss is sent, because nothing would protect it.

Differs: the divisor is `batch_size` also where a client has fewer examples than that; it must not depend on the sample. n is public.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from fedsim.local import Adam, Constant, Learner, Schedule, Sgd
from fedsim.params import Params
from fedsim.privacy import Clipping, Protection, clipped_sum
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.strategy import NOTHING, Count, LocalProgram
from fedsim.types import Batch, Draw, Draws, Reply

NOISE = "privacy.noise"
"""Name of the drawn numbers that become noise."""

Positive = Annotated[float, Gt(0)]


def example_gradients(problem: Problem, w: Params, batch: Batch, draws: Draws) -> Params:
    """The gradient of each example's loss in `w`. `[B, ...] -> {[B, ...]}`, padding included."""

    def loss(w: Params, x: Tensor, y: Tensor, draws: Draws) -> Tensor:
        return problem.loss(w, Batch(x[None], y[None]), {name: u[None] for name, u in draws.items()})

    if len(batch.y) == 0:  # a Poisson sample of one client alone may be empty
        return w.map(lambda v: v.new_zeros((0, *v.shape)))
    g: Params = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(w, batch.x, batch.y, draws)
    return g


class Private(LocalProgram, ABC):
    """What DP-SGD and DP-Adam share. `rule` is the optimiser that goes along the private gradient."""

    batch_size: int
    noise: float | None
    clip: float
    clipping: Clipping
    rate: float | None

    @property
    @abstractmethod
    def rule(self) -> Sgd | Adam:
        """What is done along a gradient."""

    def chances(self, sizes: np.ndarray) -> np.ndarray:
        if self.rate is not None:
            return np.full(len(sizes), self.rate)
        return np.minimum(1.0, self.batch_size / np.maximum(sizes, 1))

    def protects(self) -> Protection:
        return Protection("example", self.noise)

    def draws(self, problem: Problem, batch: int) -> dict[str, Draw]:
        return problem.draws(batch) | {NOISE: Draw("normal", (problem.size,))}

    def begin(self, problem: Problem, message: Params, memory: Any) -> Learner:
        return self.rule.begin(problem, message, memory)

    def step(self, problem: Problem, carry: Learner, batch: Batch, draws: Draws, passname: str) -> Learner:
        return self.rule.along(problem, carry, self.gradient(problem, carry.w, batch, draws))

    def gradient(self, problem: Problem, w: Params, batch: Batch, draws: Draws) -> Params:
        """A private estimate of the gradient in `w` of the sum of the sampled examples' losses over `batch_size`."""
        assert self.noise is not None  # solved for before anything trains
        g = example_gradients(problem, w, batch, {name: u for name, u in draws.items() if name != NOISE})
        total = clipped_sum(g, batch.mask, self.clip, self.clipping)
        noise = w.from_flat(draws[NOISE].to(next(iter(w.values())).dtype))
        return total.plus(noise, self.noise * self.clip) / self.batch_size

    def finish(self, problem: Problem, message: Params, carry: Learner, n: Tensor) -> Reply:
        return Reply(carry.w - message, NOTHING, {})


@register("dp-sgd")
@dataclass(frozen=True)
class DpSgd(Private):
    """SGD that protects each example: clipped one by one, Poisson-sampled, noised (Abadi et al., CCS 2016).

    noise: standard deviation of the noise over `clip`; null = what `privacy.target_epsilon` asks for.
    clip: length to which each example's gradient is cut.
    clipping: flat = by its length over all tensors; per-layer = each tensor by its own; automatic = scaled to `clip`, short ones, too.
    batch_size: examples expected in a step; a client with n of them samples with q = batch_size / n.
    rate: the same q for every client instead; the sum is still divided by `batch_size`.
    """

    lr: Positive = 0.05
    noise: Annotated[float, Ge(0)] | None = None
    clip: Positive = 1.0
    clipping: Clipping = "flat"
    epochs: Count = 1
    steps: Count | None = None
    batch_size: Count = 32
    rate: Annotated[float, Gt(0), Le(1)] | None = None
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0
    weight_decay: Annotated[float, Ge(0)] = 0.0
    proximal: Annotated[float, Ge(0)] = 0.0
    schedule: Schedule = Constant()

    @cached_property
    def rule(self) -> Sgd:
        return Sgd(self.lr, momentum=self.momentum, weight_decay=self.weight_decay, proximal=self.proximal, schedule=self.schedule)


@register("dp-adam")
@dataclass(frozen=True)
class DpAdam(Private):
    """Adam along the private gradient of `dp-sgd`, with the same fields."""

    lr: Positive = 1e-3
    noise: Annotated[float, Ge(0)] | None = None
    clip: Positive = 1.0
    clipping: Clipping = "flat"
    epochs: Count = 1
    steps: Count | None = None
    batch_size: Count = 32
    rate: Annotated[float, Gt(0), Le(1)] | None = None
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Ge(0)] = 0.0
    decoupled: bool = False
    proximal: Annotated[float, Ge(0)] = 0.0
    schedule: Schedule = Constant()

    @cached_property
    def rule(self) -> Adam:
        return Adam(
            self.lr,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            decoupled=self.decoupled,
            proximal=self.proximal,
            schedule=self.schedule,
        )
