"""F1. `Wrapper`: a strategy around another, which stands between the clients and that one's `server`.

A complete wrapper:

    @register("clipped")
    @dataclass(frozen=True)
    class Clipped(Wrapper):
        '''No update is longer than `limit`.'''

        inner: Strategy
        limit: float = 1.0

        def server(self, problem, state, updates, key):
            factor = (self.limit / updates.payload.row_norms()).clamp(max=1)
            return self.inner.server(problem, state, replace(updates, payload=updates.payload * factor), key)

In a scenario: `strategy: {name: clipped, limit: 0.5, inner: {name: fedavgm, beta: 0.9}}`.
"""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import FedsimError
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.rng import Key
from fedsim.strategy import LocalProgram, Report, Strategy
from fedsim.tree import concat, rows, tree_map
from fedsim.types import Arrivals, Job


class Wrapper(Strategy, ABC):
    """A strategy that asks, sends and deploys what its `inner` one does, and changes the updates which that one gets to see.

    It is for updates that are changes of the model: an inner strategy that sends anything but a model is refused. Clients have the inner
    strategy's program, so a wrapper has no `local` of its own to set.
    """

    inner: Strategy

    def __post_init__(self) -> None:
        refuse_messages(self.inner)

    @property
    def local(self) -> LocalProgram:  # type: ignore[override]
        return self.inner.local

    @property
    def paces(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.paces

    @property
    def recalls(self) -> bool:  # type: ignore[override]
        return self.inner.recalls

    @property
    def personal(self) -> bool:  # type: ignore[override]
        return self.inner.personal

    @property
    def keeps(self) -> bool:  # type: ignore[override]
        return self.inner.keeps

    def owned(self, problem: Problem, w: Params) -> tuple[str, ...]:
        return self.inner.owned(problem, w)

    sends: ClassVar[type] = Params

    @property
    def needs(self) -> frozenset[str]:
        return self.inner.needs

    def inside(self, state: Any) -> Any:
        """The inner strategy's state. Default: a wrapper that remembers nothing has no other."""
        return state

    def init(self, problem: Problem, w: Params) -> Any:
        return self.inner.init(problem, w)

    def plan(self, problem: Problem, state: Any, ids: np.ndarray, key: Key) -> list[Job]:
        return self.inner.plan(problem, self.inside(state), ids, key)

    def memory(self, problem: Problem, w: Params) -> Any:
        return self.inner.memory(problem, w)

    def deploy(self, state: Any, memory: Any) -> Params:
        return self.inner.deploy(self.inside(state), memory)

    def report(self, problem: Problem, before: Any, state: Any, arrivals: Arrivals) -> Report:
        return self.inner.report(problem, self.inside(before), self.inside(state), arrivals)


def refuse_messages(inner: Strategy) -> None:
    """Raise where the clients of a strategy are sent more than the model: what they send back is then no mere change of it."""
    if inner.sends is not Params:
        raise ValueError(
            f"inner: {type(inner).registered_name} sends its clients more than a model; what they send back cannot be changed here"
        )


def asked(inner: Strategy, problem: Problem, state: Any, ids: Tensor, key: Key) -> tuple[LocalProgram, Params]:
    """What a strategy would ask of the clients `ids` `[U]` now: the program, and the model each would begin with, `[U, ...]`."""
    distinct, back = np.unique(ids.cpu().numpy(), return_inverse=True)
    jobs = inner.plan(problem, state, distinct, key)
    if any(job.program != jobs[0].program for job in jobs):
        raise FedsimError(
            f"{type(inner).registered_name} asks its clients for different things in one round; what each would do now is open"
        )
    order = np.argsort(np.concatenate([job.ids for job in jobs]), kind="stable")
    stacked = concat([tree_map(lambda leaf, job=job: leaf.expand(len(job.ids), *leaf.shape), job.message) for job in jobs])
    return jobs[0].program, rows(stacked, torch.from_numpy(order[back]))
