"""DP-LoRA: low-rank adapters, trained privately on each client and averaged.

Liu, Zhu, Zha, Qiao, Chen, Wang, Yang, "Differentially Private Low-Rank Adaptation of Large Language Model Using Federated Learning", ACM
TMIS 2025 (arXiv 2312.17493), Algorithm 1. W + B A on every adapted layer; A and B are trained and sent, W never is. With p_k = 1/K:

    server sends (A, B)
    client k, as published (local: dp-lora-batch), one step a round:
        g_A, g_B = gradients of the mean loss of a batch
        g_A <- g_A / max(1, ||g_A|| / clip) + noise clip N(0, I) ;   g_B likewise, by its own length
        A_k = A - lr g_A ;  B_k = B - lr g_B
    client k, the default (local: dp-sgd): every example's gradient clipped, by one length over A and B, Poisson-sampled; see fedsim.private
    server, aggregate: naive     A <- sum_k p_k A_k ;  B <- sum_k p_k B_k                  as published
            aggregate: product   B A <- the nearest matrix of rank r to sum_k p_k B_k A_k, with A's rows orthonormal

As published, the mechanism has no epsilon for examples: a batch's gradient that is clipped after averaging moves by up to 2 clip when one
example is replaced, not by clip / batch_size, A and B are two mechanisms, and no sampling or composition is stated. None is reported for
it. The mean of factors is not the factor of the mean: `server.bias` is ||mean(B) mean(A) - mean(B A)|| / ||mean(B A)||.

Remedies: `aggregate: product` (FLoRA, Wang et al., NeurIPS 2024, arXiv 2409.05976, truncated to rank r as in FedSVD, arXiv 2505.12805), or
`model.adapt.train: b` (FFA-LoRA, Sun et al., ICLR 2024, arXiv 2403.12313), which leaves A as drawn, so that mean(B) A is exact.

Differs: the paper states neither targets, alpha, sampling nor an accountant. FLoRA adds the products to W; here the rank stays r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from fedsim import lowrank
from fedsim.local import Constant, Learner, Schedule, Sgd, clip, counted
from fedsim.params import Params
from fedsim.private import NOISE, DpSgd
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.rng import Key
from fedsim.strategy import Count, LocalProgram, Report, Strategy, Weighting, client_weights
from fedsim.tree import record
from fedsim.types import Arrivals, Batch, Draw, Draws, Reply, Updates


@record
class Averaged:
    """The adapters, and how far the naive mean of this round's was from the mean of their products."""

    w: Params
    bias: Tensor


@register("dp-lora-batch")
@dataclass(frozen=True)
class DpLoraBatch(LocalProgram):
    """A noisy step as published by Liu et al.: a batch's gradient clipped after averaging, A and B apart. No epsilon for examples."""

    lr: Annotated[float, Gt(0)] = 5e-4
    noise: Annotated[float, Ge(0)] = 2.0
    clip: Annotated[float, Gt(0)] = 10.0
    epochs: Count = 1
    steps: Count | None = 1
    batch_size: Count | None = 8
    schedule: Schedule = Constant()

    def draws(self, problem: Problem, batch: int) -> dict[str, Draw]:
        return problem.draws(batch) | {NOISE: Draw("normal", (problem.size,))}

    def begin(self, problem: Problem, message: Params, memory: Any) -> Learner:
        return Sgd(self.lr).begin(problem, message, memory)

    def step(self, problem: Problem, carry: Learner, batch: Batch, draws: Draws, passname: str) -> Learner:
        g, loss = problem.grad(carry.w, batch, {name: u for name, u in draws.items() if name != NOISE})
        parts = ({k: v for k, v in g.items() if k.endswith(lowrank.A) == is_a} for is_a in (True, False))
        short = {k: v for part in parts if part for k, v in clip(Params(part), self.clip).items()}
        noise = carry.w.from_flat(draws[NOISE].to(loss.dtype))
        g = Params({k: short[k] for k in g}).plus(noise, self.noise * self.clip)
        return counted(Sgd(self.lr, schedule=self.schedule).along(problem, carry, g), batch, loss)

    def finish(self, problem: Problem, message: Params, carry: Learner, n: Tensor) -> Reply:
        return Sgd(self.lr).finish(problem, message, carry, n)


@register("dp-lora")
@dataclass(frozen=True)
class DpLora(Strategy):
    """Average adapters that clients train privately, factor by factor or product by product (Liu et al., ACM TMIS 2025).

    aggregate: naive = A and B each by itself; product = their products, cut to rank r by a singular value decomposition.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"adapters"})
    paces: ClassVar[frozenset[str]] = frozenset({"sync"})  # factors of different versions have no common product

    local: LocalProgram = DpSgd()
    aggregate: Literal["naive", "product"] = "naive"
    weights: Weighting = "uniform"

    def init(self, problem: Problem, w: Params) -> Averaged:
        return Averaged(w, torch.zeros_like(problem.version))

    def server(self, problem: Problem, state: Averaged, updates: Updates, key: Key) -> Averaged:
        weights = client_weights(self.weights, updates.arrivals)
        p = (weights / weights.sum()).to(state.bias)  # [C]
        models = updates.payload + state.w  # [C, ...]
        bias = lowrank.bias(models, p)
        if self.aggregate == "product":
            return Averaged(lowrank.mean_of_products(models, p), bias)
        return Averaged(state.w + updates.mean(weights), bias)

    def report(self, problem: Problem, before: Averaged, state: Averaged, arrivals: Arrivals) -> Report:
        return {"weight": client_weights(self.weights, arrivals), "bias": float(state.bias)}
