"""F1. What conformal strategies have in common: clients score their calibration data once, the server turns that into thresholds.

A conformal phase follows a phase that trains: `problem.frozen` is the model, which it leaves as it is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedsim.conformal.scores import Lac, Score
from fedsim.conformal.target import least_examples
from fedsim.errors import ScenarioError
from fedsim.params import Params
from fedsim.problem import Classification, Problem
from fedsim.rng import Key
from fedsim.strategy import Count, LocalProgram, Report, Strategy
from fedsim.tree import record, tree_map
from fedsim.types import Arrivals, Batch, Draw, Draws, Job, Updates


class ConformalStrategy(Strategy, ABC):
    """A strategy that gives thresholds of prediction sets. What it deploys is the model that it was given."""

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    paces: ClassVar[frozenset[str]] = frozenset({"sync"})
    alpha: float

    @property
    def score(self) -> Score:
        """What clients score by; a field of `local`."""
        score: Score = self.local.score  # type: ignore[attr-defined]
        return score

    @abstractmethod
    def thresholds(self, problem: Problem, state: Any) -> Tensor:
        """The threshold of each label: of all clients `[1, K]`, or of each client `[N, K]`. float64, infinite where a set must be full."""

    def check(self, problem: Problem, where: str) -> None:
        """Refuse a problem that these sets cannot be made for. Raises `ScenarioError` at `where`."""
        score, task = self.score, problem.task
        if not isinstance(task, score.task):
            fitting = sorted(name for name, cls in Score.choices.items() if isinstance(task, cls.task))  # type: ignore[attr-defined]
            has = f"this task ({type(task).__name__}) has: {', '.join(fitting)}" if fitting else f"{type(task).__name__} has none"
            raise ScenarioError(f"{where}.local.score", f"'{score.registered_name}' does not fit; {has}")
        examples, least = int(calibration_sizes(problem).sum()), least_examples(self.alpha)
        if examples < least:
            raise ScenarioError(
                f"{where}.alpha",
                f"{self.alpha:g} takes at least {least} calibration examples (n >= (1 - alpha) / alpha), and there are {examples}; "
                "raise data.calibration or data.client_test, or alpha",
            )
        target = getattr(self, "target", None)
        if target is not None and (fault := target.fault(problem)):
            raise ScenarioError(f"{where}.target", fault)


def calibration_sizes(problem: Problem) -> Tensor:
    """Calibration examples of each client, `[N]`; a strategy that asks for them lists "calibration" in `needs`."""
    assert problem.calibration is not None
    return problem.calibration


def room(problem: Problem) -> int:
    """Places for scores on a device: the calibration examples of the client that has most."""
    return int(calibration_sizes(problem).max())


@record
class Scored:
    """A client's scores so far, in places `[room + 1]` of which the last is for padding."""

    v: Tensor  # [room + 1] scores, 0 where there is none
    y: Tensor  # [room + 1] labels, int64
    n: Tensor  # how many there are, int64


@dataclass(frozen=True)
class Calibration(LocalProgram, ABC):
    """Scores all calibration data of a client under the frozen model, `batch_size` at a time; `finish` says what becomes of them."""

    reads: ClassVar[Literal["train", "calibration"]] = "calibration"
    receives: ClassVar[type] = Tensor  # alpha

    score: Score = Lac()
    epochs: Literal[1] = 1
    steps: None = None
    batch_size: Count | None = 500

    def begin(self, problem: Problem, message: Any, memory: Any) -> Scored:
        return no_scores(problem)

    def step(self, problem: Problem, carry: Scored, batch: Batch, draws: Draws, passname: str) -> Scored:
        return more_scores(self.score, problem, carry, batch, draws["u"])

    def draws(self, problem: Problem, batch: int) -> dict[str, Draw]:
        return {"u": Draw("uniform", (batch,))}  # the network itself is in evaluation


def no_scores(problem: Problem) -> Scored:
    """Before the first batch."""
    places, like = room(problem) + 1, problem.version
    return Scored(like.new_zeros(places), like.new_zeros(places, dtype=torch.int64), like.new_zeros((), dtype=torch.int64))


