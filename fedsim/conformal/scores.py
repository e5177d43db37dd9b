"""F1. Scores: how badly a label fits an input, to a model. A prediction set holds the labels whose score is at most a threshold.

B = batch, K = classes. `u` are uniform random numbers on [0, 1), one an example; only randomised scores look at them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from fedsim.problem import Classification, Quantiles, Regression, Task
from fedsim.registry import Kind, register


class Score(Kind, ABC):
    """How badly a label fits an input."""

    task: ClassVar[type[Task]]  # what it can judge

    @abstractmethod
    def of(self, output: Tensor, y: Tensor, u: Tensor) -> Tensor:
        """The score of the true label. `[B, ...], [B, ...], [B] -> [B]`."""

    @abstractmethod
    def judge(self, output: Tensor, y: Tensor, u: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the sets under thresholds `q` `[B, K]` hold the true label, and how large they are: `[B]` bool, `[B]` float.

        The size is a number of labels, or the width of an interval. Of real targets K is 1.
        """


class LabelScore(Score, ABC):
    """A score of each of K classes."""

    task: ClassVar[type[Task]] = Classification

    @abstractmethod
    def each(self, output: Tensor, u: Tensor) -> Tensor:
        """The score of every label. `[B, K], [B] -> [B, K]`."""

    def of(self, output: Tensor, y: Tensor, u: Tensor) -> Tensor:
        return self.each(output, u).gather(1, y[:, None])[:, 0]

    def judge(self, output: Tensor, y: Tensor, u: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        held = self.each(output, u) <= q  # [B, K]
        return held.gather(1, y[:, None])[:, 0], held.sum(1).to(q.dtype)


@register("lac")
@dataclass(frozen=True)
class Lac(LabelScore):
    """V(x, y) = 1 - p_y: the smallest sets on average (Sadinle, Lei, Wasserman, JASA 2019). Sets may be empty."""

    def each(self, output: Tensor, u: Tensor) -> Tensor:
        return 1 - output.softmax(1)


def _ranked(output: Tensor, u: Tensor, penalty: float, free: int) -> Tensor:
    """Probability of the labels before y, a share `u` of y's own, and `penalty` for each rank beyond `free`. `[B, K]`.

    Labels come by falling probability, equal ones by number.
    """
    p, order = output.softmax(1).sort(dim=1, descending=True, stable=True)  # [B, K]
    rank = torch.arange(1, p.shape[1] + 1, device=p.device, dtype=p.dtype)
    v = p.cumsum(1) - p + u[:, None] * p + penalty * (rank - free).clamp(min=0)
    return torch.zeros_like(v).scatter(1, order, v)


@register("aps")
@dataclass(frozen=True)
class Aps(LabelScore):
    """V(x, y) = sum of p_j over the labels j before y, plus u p_y (Romano, Sesia, Candes, NeurIPS 2020).

    randomised: with u = 1 for everyone, sets are larger and never empty.
    """

    randomised: bool = True

    def each(self, output: Tensor, u: Tensor) -> Tensor:
        return _ranked(output, u if self.randomised else torch.ones_like(u), 0.0, 0)


@register("raps")
@dataclass(frozen=True)
class Raps(LabelScore):
    """APS plus penalty * max(0, rank(y) - free), ranks from 1 (Angelopoulos, Bates, Malik, Jordan, ICLR 2021): no long tails.

    penalty: the paper's lambda.
    free: the paper's k_reg.
    """

    penalty: Annotated[float, Ge(0)] = 0.01
    free: Annotated[int, Ge(0)] = 2
    randomised: bool = True

    def each(self, output: Tensor, u: Tensor) -> Tensor:
        return _ranked(output, u if self.randomised else torch.ones_like(u), self.penalty, self.free)


@register("residual")
@dataclass(frozen=True)
class Residual(Score):
    """V(x, y) = |y - f(x)|, the largest over targets: intervals of one width (Lei et al., JASA 2018)."""

    task: ClassVar[type[Task]] = Regression

    def of(self, output: Tensor, y: Tensor, u: Tensor) -> Tensor:
        return (output - y).abs().amax(1)

    def judge(self, output: Tensor, y: Tensor, u: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        return self.of(output, y, u) <= q[:, 0], 2 * q[:, 0]


@register("cqr")
@dataclass(frozen=True)
class Cqr(Score):
    """V(x, y) = max(low(x) - y, y - high(x)), of a model of two quantiles (Romano, Patterson, Candes, NeurIPS 2019). May be negative."""

    task: ClassVar[type[Task]] = Quantiles

    def of(self, output: Tensor, y: Tensor, u: Tensor) -> Tensor:
        return torch.maximum(output[:, 0] - y[:, 0], y[:, 0] - output[:, 1])

    def judge(self, output: Tensor, y: Tensor, u: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        return self.of(output, y, u) <= q[:, 0], (output[:, 1] - output[:, 0] + 2 * q[:, 0]).clamp(min=0)
