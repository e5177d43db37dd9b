"""F1. Whose label law the promise is for; importance weights towards it; and the exact weighted quantile.

Label shift: all clients share P(X | Y), and differ in P(Y). With M_y calibration examples of class y in all, and a target law P*,

    w_y = P*(y) / (M_y / M)                                                                importance weight of class y
    Q(y) = inf { q : sum_k w_{Y_k} 1[V_k <= q] >= (1 - alpha) (w_y + sum_k w_{Y_k}) }      threshold of candidate label y
    C(x) = { y : V(x, y) <= Q(y) }

The candidate itself stands at infinity with mass w_y. With unit weights, Q is the ceil((1 - alpha)(M + 1))-th smallest score: split
conformal prediction. A class that the target has and the calibration data lack gets Q(y) = infinity: it is in every set.

N = clients, K = classes (1 where there are none), R = target laws (1, or N), M = scores.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt, Lt
from torch import Tensor

from fedsim.problem import Classification, Problem
from fedsim.registry import Kind, register

Alpha = Annotated[float, Gt(0), Lt(1)]
"""How often a set may miss the true label."""


def class_count(problem: Problem) -> int:
    """K: classes, or 1 where the task has none."""
    return problem.task.outputs if isinstance(problem.task, Classification) else 1


def least_examples(alpha: float) -> int:
    """How many calibration examples the smallest finite threshold takes: n with ceil((1 - alpha)(n + 1)) <= n."""
    return math.ceil((1 - alpha) / alpha * (1 - 1e-12))


class Target(Kind, ABC):
    """Whose label law the promise is for."""

    @abstractmethod
    def laws(self, counts: Tensor) -> Tensor:
        """P*, from the label counts `[N, K]` of all clients: `[R, K]` float64, R = 1 or N. A row of zeros is a law that is not known."""

    def fault(self, problem: Problem) -> str | None:
        """What is wrong with it for this problem, or None."""
        return None


def _normal(counts: Tensor) -> Tensor:
    return counts / counts.sum(1, keepdim=True).clamp(min=1e-300)


@register("pooled")
@dataclass(frozen=True)
class Pooled(Target):
    """The law of all calibration data together: unit weights, plain federated conformal prediction."""

    def laws(self, counts: Tensor) -> Tensor:
        return _normal(counts.double().sum(0, keepdim=True))


@register("own")
@dataclass(frozen=True)
class Own(Target):
    """Each client's own law, by its calibration labels: N thresholds for each label, one client's each."""

    def laws(self, counts: Tensor) -> Tensor:
        return _normal(counts.double())


@register("client")
@dataclass(frozen=True)
class OfClient(Target):
    """The law of one client, by its calibration labels.

    id: its number, from 0.
    """

    id: int

    def laws(self, counts: Tensor) -> Tensor:
        return _normal(counts.double()[self.id : self.id + 1])

    def fault(self, problem: Problem) -> str | None:
        if not 0 <= self.id < problem.clients:
            return f"there is no client {self.id}; there are 0 to {problem.clients - 1}"
        if problem.calibration is not None and problem.calibration[self.id] == 0:
            return f"client {self.id} has no calibration data, so its label law is not known; name another, or give the law"
        return None


@register("law")
@dataclass(frozen=True)
class OfLaw(Target):
    """A given law.

    p: a probability for each class, in order; they sum to 1.
    """

    p: tuple[float, ...]

    def __post_init__(self) -> None:
        if any(v < 0 for v in self.p) or abs(sum(self.p) - 1) > 1e-6:
            raise ValueError(f"p: should be probabilities that sum to 1, not to {sum(self.p):g}; there should be no negative ones")

    def laws(self, counts: Tensor) -> Tensor:
        return torch.tensor([self.p], dtype=torch.float64, device=counts.device)

    def fault(self, problem: Problem) -> str | None:
        k = class_count(problem)
        return None if len(self.p) == k else f"p has {len(self.p)} probabilities, and there are {k} classes"


def importance(laws: Tensor, counts: Tensor, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """Importance weights `[R, K]` float64, and which classes the target has and the calibration data lack, `[R, K]` bool.

    Args:
        laws: P*, `[R, K]`.
        counts: M_y, calibration examples of each class, `[K]`; noisy ones may be negative.
        least: a count up to which a class counts as lacking.
    """
    counts = counts.double()
    there = counts > least
    m = counts.where(there, counts.new_zeros(()))
    weights = (laws * m.sum() / m.clamp(min=1e-300)).where(there, counts.new_zeros(()))
    return weights, (laws > 0) & ~there


def weighted_quantile(scores: Tensor, labels: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """The exact threshold of each law and candidate label. `[M], [M] int64, [R, K] -> [R, K]` float64, infinite where it must be."""
    v, order = scores.double().sort()
    mass = weights.double()[:, labels[order]].cumsum(1)  # [R, M]
    total = mass[:, -1:] if len(v) else weights.new_zeros(len(weights), 1, dtype=torch.float64)
    goal = (1 - alpha) * (total + weights) * (1 - 1e-12)  # [R, K]; a mass that is right but for rounding is enough
    place = torch.searchsorted(mass.contiguous(), goal.contiguous())
    found = torch.cat([v, v.new_full((1,), math.inf)])[place]
    return found.where(total > 0, found.new_full((), math.inf))  # a law that is not known, or data that are not there