def more_scores(score: Score, problem: Problem, before: Scored, batch: Batch, u: Tensor) -> Scored:
    """A client's scores with those of a batch added."""
    assert problem.frozen is not None
    v = score.of(problem.output(problem.frozen, batch.x), batch.y, u).to(before.v.dtype)
    y = batch.y if isinstance(problem.task, Classification) else torch.zeros_like(v, dtype=torch.int64)
    place, n = before.n + torch.arange(len(v), device=v.device), torch.as_tensor(batch.n, device=v.device)
    if batch.mask is not None:  # padding is at the end of a batch
        place = place.where(batch.mask > 0, len(before.v) - 1)
    return Scored(before.v.scatter(0, place, v), before.y.scatter(0, place, y), before.n + n.long())


def label_counts(scored: Scored, classes: int) -> Tensor:
    """How many of the scored examples each class has, `[K]` float."""
    there = (torch.arange(len(scored.v), device=scored.v.device) < scored.n).to(scored.v.dtype)
    return scored.v.new_zeros(classes).scatter_add(0, scored.y, there)


@record
class Heard:
    """What a one-shot server keeps: the model, who has answered, and the answers."""

    w: Params
    heard: Tensor  # [N] bool
    answers: Any  # [N, ...]


class OneShot(ConformalStrategy, ABC):
    """Each client answers once, in the first round that it turns up in; `thresholds` are a function of all answers so far."""

    sends: ClassVar[type] = Tensor  # alpha

    @abstractmethod
    def blank(self, problem: Problem) -> Any:
        """An answer of zeros."""

    def more(self, state: Heard) -> Report:
        """What else there is to say of the answers. Default: nothing."""
        return {}

    def init(self, problem: Problem, w: Params) -> Heard:
        n = problem.clients
        answers = tree_map(lambda leaf: leaf.expand(n, *leaf.shape).clone(), self.blank(problem))
        return Heard(w, problem.version.new_zeros(n, dtype=torch.bool), answers)

    def plan(self, problem: Problem, state: Heard, ids: np.ndarray, key: Key) -> list[Job]:
        new = ids[~state.heard.cpu().numpy()[ids]]
        alpha = problem.version.new_tensor(self.alpha, dtype=torch.float64)
        return [Job(new, alpha, self.local)] if len(new) else []

    def server(self, problem: Problem, state: Heard, updates: Updates, key: Key) -> Heard:
        ids = updates.arrivals.ids.to(state.heard.device)
        answers = tree_map(lambda table, new: table.index_copy(0, ids, new.to(table.dtype)), state.answers, updates.payload)
        return Heard(state.w, state.heard.index_fill(0, ids, value=True), answers)

    def report(self, problem: Problem, before: Heard, state: Heard, arrivals: Arrivals) -> Report:
        q = self.thresholds(problem, state)
        said: Report = {"answered": float(state.heard.sum()), "full_sets": float(q.isinf().all(1).double().mean())}
        return said | self.more(state)


def all_scores(heard: Tensor, v: Tensor, y: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The scores and labels of all clients that answered, end to end. `[N], [N, room], [N, room], [N] -> [M], [M]`."""
    there = (torch.arange(v.shape[1], device=v.device) < sizes.to(v.device)[:, None]) & heard[:, None]
    return v[there], y[there]


def split_quantile(v: Tensor, n: Tensor, alpha: Tensor) -> Tensor:
    """The ceil((1 - alpha)(n + 1))-th smallest of the first `n` of `v` `[places]`, or 0 where there are too few: a scalar. For vmap."""
    places = torch.arange(len(v), device=v.device)
    ordered = v.where(places < n, v.new_full((), math.inf)).sort().values
    k = ((1 - alpha) * (n + 1) * (1 - 1e-12)).ceil().long()
    q = ordered.gather(0, (k - 1).clamp(0, len(v) - 1)[None])[0]
    return q.where(k <= n, torch.zeros_like(q))
