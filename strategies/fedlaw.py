"""FedLAW: how much each client counts, and how much the model is shrunk, are learned on the server's own data.

Li, Lin, Shang, Wu, "Revisiting Weighted Aggregation in Federated Learning with Neural Networks", ICML 2023 (arXiv 2302.10911).

    client i:  w_i = local(w)
    server:    w <- gamma * sum_{i in S} lambda_i w_i,   lambda on the simplex, gamma > 0, by `epochs` of `optimiser` on the proxy loss

    exp:   lambda = softmax(z), gamma = e^x;           start  z_i = log n_i / sum_S n, x = 0: FedAvg
    quad:  lambda_i = z_i^2 / |z|^2, gamma = x^2;      start  z_i = sqrt(1/|S|), x = 1: the plain mean

The gradient takes one backward pass, g = dL/dw, and two dot products a client: one for the model, one for d_i = <g, w_i - w_received>.

    exp:   dL/dz_i = gamma lambda_i (d_i - sum_j lambda_j d_j);         dL/dx = <g, w>
    quad:  dL/dz_i = gamma 2 z_i / |z|^2 (d_i - sum_j lambda_j d_j);    dL/dx = 2 x <g, w / gamma>

z, x and the optimiser start afresh in every round. gamma is free to be above 1. The last iterate is taken.

    order: joint               z and x together, `epochs` long
           lambda-then-gamma   z for half of the epochs (gamma = 1), then x for the other half
           lambda              z alone, `epochs` long: gamma stays 1; not the paper's
    swa:   the first half takes the mean of z over the ends of its epochs from the seventh on, with the rate rising towards 0.05

Differs: a client's momentum starts at zero in each round (in the authors' code it lives on); dropout is off on the server; a client trains
on all of its data (there, 30 % are held out; `data.client_test` does that). The rate for CIFAR-10 is 0.01 there, 0.005 elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor

from fedsim.local import Sgd
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.proxy import epoch, loss, on_server, proxy_of
from fedsim.registry import register
from fedsim.rng import Key, fold
from fedsim.strategy import Count, LocalProgram, Report, Strategy
from fedsim.tree import record
from fedsim.types import Arrivals, Updates

SWA_FROM = 7
"""The first epoch, counted from 1, whose z goes into the mean."""


@record
class Learned:
    """The model, and how it came about."""

    w: Params
    gamma: Tensor  # scalar
    weights: Tensor  # lambda, [C]
    proxy_loss: Tensor  # at the start (lambda and gamma as they begin) and at the end, [2]
    coherence: Tensor  # mean cosine between two clients' changes, and between a change and the mean change, [2]


@dataclass(frozen=True)
class Mixture:
    """w(z, x) = gamma(x) * sum_i lambda_i(z) w_i, and its gradient."""

    form: Literal["exp", "quad"]
    received: Tensor  # the model that clients began with, [P]
    changes: Tensor  # Delta_i, [C, P]

    def start(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """z `[C]` and x `[1]` before the first step."""
        n = n.to(self.received)
        z = (n / n.sum()).log() if self.form == "exp" else torch.full_like(n, len(n) ** -0.5)
        return z, n.new_full((1,), float(self.form == "quad"))

    def weights(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """lambda `[C]` and gamma `[1]`."""
        return (z.softmax(0), x.exp()) if self.form == "exp" else (z.square() / z.square().sum(), x.square())

    def model(self, z: Tensor, x: Tensor) -> Tensor:
        share, gamma = self.weights(z, x)
        return gamma * (self.received + share @ self.changes)  # [P]

    def gradient(self, g: Tensor, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """dL/dz `[C]` and dL/dx `[1]`, from g = dL/dw `[P]` at w(z, x)."""
        (share, gamma), d = self.weights(z, x), self.changes @ g  # [C]
        whole = self.received @ g + share @ d  # <g, sum_i lambda_i w_i>
        d = d - d[0]  # no matter to the difference below, and exactly zero for clients that changed alike
        if self.form == "exp":
            return gamma * share * (d - share @ d), gamma * whole
        return gamma * 2 * z / z.square().sum() * (d - share @ d), 2 * x * whole


def coherence(changes: Tensor) -> Tensor:
    """Mean cosine between two rows, and between a row and the mean row. NaN for a single row. `[C, P] -> [2]`."""
    count, units = len(changes), torch.nn.functional.normalize(changes, dim=1).sum(0)
    mean = changes.mean(0)
    pairs = (units @ units - count) / (count * (count - 1)) if count > 1 else units.new_tensor(math.nan)
    return torch.stack([pairs, units @ mean / (count * mean.norm())])


@register("fedlaw")
@dataclass(frozen=True)
class FedLAW(Strategy):
    """Learn the aggregation weights and a shrinking factor on proxy data (Li et al., ICML 2023)."""

    needs: ClassVar[frozenset[str]] = frozenset({"proxy"})
    paces: ClassVar[frozenset[str]] = frozenset({"sync"})  # models are averaged: all must have begun with the same

    local: LocalProgram = Sgd()
    form: Literal["exp", "quad"] = "exp"
    optimiser: Literal["adam", "sgd"] = "adam"
    lr: Annotated[float, Gt(0)] = 0.005
    epochs: Count = 20
    batch_size: Count | None = 128
    order: Literal["joint", "lambda-then-gamma", "lambda"] = "joint"
    swa: bool = False

    def __post_init__(self) -> None:
        if self.swa and self.order != "lambda-then-gamma":
            raise ValueError("swa: averages lambda before gamma is learned; set order: lambda-then-gamma")
        if self.order == "lambda-then-gamma" and self.epochs < (least := 2 * SWA_FROM if self.swa else 2):
            raise ValueError(f"epochs: half of them are for lambda, so there must be at least {least}")

    def init(self, problem: Problem, w: Params) -> Learned:
        unknown = torch.full((2,), math.nan)
        return Learned(w, torch.ones(()), torch.zeros(0), unknown, unknown)

    def server(self, problem: Problem, state: Learned, updates: Updates, key: Key) -> Learned:
        problem, proxy = on_server(problem), proxy_of(problem)
        mixture = Mixture(self.form, state.w.vector(), updates.payload.flat())
        z, x = mixture.start(updates.arrivals.n)
        before = loss(problem, state.w.from_flat(mixture.model(z, x)), proxy)
        if self.order != "lambda-then-gamma":
            self._descend(problem, state.w, mixture, z, x, (z, x) if self.order == "joint" else (z,), self.epochs, key)
        else:
            z = self._descend(problem, state.w, mixture, z, x, (z,), self.epochs // 2, fold(key, 0))
            self._descend(problem, state.w, mixture, z, x, (x,), self.epochs // 2, fold(key, 1))
        w = state.w.from_flat(mixture.model(z, x))
        weights, gamma = mixture.weights(z, x)
        losses = torch.stack([before, loss(problem, w, proxy)])
        return Learned(w, gamma[0], weights, losses, coherence(mixture.changes))

    def _descend(
        self, problem: Problem, like: Params, mixture: Mixture, z: Tensor, x: Tensor, free: tuple[Tensor, ...], epochs: int, key: Key
    ) -> Tensor:
        """Move those of z and x that are `free`, in place. Returns the z to go on with: the last, or the mean that SWA takes."""
        proxy, averaging = proxy_of(problem), self.swa and free[0] is z
        adam = self.optimiser == "adam"
        optimiser = torch.optim.Adam(free, self.lr, (0.5, 0.999)) if adam else torch.optim.SGD(free, self.lr, momentum=0.9)
        kept = []
        for e in range(epochs):
            optimiser.param_groups[0]["lr"] = self._rate(e, averaging)
            for batch in epoch(proxy, self.batch_size, fold(key, e)):
                g, _ = problem.grad(like.from_flat(mixture.model(z, x)), batch)
                z.grad, x.grad = mixture.gradient(g.vector(), z, x)
                optimiser.step()
            if averaging and e + 1 >= SWA_FROM:
                kept.append(z.clone())
        return torch.stack(kept).mean(0) if kept else z

    def _rate(self, e: int, averaging: bool) -> float:
        """The rate in epoch e: halved every 20. With SWA a cosine over 100 epochs, then half a cosine towards 0.05."""
        if not averaging:
            return self.lr * 0.5 ** (e // 20)
        before = self.lr * (1 + math.cos(math.pi * min(e, SWA_FROM - 1) / 100)) / 2
        rise = (1 - math.cos(math.pi * min(1.0, max(0, e + 1 - SWA_FROM) / 10))) / 2
        return before + rise * (0.05 - before)

    def report(self, problem: Problem, before: Learned, state: Learned, arrivals: Arrivals) -> Report:
        return {
            "weight": state.weights,
            "gamma": float(state.gamma),
            "lambda_max": float(state.weights.max()),
            "lambda_entropy": float(torch.special.entr(state.weights).sum()),
            "proxy_loss_before": float(state.proxy_loss[0]),
            "proxy_loss_after": float(state.proxy_loss[1]),
            "coherence_pairs": float(state.coherence[0]),
            "coherence_mean": float(state.coherence[1]),
        }
