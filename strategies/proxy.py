"""What else a server can do with proxy data, beside learning weights: fine-tune on their labels, or distil without labels.

server-finetune: FedAvg, then a client's program on the labelled proxy data. The plainest use, and a baseline of Li et al., "Revisiting
Weighted Aggregation in Federated Learning with Neural Networks", ICML 2023 (arXiv 2302.10911).

feddf: Lin, Kong, Stich, Jaggi, "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020 (arXiv 2006.07242),
Algorithm 1; only the inputs of the proxy data are looked at.

    both:             w <- w + sum_{i in S} n_i Delta_i / sum_{i in S} n_i
    server-finetune:  w <- tune(w), on the loss of the proxy data
    feddf:            w <- tune(w), on KL(teacher || student),  teacher(x) = softmax(mean_{i in S} logits(w_i, x))

The KL's gradient is that of the cross-entropy against the teacher's probabilities, which is the task's own loss.

Defaults of `tune` are those of the baselines in FedLAW's code: SGD with rate 0.08, momentum 0.9, decay 5e-4; 20 epochs of batches of 128.

Differs: FedDF's paper distils with Adam until a validation set stops improving; here for a fixed number of epochs. Momentum starts at zero
in every round. Where a task has no classes, the teacher is the mean output.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.errors import ScenarioError
from fedsim.local import Sgd
from fedsim.params import Params
from fedsim.problem import Classification, MultiLabel, Problem, Regression
from fedsim.proxy import loss, on_server, proxy_of, tune
from fedsim.registry import register
from fedsim.rng import Key
from fedsim.strategy import LocalProgram, Report, Strategy
from fedsim.tree import record, rows
from fedsim.types import Arrivals, Batch, Updates

TUNE = Sgd(lr=0.08, momentum=0.9, weight_decay=5e-4, epochs=20, batch_size=128)


@record
class Tuned:
    """The model, and its proxy loss as averaged and as tuned."""

    w: Params
    proxy_loss: Tensor  # [2]


@dataclass(frozen=True)
class _Tuning(Strategy):
    """FedAvg, then a client's program on a lesson from the proxy data."""

    needs: ClassVar[frozenset[str]] = frozenset({"proxy"})
    paces: ClassVar[frozenset[str]] = frozenset({"sync"})

    local: LocalProgram = Sgd()
    tune: LocalProgram = TUNE

    def __post_init__(self) -> None:
        if self.tune.receives is not Params:
            raise ValueError(f"tune: {type(self.tune).__name__} does not start from a model; take sgd or adam")

    @abstractmethod
    def lesson(self, problem: Problem, state: Tuned, updates: Updates) -> Batch:
        """What the average is tuned on."""

    def init(self, problem: Problem, w: Params) -> Tuned:
        return Tuned(w, torch.full((2,), torch.nan))

    def server(self, problem: Problem, state: Tuned, updates: Updates, key: Key) -> Tuned:
        mean = state.w + updates.mean(updates.arrivals.n)
        w = tune(self.tune, on_server(problem), mean, self.lesson(problem, state, updates), key)
        return Tuned(w, torch.stack([loss(problem, v, proxy_of(problem)) for v in (mean, w)]))

    def report(self, problem: Problem, before: Tuned, state: Tuned, arrivals: Arrivals) -> Report:
        """Proxy loss of the average, and of what was made of it."""
        return {"weight": arrivals.n, "proxy_loss_before": float(state.proxy_loss[0]), "proxy_loss_after": float(state.proxy_loss[1])}


def teach(problem: Problem, models: Params, x: Tensor) -> Tensor:
    """What an ensemble says of `x`, as targets for the task's loss. Models `[C, ...]`, targets `[B, K]`."""
    count = len(next(iter(models.values())))
    with torch.no_grad():
        mean = sum(problem.output(rows(models, i), x) for i in range(count)) / count  # one at a time: C outputs need not fit
    assert isinstance(mean, Tensor)
    if isinstance(problem.task, Classification):
        return mean.softmax(1)
    return mean.sigmoid() if isinstance(problem.task, MultiLabel) else mean


@register("server-finetune")
@dataclass(frozen=True)
class ServerFinetune(_Tuning):
    """FedAvg, then training on the server's labelled proxy data (a baseline of Li et al., ICML 2023)."""

    def lesson(self, problem: Problem, state: Tuned, updates: Updates) -> Batch:
        return proxy_of(problem)


@register("feddf")
@dataclass(frozen=True)
class FedDF(_Tuning):
    """FedAvg, then distillation of the ensemble of clients on unlabelled proxy inputs (Lin et al., NeurIPS 2020)."""

    def init(self, problem: Problem, w: Params) -> Tuned:
        if not isinstance(problem.task, (Classification, MultiLabel, Regression)):
            raise ScenarioError("strategy", "feddf distils one answer an example; this task asks for an answer at each position")
        return super().init(problem, w)

    def lesson(self, problem: Problem, state: Tuned, updates: Updates) -> Batch:
        x = proxy_of(problem).x
        return Batch(x, teach(problem, updates.payload + state.w, x))  # w_i = w + Delta_i
