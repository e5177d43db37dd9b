"""Conformal client weighting, by hand, and its reduction to FedAvg."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim.conformal import Residual
from fedsim.local import Sgd
from fedsim.registry import lookup
from fedsim.strategy import Strategy
from strategies.conformal_weights import ConformalWeights
from strategies.fedavg import FedAvg
from tests.toy import close, path, problem_of, rounds

ONE = Sgd(lr=0.5, batch_size=None)


def federation():
    """Three clients on a line, x = 1: targets around 0, 1 and 4, 12 examples each."""
    g = np.random.default_rng(0)
    return problem_of([np.ones((12, 1))] * 3, [c + 0.1 * (i + 1) * g.normal(size=12) for i, c in enumerate((0.0, 1.0, 4.0))])


def calibrated(toy):
    return toy._replace(problem=replace(toy.problem, calibration=toy.problem.sizes))


@pytest.mark.parametrize("rule", ["size", "gap"])
def test_power_zero_is_fedavg(rule):
    """A round of every three looks and moves nothing; local steps on all data draw nothing, so the others are FedAvg's to the last bit."""
    toy = calibrated(federation())
    ours = path(ConformalWeights(local=ONE, rule=rule, power=0.0, every=3, score=Residual()), toy, 6)
    plain = path(FedAvg(local=ONE), toy, 4)
    close(ours[[1, 2, 4, 5]], plain, 1e-12)
    close(ours[[0, 3]], [[0.0], plain[1]], 1e-12)


def test_by_hand():
    """alpha = 0.2, w = 0 at first: scores are |y|; of 12 the ceil(0.8 * 13) = 11th smallest; sets are 2 q_i wide.

    import numpy as np
    q = [sorted(abs(y))[10] for y in ys]; size = 2 * np.array(q); a = size / size.mean()
    w1 = 0.5 * sum(a * means) / sum(a)                      # one step of rate 0.5 on half the squared error, from w = 0
    """
    toy = calibrated(federation())
    ys = toy.y.view(3, 12).numpy()
    q = np.sort(np.abs(ys), axis=1)[:, 10]
    first, second = rounds(ConformalWeights(local=ONE, alpha=0.2, every=5, score=Residual()), toy, 2)
    close(first.size, 2 * q)
    close(first.q, q.mean())
    close(first.miss, [0, 0, 0])  # there was no shared threshold yet
    close(second.w["weight"], [[0.5 * (q * ys.mean(1)).sum() / q.sum()]])


def test_the_gap_is_what_the_shared_threshold_leaves_out():
    toy = calibrated(federation())
    chosen = ConformalWeights(local=ONE, alpha=0.2, every=2, rule="gap", power=2.0, score=Residual())
    first, trained, second, last = rounds(chosen, toy, 4)
    close(trained.w["weight"], [[0.5 * toy.y.mean()]])  # no gaps are known: FedAvg
    ys, w = toy.y.view(3, 12).numpy(), float(trained.w["weight"])
    miss = (np.abs(ys - w) > float(first.q)).mean(1)
    close(second.miss, miss)
    assert 0 <= miss.min() < miss.max()
    a = np.exp(2.0 * (miss - 0.2))
    close(last.w["weight"], [[w + 0.5 * (a * (ys.mean(1) - w)).sum() / a.sum()]])


def test_few_examples_and_none():
    """Four examples are too few for nine tenths: the largest score stands in. A client without calibration data counts as before."""
    toy = problem_of([np.ones((4, 1)), np.ones((4, 1))], [[1.0, 2, 3, 4], [5.0, 5, 5, 5]])
    toy = toy._replace(problem=replace(toy.problem, calibration=torch.tensor([4.0, 0.0])))
    chosen = ConformalWeights(local=ONE, every=5, score=Residual())
    first, second = rounds(chosen, toy, 2)
    assert first.known.tolist() == [True, False]
    assert first.size.tolist() == [8.0, 0.0]
    close(second.w["weight"], [[0.5 * (2.5 + 5) / 2]])
    assert math.isfinite(float(first.q))
    assert lookup(Strategy, "conformal-weights") is ConformalWeights
