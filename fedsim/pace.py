"""F2. When to ask whom, and when the server aggregates. A strategy never knows: it sees arrivals, with their staleness.

| pace | asks | aggregates | those still at work then |
|---|---|---|---|
| sync | when a round begins | when all, or the first `cohort`, are back, or after `timeout` | are given up |
| deadline | when a round begins | after `seconds`, or when all are back | go on, and come in later, stale |
| buffered | whenever somebody is back | when `buffer` updates are in | go on, and come in later, stale |

Where nothing takes any time, all three are the same rounds, bit for bit (`buffer` = `concurrency` = `cohort`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Gt

from fedsim.registry import Kind, register
from fedsim.rng import Key, generator


@dataclass(frozen=True)
class Until:
    """How long to wait: until `count` updates are ready (None = all that are under way), or `seconds` after the round began."""

    count: int | None = None
    seconds: float = math.inf


class Pace(Kind, ABC):
    """When to ask whom, and when the server aggregates."""

    paced: ClassVar[str]  # what a strategy lists in `paces`
    refills: ClassVar[bool] = False  # ask again whenever somebody is back, not only when a round begins
    gives_up: ClassVar[str | None] = None  # why those still at work at the end of a round are given up; None = they go on

    @abstractmethod
    def choose(self, idle: np.ndarray, busy: int, key: Key) -> np.ndarray:
        """Whom to ask among the idle clients, while `busy` others are at work. Sorted ids, int64."""

    @abstractmethod
    def until(self) -> Until:
        """How long a round waits."""

    @abstractmethod
    def trained(self, available: float) -> float:
        """About how many clients train in a round, where this many are available."""


def some(idle: np.ndarray, count: int | None, key: Key) -> np.ndarray:
    """At most `count` of the idle clients, at random. Sorted."""
    if count is None or len(idle) <= count:
        return idle
    return np.sort(generator(key).choice(idle, count, replace=False))


@register("sync")
@dataclass(frozen=True)
class Sync(Pace):
    """Rounds: ask the available clients (at most `cohort` of them, at random), wait for all, aggregate.

    With `over_selection` x, (1 + x) times `cohort` are asked and the first `cohort` of them count (Bonawitz et al., MLSys 2019: 0.3).
    Those who are not back `timeout` virtual seconds after the round began are given up.
    """

    paced: ClassVar[str] = "sync"
    gives_up: ClassVar[str | None] = "not back in time"
    cohort: Annotated[int, Gt(0)] | None = None
    over_selection: Annotated[float, Ge(0)] = 0.0
    timeout: Annotated[float, Gt(0)] | None = None

    def __post_init__(self) -> None:
        if self.over_selection and self.cohort is None:
            raise ValueError("over_selection needs a cohort, e.g. cohort: 10")

    @property
    def asked(self) -> int | None:
        """At most how many are asked in a round."""
        return None if self.cohort is None else math.ceil(round(self.cohort * (1 + self.over_selection), 9))

    def choose(self, idle: np.ndarray, busy: int, key: Key) -> np.ndarray:
        return some(idle, self.asked, key)

    def until(self) -> Until:
        return Until(self.cohort, self.timeout or math.inf)

    def trained(self, available: float) -> float:
        return min(self.cohort or available, available)


@register("deadline")
@dataclass(frozen=True)
class Deadline(Pace):
    """Rounds of fixed length: ask available clients, aggregate what has come in after `seconds` (virtual); late updates count later, stale.

    A client that is still at work is not asked again. A round in which everybody is back earlier ends earlier.
    """

    paced: ClassVar[str] = "deadline"
    seconds: Annotated[float, Gt(0)]
    cohort: Annotated[int, Gt(0)] | None = None

    def choose(self, idle: np.ndarray, busy: int, key: Key) -> np.ndarray:
        return some(idle, self.cohort, key)

    def until(self) -> Until:
        return Until(None, self.seconds)

    def trained(self, available: float) -> float:
        return min(self.cohort or available, available)


@register("buffered")
@dataclass(frozen=True)
class Buffered(Pace):
    """Asynchronous: `concurrency` clients are always at work; the server aggregates whenever `buffer` updates are in.

    FedBuff (Nguyen et al., AISTATS 2022, arXiv 2106.06639), Algorithm 1. buffer = 1 is fully asynchronous. A client whose update waits in
    the buffer is asked again after it was aggregated.
    """

    paced: ClassVar[str] = "buffered"
    refills: ClassVar[bool] = True
    concurrency: Annotated[int, Gt(0)]
    buffer: Annotated[int, Gt(0)] = 10

    def choose(self, idle: np.ndarray, busy: int, key: Key) -> np.ndarray:
        return some(idle, max(0, self.concurrency - busy), key)

    def until(self) -> Until:
        return Until(self.buffer)

    def trained(self, available: float) -> float:
        return min(self.buffer, available)
