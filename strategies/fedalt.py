"""FedAlt and FedSim: a part of the model stays with its client, trained in turns with what is shared, or together with it.

Pillutla, Malik, Mohamed, Rabbat, Sanjabi, Xiao, "Federated Learning with Partial Model Personalization", ICML 2022 (arXiv 2204.03809),
Algorithms 1 to 3. u is shared, v_i is client i's own; `own` says by name which is which.

    server sends u
    client i, FedAlt:   v_i <- v_i - personal_lr * (grad_v f_i(u, v_i) + r'(v_i))      a pass, u held
                        u_i <- u_i - lr * grad_u f_i(u_i, v_i)                         a pass, the new v_i held
    client i, FedSim:   (u_i, v_i) <- (u_i, v_i) - lr * grad f_i(u_i, v_i)             one pass
    client i keeps v_i and sends u_i - u
    server:             u <- u + server_lr * sum_{i in S} a_i (u_i - u) / sum_{i in S} a_i

    r(v) = personal_decay / 2 ||v||^2 + personal_proximal / 2 ||v - v before the round||^2

With own: output, FedAlt is FedRep (Collins et al., ICML 2021) with as many epochs for the head as for the body. The paper's pipeline is a
scenario with phases: fedavg, then one of these, then local-only with the same `own` and participation: full.

Differs: a_i is n_i, where the authors' code counts mini-batches. The server's optimiser is SGD (the code also has Adam). The code's
proximal term pulls towards the first v_i; here it is where the client's round began.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Lt
from torch import Tensor

from fedsim.local import Constant, Learner, Schedule, Sgd, clip, start, tally
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.split import Own, SplitStrategy
from fedsim.staleness import Staleness
from fedsim.strategy import FRESH, Count, LocalProgram, Weighting
from fedsim.tree import record
from fedsim.types import Batch, Draws, Reply


@record
class Halves:
    """A client on its way: what is shared and what is its own, each with its own optimiser, and the losses of all steps."""

    u: Learner
    v: Learner
    loss: Tensor  # summed over examples
    seen: Tensor  # examples


@register("alternating-sgd")
@dataclass(frozen=True)
class AlternatingSgd(LocalProgram):
    """SGD on a client's own parameters, then on the shared ones: FedAlt's client. Momentum starts at zero in every pass."""

    passes: ClassVar[tuple[str, ...]] = ("personal", "shared")
    joins: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    lr: Annotated[float, Gt(0)] = 0.05
    personal_lr: Annotated[float, Gt(0)] | None = None  # null: lr
    epochs: Count = 1
    steps: Count | None = None
    batch_size: Count | None = 32
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0
    clip: Annotated[float, Gt(0)] | None = None
    personal_decay: Annotated[float, Ge(0)] = 0.0
    personal_proximal: Annotated[float, Ge(0)] = 0.0
    schedule: Schedule = Constant()

    def begin(self, problem: Problem, message: Params, memory: Params) -> Halves:
        u = start(message, False, self.momentum > 0, second=False, beside=memory)
        v = start(memory, self.personal_proximal > 0, self.momentum > 0, second=False, beside=message)
        zero = tally(message | memory)
        return Halves(u, v, zero, zero)

    def step(self, problem: Problem, carry: Halves, batch: Batch, draws: Draws, passname: str) -> Halves:
        u, v = carry.u, carry.v
        moving, held = (v, u) if passname == "personal" else (u, v)
        if not moving.w:
            return carry  # everything is shared, or nothing
        g, loss = problem.holding(held.w).grad(moving.w, batch, draws)
        moved = self._rule(passname).along(problem, moving, clip(g, self.clip))
        carry = replace(carry, loss=carry.loss + batch.n * loss, seen=carry.seen + batch.n)
        return replace(carry, v=moved) if passname == "personal" else replace(carry, u=moved)

    def _rule(self, passname: str) -> Sgd:
        """What a gradient is used for in this pass."""
        if passname == "shared":
            return Sgd(self.lr, momentum=self.momentum, schedule=self.schedule)
        decay, proximal = self.personal_decay, self.personal_proximal
        return Sgd(self.personal_lr or self.lr, 1, None, None, self.momentum, False, decay, None, proximal, self.schedule)

    def finish(self, problem: Problem, message: Params, carry: Halves, n: Tensor) -> Reply:
        return Reply(carry.u.w - message, carry.v.w, {"loss": (carry.loss, carry.seen)})

    def ages(self) -> bool:
        return self.schedule != Constant()


@register("fedalt")
@dataclass(frozen=True)
class FedAlt(SplitStrategy):
    """Clients keep a part of the model, trained in turns with the shared part (Pillutla et al., ICML 2022)."""

    local: AlternatingSgd = AlternatingSgd()
    own: Own = "output"
    weights: Weighting = "samples"
    server_lr: Annotated[float, Gt(0)] = 1.0
    staleness: Staleness = FRESH


@register("fedsim")
@dataclass(frozen=True)
class FedSim(SplitStrategy):
    """Clients keep a part of the model, trained together with the shared part (Pillutla et al., ICML 2022)."""

    local: LocalProgram = Sgd()
    own: Own = "output"
    weights: Weighting = "samples"
    server_lr: Annotated[float, Gt(0)] = 1.0
    staleness: Staleness = FRESH
