"""Measuring a model on the server's test set, and on each client's own; and prediction sets on the latter."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch

from fedsim import rng
from fedsim.conformal import ConformalStrategy, LabelScore, class_count
from fedsim.data import Federation
from fedsim.metrics import Judged, across_clients, by_class, per_example, summarise
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.sim.executor import Executor
from fedsim.tree import add, concat

JUDGE = 100
"""Folded after `rng.DATA`, for the random numbers of randomised scores; `fedsim.data` folds smaller ones."""

Score = dict[str, float]


def evaluate(executor: Executor, problem: Problem, w: Params, count: int, batch: int, classes: bool = False) -> Score:
    """Loss, accuracy and so on over the `count` examples of the test set, `batch` at a time, on the workers; perhaps also of each class."""
    parts = [slice(start, start + batch) for start in range(0, count, batch)]
    records = executor.map("measure", w, parts)
    if not records:
        return {}
    record = reduce(add, records)
    return summarise(problem.task, record) | (by_class(record) if classes else {})


def evaluate_clients(
    executor: Executor, problem: Problem, models: Callable[[int], Params] | Params, data: Federation, batch: int
) -> tuple[dict[str, Score], dict[str, np.ndarray]]:
    """The spread over clients of their loss and accuracy on their own test data, and each client's, `[N]`, NaN where it has no test data.

    `models` is the one model of all clients, or gives client i's.
    """
    lists = data.client_test
    sums = _shared(executor, models, data, batch) if isinstance(models, Params) else _personal(problem, models, data)
    return spread(sums, lists.sizes.astype(np.float64))


def spread(sums: dict[str, np.ndarray], counts: np.ndarray) -> tuple[dict[str, Score], dict[str, np.ndarray]]:
    """What sums over each client's examples `[N]`, of which there are `counts` `[N]`, say of the clients, and of each."""
    with np.errstate(invalid="ignore"):
        means = {name: values / counts for name, values in sums.items()}  # nan where a client has no test data
    return {name: across_clients(values, counts) for name, values in means.items()}, means


def _shared(executor: Executor, w: Params, data: Federation, batch: int) -> dict[str, np.ndarray]:
    """Sums over each client's test data under one model: all data on the workers, then a segment sum. `{name: [N]}`."""
    lists = data.client_test
    parts = [lists.index[start : start + batch] for start in range(0, len(lists.index), batch)]
    scores = concat(executor.map("score", w, parts))
    return {name: np.bincount(lists.owners(), weights=each.double().cpu(), minlength=data.clients) for name, each in scores.items()}


def _personal(problem: Problem, models: Callable[[int], Params], data: Federation) -> dict[str, np.ndarray]:
    """Sums over each client's test data under its own model. `{name: [N]}`."""
    out: dict[str, np.ndarray] = {}
    for i in np.flatnonzero(data.client_test.sizes):
        own = torch.from_numpy(data.client_test.of(int(i))).to(data.x.device)
        with torch.no_grad():
            scores = per_example(problem.task, problem.output(models(int(i)), data.x[own]), data.y[own])
        for name, each in scores.items():
            out.setdefault(name, np.zeros(data.clients))[i] = float(each.double().sum())
    return out


def judge_sets(
    executor: Executor, problem: Problem, strategy: ConformalStrategy, state: Any, data: Federation, batch: int, key: rng.Key
) -> Judged:
    """The prediction sets of all clients' own test examples, judged.

    Randomised scores draw by `key` and example: the same for all strategies and rounds.
    """
    lists = data.client_test
    index, owner = lists.index, lists.owners()
    parts = [index[start : start + batch] for start in range(0, len(index), batch)]
    output = torch.cat(executor.map("outputs", state.w, parts))
    y = data.y[torch.from_numpy(index).to(data.y.device)]
    words = rng.fold_each(rng.fold(key, rng.DATA, JUDGE), index) >> np.uint64(40)
    u = torch.from_numpy((words / np.float64(1 << 24)).astype(np.float32)).to(output.device, output.dtype)
    q = strategy.thresholds(problem, state).to(output.device)
    q = q.expand(len(y), -1) if len(q) == 1 else q[torch.from_numpy(owner).to(q.device)]  # [M, K]
    covered, size = strategy.score.judge(output, y, u, q)
    classes = class_count(problem)
    label = y.cpu().numpy().astype(np.int64) if classes > 1 else np.zeros(len(index), dtype=np.int64)
    counted = isinstance(strategy.score, LabelScore)
    return Judged(covered.cpu().numpy(), size.double().cpu().numpy(), owner, label, data.clients, classes, counted)
