"""Client-level differential privacy over any strategy that only sums: DP-FedAvg, with a fixed or an adaptive clipping norm.

McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018 (arXiv 1710.06963), Algorithm 1;
adaptive clipping: Andrew, Thakkar, McMahan, Ramaswamy, "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021
(arXiv 1905.03871), Algorithm 1. In each round, m = the expected number of participants, z = `noise`:

    client i:  Delta_i <- Delta_i * min(1, C / ||Delta_i||) ;   b_i = 1 if ||Delta_i|| <= C else 0
    server:    total = sum_i Delta_i + z_Delta C N(0, I) ;  hand `total` with weight m to the inner strategy
    adaptive:  b = (sum_i (b_i - 1/2) + z_b N(0, 1)) / m + 1/2 ;   C <- C exp(-clip_lr (b - quantile))
               z_b = m / 20 ;  z_Delta = (z^-2 - (2 z_b)^-2)^-1/2 ;  together they cost what z alone would
    fixed:     z_Delta = z

One client moves the sum by at most C and has weight 1, whatever its data; m is no function of who came. So the inner strategy must weigh
uniformly and look at nothing but the sum: others are refused. Programs' losses are not sent, because nothing would protect them.

`noise_cohort: M` (with `population`) divides the noise by M / m: a small simulation then sees the signal-to-noise ratio of a federation
that asks M clients a round. It is NOT private; the account of that federation is logged as `privacy.pretended.epsilon`.

Differs: weights are 1, not min(n_i / w, 1). b_i - 1/2 is summed over those who came, and m is what is expected of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from annotated_types import Gt, Lt
from torch import Tensor

from fedsim.params import Params
from fedsim.privacy import Protection, clipped, noise_like
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.rng import Key, fold
from fedsim.strategy import NOTHING, Descent, LocalProgram, Report, Strategy, WeightedStrategy
from fedsim.tree import record
from fedsim.types import Arrivals, Batch, Draw, Draws, Job, Reply, Total

Positive = Annotated[float, Gt(0)]


@record
class Bounded:
    """What a client receives: the inner message, and how long its update may be."""

    message: Params
    clip: Tensor


@record
class Short:
    """What a client sends: an update of bounded length, and whether it was short already, less a half."""

    delta: Params
    below: Tensor


@record
class Guarded:
    """The inner strategy's state, and the clipping norm."""

    inner: Any
    clip: Tensor

    @property
    def w(self) -> Params:
        w: Params = self.inner.w
        return w


@dataclass(frozen=True)
class ClipUpdate(LocalProgram):
    """Another program, whose update is clipped before it leaves the client."""

    receives: ClassVar[type] = Bounded
    inner: LocalProgram
    epochs: int
    steps: int | None
    batch_size: int | None

    @staticmethod
    def of(inner: LocalProgram) -> ClipUpdate:
        return ClipUpdate(inner, inner.epochs, inner.steps, inner.batch_size)

    def begin(self, problem: Problem, message: Bounded, memory: Any) -> Any:
        return self.inner.begin(problem, message.message, memory)

    def step(self, problem: Problem, carry: Any, batch: Batch, draws: Draws, passname: str) -> Any:
        return self.inner.step(problem, carry, batch, draws, passname)

    def finish(self, problem: Problem, message: Bounded, carry: Any, n: Tensor) -> Reply:
        reply = self.inner.finish(problem, message.message, carry, n)
        delta, below = clipped(reply.payload, message.clip)
        return Reply(Short(delta, below - 0.5), reply.memory, NOTHING)

    def draws(self, problem: Problem, batch: int) -> dict[str, Draw]:
        return self.inner.draws(problem, batch)

    def chances(self, sizes: np.ndarray) -> np.ndarray | None:
        return self.inner.chances(sizes)

    def protects(self) -> Protection | None:
        return self.inner.protects()

    def descent(self, problem: Problem) -> Descent | None:
        return self.inner.descent(problem)


