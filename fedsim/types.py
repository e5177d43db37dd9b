"""F0. The records that cross a border: between server and clients, and between the engine and a strategy.

C = clients in a chunk or cohort, S = local steps, B = batch, N = population. A record is a pytree; with a leading `[C]` it is a stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from fedsim.tree import record, rows, tree_map, weighted_sum

if TYPE_CHECKING:
    from fedsim.strategy import LocalProgram

Draws = dict[str, Tensor]
Metrics = dict[str, tuple[float, float]]


def add_metrics(a: Mapping[str, tuple[float, float]], b: Mapping[str, tuple[float, float]]) -> Metrics:
    """The metrics of both: sums and weights add up by name; a name that only one has is kept."""
    total = dict(a)
    for name, (value, weight) in b.items():
        before, so_far = total.get(name, (0.0, 0.0))
        total[name] = (before + value, so_far + weight)
    return total


@dataclass(frozen=True)
class Draw:
    """Random numbers that one step of one client needs: standard normal, or uniform on [0, 1), float32 of `shape`."""

    kind: Literal["uniform", "normal"]
    shape: tuple[int, ...]


Precision = Literal["highest", "high", "medium"]
"""Of products of float32 on a GPU, in the words of `torch.set_float32_matmul_precision`."""


@record
class Batch:
    """One step's data for one client. `mask` is 1 for an example and 0 for padding; without a mask there is no padding."""

    x: Tensor  # [B, ...]
    y: Tensor  # [B, ...]
    mask: Tensor | None = None  # [B] float

    @property
    def n(self) -> Tensor | int:
        """How many examples, padding excluded."""
        return len(self.y) if self.mask is None else self.mask.sum()

    def mean(self, each: Tensor) -> Tensor:
        """Mean of a value of each example `[B]`, padding excluded."""
        return each.mean() if self.mask is None else (each * self.mask).sum() / self.mask.sum().clamp(min=1)


@dataclass(frozen=True)
class Work:
    """The planned steps of a chunk of clients, as positions in the resident data; batches are gathered step by step.

    Attributes:
        index: positions of the examples, `[C, S, B]` int64; a padded place holds 0.
        mask: 1 for an example, 0 for padding, `[C, S, B]` float32. A step that is all padding is never run.
        steps: how many steps each client has, `[C]`, not increasing.
        n: how many distinct examples each client owns, `[C]` float32.
    """

    index: np.ndarray
    mask: np.ndarray
    steps: np.ndarray
    n: np.ndarray


@record
class Reply:
    """What a client's program ends with. `payload` travels to the server, `memory` stays on the device.

    Metrics are `{name: (sum, weight)}`: they add up over clients and rounds, and are divided when they are printed.
    """

    payload: Any
    memory: Any
    metrics: dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Job:
    """An order to some clients: run `program` on `message`. `ids` is `[C]` int64."""

    ids: np.ndarray
    message: Any
    program: LocalProgram


@record
class Arrivals:
    """Who came back, sorted by id. Known before anyone trains, so weights may depend on all of it.

    Attributes:
        ids: client ids, `[C]` int64.
        n: number of training examples of each, `[C]` float32.
        version: the model version each started from, `[C]` int64.
        staleness: server updates since then, `[C]` int64; 0 in a synchronous round.
    """

    ids: Tensor
    n: Tensor
    version: Tensor
    staleness: Tensor

    def __len__(self) -> int:
        return len(self.ids)


@record
class Total:
    """A weighted sum over arrivals: `payload = sum_i a_i payload_i`, `weight = sum_i a_i`."""

    payload: Any
    weight: Tensor

    def mean(self) -> Any:
        """The weighted mean of the payloads; zero where nothing had any weight."""
        weight = self.weight + (self.weight == 0)
        return tree_map(lambda leaf: leaf / weight, self.payload)


@record
class Updates:
    """Everything the server sees of a round: the arrivals and their payloads, stacked `[C, ...]` and sorted by client id.

    `started` holds the message that each client began with, stacked `[C, ...]`, for a strategy that `recalls` it. `metrics` are those of
    each client's program, `{name: (sum [C], weight [C])}`, where the port tells them apart.
    """

    arrivals: Arrivals
    payload: Any
    started: Any = None
    metrics: Any = None

    def __len__(self) -> int:
        return len(self.arrivals)

    def total(self, weight: Tensor) -> Total:
        """Sum of the payloads under weights `[C]`."""
        return Total(weighted_sum(self.payload, weight), weight.sum())

    def mean(self, by: Tensor | None = None) -> Any:
        """Mean of the payloads, weighted `by` `[C]` (default: equally)."""
        return self.total(self.arrivals.n.new_ones(len(self)) if by is None else by).mean()

    def take(self, index: Any) -> Updates:
        """The chosen rows."""
        started, metrics = (None if each is None else rows(each, index) for each in (self.started, self.metrics))
        return Updates(rows(self.arrivals, index), rows(self.payload, index), started, metrics)
