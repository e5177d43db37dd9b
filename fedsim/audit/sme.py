"""F4. Surrogate Model Extension: a client's pictures from the change of the model over many local steps.

Zhu, Yao, Blaschko, "Surrogate Model Extension (SME): A Fast and Accurate Weight Update Attack on Federated Learning", ICML 2023
(arXiv 2306.00127). An honest but curious server knows the model w_0 that it sent, w_T that came back, and the client's N and labels y:

    w(a) = (1 - a) w_0 + a w_T                                     the surrogate, 0 <= a <= 1
    minimise over X [N, ...] and a:   1 - cos( w_0 - w_T, grad_w f(w(a); X, y) ) + tv * TV(X)

TV is the mean of |differences| along both axes, halved; X starts standard normal and is cut to what an input can be after every step; Adam
for X at `lr` and for a at `a_lr`; both fall to a tenth after 3/8, 5/8 and 7/8 of the iterations. The network is in evaluation: dropout is
off. With a = 0 for good it is gradient inversion of the change as if it were one gradient (Geiping et al., NeurIPS 2020), the baseline.

Differs: labels are the true ones, as in the authors' code; recovering them is another attack. The best X is that of the lowest objective.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from fedsim import rng
from fedsim.errors import FedsimError
from fedsim.inversion import inputs_of
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.types import Batch


@dataclass(frozen=True)
class Attack:
    """How long and how boldly to look.

    Attributes:
        iterations: steps of the search.
        lr, a_lr: rates of the pictures and of a.
        tv: weight of the total variation.
        start: a at the beginning; 0 or 1 keeps it there.
    """

    iterations: Annotated[int, Gt(0)] = 1000
    lr: Annotated[float, Gt(0)] = 0.1
    a_lr: Annotated[float, Gt(0)] = 1e-3
    tv: Annotated[float, Ge(0)] = 0.01
    start: Annotated[float, Ge(0), Le(1)] = 0.5


@dataclass(frozen=True)
class Seen:
    """What the server sees of a client: the model that it sent, the change that came back, the labels `[N]`."""

    started: Params
    change: Params
    y: Tensor


@dataclass(frozen=True)
class Found:
    """What an attack came to: pictures `[N, ...]`, a, the lowest objective, and seconds."""

    x: Tensor
    a: float
    objective: float
    seconds: float


def attack(problem: Problem, seen: Seen, how: Attack, key: rng.Key) -> Found:
    """Search for the pictures behind a change."""
    began = time.perf_counter()
    inputs = inputs_of(problem)
    if len(inputs.shape) != 3:
        raise FedsimError(f"the audit reconstructs pictures [channels, height, width], and an input here is {list(inputs.shape)}")
    norm = seen.change.norm()
    if not bool(norm > 0):
        raise FedsimError("the client's update is zero: there is nothing to learn from it")
    toward = seen.change * (-1 / norm)  # (w_0 - w_T) / ||w_0 - w_T||
    x = torch.from_numpy(rng.normal(np.array([key], dtype=np.uint64), (len(seen.y), *inputs.shape)))[0].to(norm)
    x, a = x.clamp(inputs.low, inputs.high), torch.tensor(how.start).to(norm)
    moves = _Adam(x), _Adam(a)
    best, at, lowest = x, a, float("inf")
    for k in range(how.iterations):
        objective, slope, slope_a = _mismatch(problem, seen, toward, x, a, how.tv)
        if float(objective) < lowest:
            best, at, lowest = x, a, float(objective)
        fall = 0.1 ** sum(8 * k >= part * how.iterations for part in (3, 5, 7))
        x = (x - how.lr * fall * moves[0].step(slope)).clamp(inputs.low, inputs.high)
        if 0 < how.start < 1:
            a = (a - how.a_lr * fall * moves[1].step(slope_a)).clamp(0, 1)
    return Found(best, float(at), lowest, time.perf_counter() - began)


def _mismatch(problem: Problem, seen: Seen, toward: Params, x: Tensor, a: Tensor, tv: float) -> tuple[Tensor, Tensor, Tensor]:
    """The objective, and its gradient in the pictures and in a: dw/da = w_T - w_0."""
    x = x.detach().requires_grad_()
    w = (seen.started + seen.change * a).map(lambda v: v.detach().requires_grad_())
    loss = problem.loss(w, Batch(x, seen.y))
    names = list(w)
    parts = torch.autograd.grad(loss, [w[name] for name in names], create_graph=True, allow_unused=True, materialize_grads=True)
    g = Params(dict(zip(names, parts, strict=True)))
    objective = 1 - g.dot(toward) / g.norm().clamp(min=1e-12) + tv * total_variation(x)
    slopes = torch.autograd.grad(objective, [x, *w.values()], allow_unused=True, materialize_grads=True)
    slope_a = Params(dict(zip(names, slopes[1:], strict=True))).dot(seen.change)
    return objective.detach(), slopes[0], slope_a


def total_variation(x: Tensor) -> Tensor:
    """Half the mean of |differences| of neighbours in a row plus half that in a column. `[N, C, H, W]` -> a scalar."""
    return 0.5 * ((x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean())


class _Adam:
    """Adam's moments of one tensor."""

    def __init__(self, like: Tensor):
        self.m, self.v, self.t = torch.zeros_like(like), torch.zeros_like(like), 0

    def step(self, g: Tensor) -> Tensor:
        """The direction to go against, after a gradient."""
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g * g
        return (self.m / (1 - 0.9**self.t)) / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-8)