@register("dp")
@dataclass(frozen=True)
class Dp(WeightedStrategy):
    """Client-level differential privacy over a strategy that sums: clipped updates, noise on the sum (McMahan et al., ICLR 2018).

    inner: what the server does with the noised mean: fedavg, fedavgm, fedadam, ... with `weights: uniform`.
    noise: z, standard deviation over the clipping norm; null = what `privacy.target_epsilon` asks for.
    clip: C, or where it starts. quantile: of updates that should not be clipped, which C then follows, at `clip_lr`; null = C stays.
    count_noise: z_b, deviation of the noise on the count of short updates; null = m / 20.
    cohort: m, the expected number of participants; null = known from the fleet.
    noise_cohort, population: pretend the noise of a larger federation (not private; see above).
    """

    paces: ClassVar[frozenset[str]] = frozenset({"sync"})  # elsewhere a round is no sample of clients

    inner: Strategy
    noise: Annotated[float, Gt(0)] | None = None
    clip: Positive = 1.0
    quantile: Annotated[float, Gt(0), Lt(1)] | None = None
    clip_lr: Positive = 0.2
    count_noise: Positive | None = None
    cohort: Positive | None = None
    noise_cohort: Annotated[int, Gt(0)] | None = None
    population: Annotated[int, Gt(0)] | None = None

    def __post_init__(self) -> None:
        name = getattr(type(self.inner), "registered_name", type(self.inner).__name__)
        if not isinstance(self.inner, WeightedStrategy):
            raise ValueError(f"inner: {name} looks at each update and not at their sum: what one client can change is not bounded")
        if not self.inner.uniform:
            why = "so what one client can change is not bounded by `clip`"
            raise ValueError(f"inner: {name} does not promise that each client weighs 1, {why}; take fedavg with weights: uniform")
        if self.inner.sends is not Params:
            raise ValueError(f"inner: {name} sends more than a model, and clipping is of models")
        if (self.noise_cohort is None) != (self.population is None):
            raise ValueError("noise_cohort and population belong together: how many of how many clients are pretended to be asked")

    @property
    def local(self) -> LocalProgram:  # type: ignore[override]
        return self.inner.local

    @property
    def personal(self) -> bool:  # type: ignore[override]
        return self.inner.personal

    @property
    def keeps(self) -> bool:  # type: ignore[override]
        return self.inner.keeps

    def owned(self, problem: Problem, w: Params) -> tuple[str, ...]:
        return self.inner.owned(problem, w)

    @property
    def needs(self) -> frozenset[str]:
        return self.inner.needs | (frozenset() if self.cohort is not None else {"rates"})

    def protects(self) -> Protection:
        both = None if self.noise_cohort is None or self.population is None else (self.noise_cohort, self.population)
        return Protection("client", self.noise, both)

    def init(self, problem: Problem, w: Params) -> Guarded:
        return Guarded(self.inner.init(problem, w), torch.full_like(problem.version, self.clip))

    def plan(self, problem: Problem, state: Guarded, ids: np.ndarray, key: Key) -> list[Job]:
        jobs = self.inner.plan(problem, state.inner, ids, key)
        return [replace(job, message=Bounded(job.message, state.clip), program=ClipUpdate.of(job.program)) for job in jobs]

    def memory(self, problem: Problem, w: Params) -> Any:
        return self.inner.memory(problem, w)

    def weigh(self, problem: Problem, state: Guarded, arrivals: Arrivals) -> Tensor:
        return torch.ones_like(arrivals.n)  # [C]

    def apply(self, problem: Problem, state: Guarded, total: Total, arrivals: Arrivals, key: Key) -> Guarded:
        m, z_sum, z_count = self.scales(problem)
        delta: Params = total.payload.delta
        noised = delta + noise_like(delta, fold(key, 0), problem.entropy) * (z_sum * state.clip)
        assert isinstance(self.inner, WeightedStrategy)
        inner = self.inner.apply(problem, state.inner, Total(noised, torch.full_like(total.weight, m)), arrivals, fold(key, 1))
        if self.quantile is None:
            return Guarded(inner, state.clip)
        below = Params({"below": total.payload.below})
        share = (below + noise_like(below, fold(key, 2), problem.entropy) * z_count)["below"] / m + 0.5
        return Guarded(inner, state.clip * torch.exp(-self.clip_lr * (share - self.quantile)))

    def scales(self, problem: Problem) -> tuple[float, float, float]:
        """m, and the deviations of the noise on the sum (over C) and on the count."""
        assert self.noise is not None  # solved for before anything trains
        m = float(problem.rates[problem.sizes > 0].sum()) if self.cohort is None and problem.rates is not None else float(self.cohort or 1)
        pretend = 1.0 if self.noise_cohort is None else m / self.noise_cohort
        if self.quantile is None:
            return m, self.noise * pretend, 0.0
        z_count = self.count_noise or (m if self.noise_cohort is None else self.noise_cohort) / 20
        if 2 * z_count <= self.noise:
            z_count = self.noise  # a noise that leaves less than z to the sum would leave it nothing
        return m, (self.noise**-2 - (2 * z_count) ** -2) ** -0.5 * pretend, z_count * pretend

    def deploy(self, state: Guarded, memory: Any) -> Params:
        return self.inner.deploy(state.inner, memory)

    def report(self, problem: Problem, before: Guarded, state: Guarded, arrivals: Arrivals) -> Report:
        return self.inner.report(problem, before.inner, state.inner, arrivals) | {"clip": float(state.clip)}
