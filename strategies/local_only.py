"""Local training alone: each client trains its own part of the model, and nobody learns from anybody.

    client i:  v_i <- v_i - lr * grad_v f_i(u, v_i)          u held as the phase before left it
    server:    nothing

With own: ".*" (the default) in the only phase, it is what federated learning is compared with. After a phase that trained one model, it
is full fine-tuning. After `fedalt` or `fedsim` with the same `own`, it is the last step of their pipeline (Pillutla et al., ICML 2022,
arXiv 2204.03809), which wants `participation: full` in its phase, because clients that never took part are fine-tuned, too.

Differs: u is sent in every round, though it never changes. With own: ".*" nothing is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from fedsim.errors import FedsimError
from fedsim.local import Constant, Learner, Schedule, Sgd, clip, counted, start
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.rng import Key
from fedsim.split import EVERYTHING, Own, SplitStrategy, owned
from fedsim.strategy import Count, LocalProgram, ModelState
from fedsim.tree import record
from fedsim.types import Arrivals, Batch, Draws, Reply, Total


@record
class Beside:
    """A client's own part on its way, and what it received."""

    v: Learner
    u: Params


@register("own-sgd")
@dataclass(frozen=True)
class OwnSgd(LocalProgram):
    """SGD on a client's own parameters only, the shared ones held. Sends nothing."""

    joins: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    lr: Annotated[float, Gt(0)] = 0.05
    epochs: Count = 1
    steps: Count | None = None
    batch_size: Count | None = 32
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0
    weight_decay: Annotated[float, Ge(0)] = 0.0
    clip: Annotated[float, Gt(0)] | None = None
    schedule: Schedule = Constant()

    def begin(self, problem: Problem, message: Params, memory: Params) -> Beside:
        return Beside(start(memory, False, self.momentum > 0, second=False), message)

    def step(self, problem: Problem, carry: Beside, batch: Batch, draws: Draws, passname: str) -> Beside:
        g, loss = problem.holding(carry.u).grad(carry.v.w, batch, draws)
        rule = Sgd(self.lr, momentum=self.momentum, weight_decay=self.weight_decay, schedule=self.schedule)
        return replace(carry, v=counted(rule.along(problem, carry.v, clip(g, self.clip)), batch, loss))

    def finish(self, problem: Problem, message: Params, carry: Beside, n: Tensor) -> Reply:
        return Reply(Params({}), carry.v.w, {"loss": (carry.v.loss, carry.v.seen)})

    def ages(self) -> bool:
        return self.schedule != Constant()


@register("local-only")
@dataclass(frozen=True)
class LocalOnly(SplitStrategy):
    """Each client trains its own part of the model, all of it by default, and sends nothing: local training, and fine-tuning."""

    local: OwnSgd = OwnSgd()
    own: Own = EVERYTHING

    def owned(self, problem: Problem, w: Params) -> tuple[str, ...]:
        names = owned(problem, w, self.own)
        if not names:
            raise FedsimError("is empty, and local-only trains nothing else; name what clients train")
        return names

    @property
    def uniform(self) -> bool:
        return True

    def weigh(self, problem: Problem, state: ModelState, arrivals: Arrivals) -> Tensor:
        return torch.ones_like(arrivals.n)  # [C]

    def apply(self, problem: Problem, state: ModelState, total: Total, arrivals: Arrivals, key: Key) -> ModelState:
        return state
