"""F1. How much a stale update counts: a factor of its staleness tau, the number of server updates since its client began."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from fedsim.registry import Kind, register


class Staleness(Kind, ABC):
    """How much an update counts by its staleness; 1 where it is fresh."""

    @abstractmethod
    def factor(self, tau: Tensor) -> Tensor:
        """s(tau) in (0, 1], `[C]` int64 -> `[C]` float32."""


@register("constant")
@dataclass(frozen=True)
class Indifferent(Staleness):
    """A stale update counts as much as a fresh one: s = 1."""

    def factor(self, tau: Tensor) -> Tensor:
        return torch.ones(tau.shape)


@register("hinge")
@dataclass(frozen=True)
class Hinge(Staleness):
    """Nothing changes up to b, then s = 1 / (a (tau - b) + 1) (Xie et al., OPT 2020, arXiv 1903.03934)."""

    a: Annotated[float, Gt(0)] = 10.0
    b: Annotated[float, Ge(0)] = 4.0

    def factor(self, tau: Tensor) -> Tensor:
        return 1 / (self.a * (tau - self.b).clamp(min=0) + 1)


@register("polynomial")
@dataclass(frozen=True)
class Polynomial(Staleness):
    """s = (1 + tau)^-a (Xie et al., OPT 2020; with a = 1/2 Nguyen et al., AISTATS 2022)."""

    a: Annotated[float, Gt(0)] = 0.5

    def factor(self, tau: Tensor) -> Tensor:
        return (1 + tau).to(torch.float32) ** -self.a


@register("exponential")
@dataclass(frozen=True)
class Halving(Staleness):
    """s = 2^(-tau / half_life); with 20 the weighting that Wang and Gao (AAAI 2025, arXiv 2309.13536) compare with."""

    half_life: Annotated[float, Gt(0)] = 20.0

    def factor(self, tau: Tensor) -> Tensor:
        return torch.exp2(-tau / self.half_life)
