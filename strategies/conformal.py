"""DP-FedCP: federated conformal prediction under label shift, with differential privacy.

Plassier, Makni, Rubashevskii, Moulines, Panov, "Conformal Prediction for Federated Uncertainty Quantification Under Label Shift", ICML 2023
(PMLR 202:27907-27947, arXiv 2306.05131), DP-FedCP with DP-FedAvgQE.

    once, client i:   V_k = score of its k-th calibration example under the frozen model
                      sends M_iy + N(0, s_c^2): how many it has of each class y
    server:           w_y = P*(y) / (sum_i M_iy / M);  mass of i: m_i = sum_y w_y M_iy + w_inf / n;  lambda_i = m_i / sum_j m_j
    round t, i in S:  q_i <- q; K times:  q_i <- q_i - eta_t g_i
                      g_i = (sum_k w_{Y_k} S_g'(q_i; V_k) - (1 - alpha) w_inf / n) / m_i + N(0, s_i^2)
    server:           q <- q + (n / |S|) sum_{i in S} lambda_i (q_i - q);   qbar: the average of the iterates
    sets:             C(x) = { y : V(x, y) <= qbar_y + gamma (1 - alpha) }

S_g is the Moreau envelope of the pinball loss (`fedsim/conformal/pinball.py`), n the clients that counted, w_inf = w_y for the threshold
of label y: K thresholds in parallel, or one with the largest weight (`per_label: false`), for each target law. Messages are these scalars.

Privacy of one calibration example (replaced by another; how many a client has is public):
    counts       change by sqrt(2) in length:                                            s_c = sqrt(2) z_c
    gradients    m_i is made of released counts, so sum_k w s changes by max w at most,
                 for S_g' lies in an interval of length 1; R x L thresholds at once:     s_i = z_g sqrt(R L) max w / m_i
    budget       1 / z^2 = 1 / z_c^2 + T K / z_g^2, `count_share` of it for the counts; no amplification by sampling is claimed

Differs: of the paper only the abstract could be consulted; the rest follows from its ingredients. m_i is made of released counts, as the
bound on sensitivity needs. The average weighs the j-th iterate by about j^average (Shamir and Zhang, ICML 2013; 0 is the plain mean). A
class that the target has and calibration lacks is in every set; with noise, one counts as lacking up to two deviations of its count.
Thresholds are infinite where there are too few examples. Who has not counted in the first `counting` rounds is not part of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from fedsim.conformal import (
    Alpha,
    ConformalStrategy,
    Lac,
    Own,
    Score,
    Scored,
    Target,
    class_count,
    importance,
    label_counts,
    more_scores,
    no_scores,
    room,
    slope,
)
from fedsim.local import InverseSqrt, Schedule
from fedsim.params import Params
from fedsim.privacy import gaussian_epsilon, gaussian_noise
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.rng import Key
from fedsim.strategy import Count, LocalProgram, Report
from fedsim.tree import record
from fedsim.types import Arrivals, Batch, Draw, Draws, Job, Reply, Updates


@record
class Order:
    """What the server sends: thresholds, importance weights, and constants."""

    q: Tensor  # [R, L]
    w: Tensor  # [R, K]
    alpha: Tensor
    noise: Tensor  # z_g sqrt(R L)
    clients: Tensor  # n


@record
class Kept:
    """What a device remembers: its scores and labels, and the counts that it released."""

    v: Tensor  # [room]
    y: Tensor  # [room]
    there: Tensor  # [room] 1 where there is a score
    counts: Tensor  # [K]


def infinite(w: Tensor, per_label: bool) -> Tensor:
    """w_inf of each threshold. `[R, K] -> [R, L]`."""
    return w if per_label else w.amax(1, keepdim=True)


def masses(counts: Tensor, w: Tensor, w_inf: Tensor, clients: Tensor) -> Tensor:
    """m_i, at least that of one example. `[..., K], [R, K], [R, L] -> [..., R, L]`."""
    m = (counts @ w.T).maximum(w.amax(1))  # [..., R]
    return (m[..., None] + w_inf / clients).clamp(min=1e-30)


@dataclass(frozen=True)
class CountLabels(LocalProgram):
    """Scores the calibration data, remembers the scores, and sends how many there are of each class, plus noise."""

    reads: ClassVar[Literal["train", "calibration"]] = "calibration"

    score: Score
    noise: float  # s_c
    epochs: int = 1
    steps: int | None = None
    batch_size: int | None = 500

    def begin(self, problem: Problem, message: Tensor, memory: Kept) -> tuple[Scored, Tensor]:
        return no_scores(problem), problem.version.new_zeros(class_count(problem))

    def step(self, problem: Problem, carry: tuple[Scored, Tensor], batch: Batch, draws: Draws, passname: str) -> tuple[Scored, Tensor]:
        return more_scores(self.score, problem, carry[0], batch, draws["u"]), draws["z"].to(carry[1].dtype)

    def finish(self, problem: Problem, message: Tensor, carry: tuple[Scored, Tensor], n: Tensor) -> Reply:
        scored, z = carry
        counts = label_counts(scored, class_count(problem)) + self.noise * z
        there = (torch.arange(len(scored.v) - 1, device=z.device) < scored.n).to(z.dtype)
        return Reply(counts, Kept(scored.v[:-1], scored.y[:-1], there, counts), {})

    def draws(self, problem: Problem, batch: int) -> dict[str, Draw]:
        return {"u": Draw("uniform", (batch,)), "z": Draw("normal", (class_count(problem),))}


@record
class Descending:
    """A client on its way to its own thresholds."""

    q: Tensor  # [R, L]
    kept: Kept
    w: Tensor  # [R, room] of its scores
    tail: Tensor  # [R, L] (1 - alpha) w_inf / n
    m: Tensor  # [R, L]
    s: Tensor  # [R, L] deviation of the noise
    alpha: Tensor


@register("pinball-sgd")
@dataclass(frozen=True)
class PinballSgd(LocalProgram):
    """Descends on the smoothed pinball loss of a client's scores; runs under the `conformal` strategy only.

    score: how a label's misfit is measured.
    lr, schedule: eta_t, in units of the score.
    gamma: of the envelope, in units of the score; the threshold is at most that much too large.
    steps: the paper's K. More than one drifts, because clients' minimisers differ.
    batch_size: without meaning; a step sees all scores.
    noisy: shape of the noise; the strategy sets it.
    """

    reads: ClassVar[Literal["train", "calibration"]] = "calibration"
    receives: ClassVar[type] = Order

    score: Score = Lac()
    lr: Annotated[float, Gt(0)] = 0.5
    schedule: Schedule = InverseSqrt()
    gamma: Annotated[float, Gt(0)] = 0.005
    steps: Count = 1
    epochs: Literal[1] = 1
    batch_size: Literal[1] = 1
    noisy: tuple[int, int] | None = None

    def begin(self, problem: Problem, message: Order, memory: Kept) -> Descending:
        w_inf = infinite(message.w, message.q.shape == message.w.shape)
        m = masses(memory.counts, message.w, w_inf, message.clients)
        tail, s = (1 - message.alpha) * w_inf / message.clients, message.noise * message.w.amax(1, keepdim=True) / m
        return Descending(message.q, memory, message.w[:, memory.y] * memory.there, tail, m, s, message.alpha)

    def step(self, problem: Problem, carry: Descending, batch: Batch, draws: Draws, passname: str) -> Descending:
        pull = slope(carry.q[:, :, None] - carry.kept.v, carry.alpha, self.gamma)  # [R, L, room]
        g = ((pull * carry.w[:, None, :]).sum(2) - carry.tail) / carry.m
        if self.noisy is not None:
            g = g + carry.s * draws["z"]
        return replace(carry, q=carry.q - self.lr * self.schedule.factor(problem.version) * g)

    def finish(self, problem: Problem, message: Order, carry: Descending, n: Tensor) -> Reply:
        return Reply(carry.q - message.q, carry.kept, {})

    def draws(self, problem: Problem, batch: int) -> dict[str, Draw]:
        return {} if self.noisy is None else {"z": Draw("normal", self.noisy)}


@record
class Quantiles:
    """The server's state."""

    w: Params
    counts: Tensor  # [N, K] as released
    known: Tensor  # [N] bool: who has counted
    q: Tensor  # [R, L]
    mean: Tensor  # [R, L] qbar
    t: Tensor  # rounds of descent, int64


