"""Where aggregation leads when who takes part depends on the data: closed-form fixed points on least squares.

Six clients, each with a quadratic loss (w - w_n).H_n (w - w_n) / 2, w_n the more to the left the more often n comes; one full-batch step a
round, with a rate that decays. Then the fixed point of an aggregation that gives client n the mean weight q_n is the minimum of
sum_n q_n F_n, (sum q_n H_n)^-1 sum q_n H_n w_n, and the true optimum has all q_n equal. The mean of the last 250 models is compared.
"""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from toy import close, path, problem_of

from fedsim.fleet import Bernoulli, Cyclic, Markov
from fedsim.fleet.rates import Listed as ListedRates
from fedsim.local import InverseSqrt, Sgd
from strategies.fedau import FedAU, KnownP
from strategies.fedavg import FedAvg
from strategies.fedawe import FedAWE
from strategies.fedstale import FedStale, FedVarp
from strategies.mifa import Mifa

P = (0.15, 0.3, 0.5, 0.7, 0.9, 0.9)
LOCAL = Sgd(lr=0.2, steps=1, batch_size=None, schedule=InverseSqrt(10))
PATTERNS = {
    "bernoulli": Bernoulli(ListedRates(P)),
    "markov": Markov(ListedRates(P), off_to_on=0.3),
    "cyclic": Cyclic(ListedRates(P), period=20),
}


def federation():
    random = np.random.default_rng(0)
    xs = [random.normal(size=(4, 2)) * scale for scale in (0.6, 0.8, 1.0, 1.0, 1.2, 1.4)]
    return xs, [x @ (np.array([6.0, -4.0]) * (1 - 2 * p)) for x, p in zip(xs, P, strict=True)]


XS, YS = federation()
H = np.array([x.T @ x / 4 for x in XS])
B = np.array([x.T @ y / 4 for x, y in zip(XS, YS, strict=True)])


def minimum(q):
    """Of sum_n q_n F_n."""
    return np.linalg.solve(np.einsum("n,nij->ij", q, H), q @ B)


OPTIMUM = minimum(np.ones(6))


def reached(strategy, pattern="bernoulli", count=500, seed=0):
    toy = problem_of(XS, YS)
    toy = toy._replace(problem=replace(toy.problem, rates=torch.tensor(P)))
    return path(strategy, toy, count, participation=PATTERNS[pattern], chunk=6, mode="vmap", seed=seed)[count // 2 :].mean(0)


def share_of_a_mean():
    """E [n in S] / |S| under independent participation, over all 64 sets S."""
    q = np.zeros(6)
    for here in product((0, 1), repeat=6):
        chance = np.prod([p if came else 1 - p for came, p in zip(here, P, strict=True)])
        q += chance * np.array(here) / max(1, sum(here))
    return q


def test_averaging_who_took_part_leads_to_the_closed_form_biased_point():
    biased = minimum(share_of_a_mean())
    assert np.abs(biased - OPTIMUM).max() > 1.25  # what is at stake
    close(reached(FedAvg(LOCAL, weights="uniform")), biased, within=0.1)


def test_averaging_over_all_weighs_clients_by_how_often_they_come():
    biased = minimum(np.array(P))
    assert np.abs(biased - OPTIMUM).max() > 1
    close(reached(FedAvg(LOCAL, weights="all")), biased, within=0.1)


@pytest.mark.parametrize("cutoff", [2, 5])
def test_a_cutoff_leaves_the_bias_that_its_closed_form_says(cutoff):
    """E omega_n p_n = 1 - (1 - p_n)^K."""
    biased = minimum(1 - (1 - np.array(P)) ** cutoff)
    assert np.abs(biased - OPTIMUM).max() > {2: 0.6, 5: 0.2}[cutoff]
    close(reached(FedAU(LOCAL, cutoff=cutoff)), biased, within=0.1)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("strategy", "within"),
    [
        pytest.param(KnownP(LOCAL), 0.15, id="known-p"),
        pytest.param(FedAU(LOCAL, cutoff=None), 0.15, id="fedau"),
        pytest.param(FedAWE(LOCAL), 0.15, id="fedawe"),
        pytest.param(FedStale(LOCAL, beta=0.5, weights="uniform"), 0.1, id="fedstale"),
        pytest.param(FedVarp(LOCAL, rates="known"), 0.02, id="fedvarp known"),
        pytest.param(FedVarp(LOCAL), 0.02, id="fedvarp"),
        pytest.param(Mifa(LOCAL), 0.02, id="mifa"),
    ],
)
def test_who_corrects_for_participation_reaches_the_optimum(strategy, within, pattern):
    """FedAvg ends 1.3 away under each pattern. Where weights make up for absence a round is still noisy, because of who happens to come;
    where memory does, the noise goes to zero with the rate, and so may the tolerance.
    """
    close(reached(strategy, pattern), OPTIMUM, within=within)


@pytest.mark.parametrize("pattern", ["markov", "cyclic"])
def test_the_bias_of_plain_averaging_is_there_under_dependent_rounds_too(pattern):
    assert np.abs(reached(FedAvg(LOCAL, weights="uniform"), pattern) - OPTIMUM).max() > 1.25


def test_local_steps_drift_away_from_the_optimum_whatever_the_weights():
    """K steps of a constant rate r move client n by Q_n (w_n - w), Q_n = I - (I - r H_n)^K: the fixed point is (sum Q_n)^-1 sum Q_n w_n."""
    rate, steps = 0.2, 8
    q = np.eye(2) - np.linalg.matrix_power(np.eye(2) - rate * H, steps)
    drifted = np.linalg.solve(q.sum(0), np.einsum("nij,nj->i", q, np.linalg.solve(H, B[..., None])[..., 0]))
    assert np.abs(drifted - OPTIMUM).max() > 0.2
    local = Sgd(lr=rate, steps=steps, batch_size=None)
    close(reached(FedVarp(local, rates="known"), count=300), drifted, within=0.01)