@register("conformal")
@dataclass(frozen=True)
class Conformal(ConformalStrategy):
    """Thresholds of prediction sets under label shift, by private descent on a smooth pinball loss (Plassier et al., ICML 2023).

    alpha: how often a set may miss.
    target: whose label law the promise is for.
    per_label: a threshold for each label, or one for all, a little larger: less to send, and less noise.
    start: q_0.
    average: of the iterates, see above.
    counting: rounds in which clients count labels.
    epsilon, delta: the privacy of a calibration example; null is none. Then `iterations` is how many rounds of descent are paid for.
    count_share: of the budget, for the label counts.
    """

    sends: ClassVar[type] = Order

    alpha: Alpha = 0.1
    target: Target = Own()
    local: PinballSgd = PinballSgd()
    per_label: bool = True
    start: float = 0.5
    average: Annotated[float, Ge(0)] = 3.0
    counting: Count = 1
    epsilon: Annotated[float, Gt(0)] | None = None
    delta: Annotated[float, Gt(0), Lt(1)] = 1e-5
    iterations: Count | None = None
    count_share: Annotated[float, Gt(0), Lt(1)] = 0.1

    def __post_init__(self) -> None:
        if self.epsilon is not None and self.iterations is None:
            raise ValueError("epsilon: say for how many rounds of descent it pays, e.g. iterations: 100")
        if self.local.noisy is not None:
            raise ValueError("local.noisy: is set by the strategy; leave it out")

    def noise(self) -> tuple[float, float]:
        """(z_c, z_g), the noise multipliers of the counts and of one gradient; zeros without privacy."""
        if self.epsilon is None or self.iterations is None:
            return 0.0, 0.0
        z = gaussian_noise(self.epsilon, self.delta)
        return z / math.sqrt(self.count_share), z * math.sqrt(self.iterations * self.local.steps / (1 - self.count_share))

    def weights(self, state: Quantiles) -> tuple[Tensor, Tensor]:
        """Importance weights, and which classes are lacking, both `[R, K]`."""
        counts = state.counts.double()
        least = 2 * math.sqrt(2 * float(state.known.sum())) * self.noise()[0]
        return importance(self.target.laws(counts.clamp(min=0)), counts.sum(0), least)

    def init(self, problem: Problem, w: Params) -> Quantiles:
        n, k, like = problem.clients, class_count(problem), problem.version
        counts = like.new_zeros(n, k)
        q = like.new_full((len(self.target.laws(counts)), k if self.per_label else 1), self.start)
        return Quantiles(w, counts, like.new_zeros(n, dtype=torch.bool), q, q, like.new_zeros((), dtype=torch.int64))

    def memory(self, problem: Problem, w: Params) -> Kept:
        v, like = problem.version.new_zeros(room(problem)), problem.version
        return Kept(v, v.long(), v, like.new_zeros(class_count(problem)))

    def order(self, state: Quantiles) -> Order:
        """What clients are sent."""
        q = state.q
        w = self.weights(state)[0].to(q)
        return Order(q, w, q.new_tensor(self.alpha), q.new_tensor(self.noise()[1] * math.sqrt(q.numel())), state.known.sum().to(q))

    def plan(self, problem: Problem, state: Quantiles, ids: np.ndarray, key: Key) -> list[Job]:
        known = state.known.cpu().numpy()[ids]
        if int(problem.version) < self.counting:
            job = Job(ids[~known], problem.version.new_zeros(()), CountLabels(self.local.score, math.sqrt(2) * self.noise()[0]))
        elif self.iterations is not None and int(state.t) >= self.iterations:
            return []  # what was paid for is spent
        else:
            program = self.local if self.epsilon is None else replace(self.local, noisy=(state.q.shape[0], state.q.shape[1]))
            job = Job(ids[known], self.order(state), program)
        return [job] if len(job.ids) else []

    def shares(self, problem: Problem, state: Quantiles, arrivals: Arrivals) -> Tensor:
        """lambda_i of the arrivals, `[C, R, L]`."""
        order = self.order(state)
        m = masses(state.counts, order.w, infinite(order.w, self.per_label), order.clients)
        m = m * state.known[:, None, None]
        return (m / m.sum(0))[arrivals.ids.to(m.device)]

    def server(self, problem: Problem, state: Quantiles, updates: Updates, key: Key) -> Quantiles:
        ids = updates.arrivals.ids.to(state.known.device)
        if int(problem.version) < self.counting:
            counts = state.counts.index_copy(0, ids, updates.payload)
            return replace(state, counts=counts, known=state.known.index_fill(0, ids, value=True))
        lam = self.shares(problem, state, updates.arrivals)
        q = state.q + state.known.sum() / len(updates) * (lam * updates.payload).sum(0)
        c = (self.average + 1) / (int(state.t) + self.average + 1)
        return replace(state, q=q, mean=state.mean + c * (q - state.mean), t=state.t + 1)

    def thresholds(self, problem: Problem, state: Quantiles) -> Tensor:
        w, lacking = self.weights(state)
        total = (w * state.counts.double().sum(0)).sum(1, keepdim=True)  # [R, 1]
        full = (total <= 0) | (total * (1 + 1e-12) < (1 - self.alpha) * (total + infinite(w, self.per_label))) | (state.t == 0)
        q = (state.mean.double() + self.local.gamma * (1 - self.alpha)).masked_fill(full, torch.inf)
        return q.expand(w.shape).masked_fill(lacking, torch.inf)

    def report(self, problem: Problem, before: Quantiles, state: Quantiles, arrivals: Arrivals) -> Report:
        z_c, z_g = self.noise()
        q = self.thresholds(problem, state)
        said: dict[str, Any] = {"threshold": float(q[q.isfinite()].mean()), "full_sets": float(q.isinf().all(1).double().mean())}
        said["lacking_classes"] = float(self.weights(state)[1].any(0).sum())
        if self.epsilon is not None:
            said["privacy.epsilon"] = gaussian_epsilon([(z_c, 1), (z_g, int(state.t) * self.local.steps)], self.delta)
        if int(state.t) > int(before.t):
            said["weight"] = self.shares(problem, before, arrivals).mean((1, 2))
        return said
