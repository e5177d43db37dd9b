"""FedStale and FedVARP: two rounds by hand, an unbiased estimate, what they reduce to, and the running mean of memories."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import Listed, close, jumpers, path, problem_of, rounds, vector

from fedsim.fleet import Bernoulli
from fedsim.fleet.rates import Listed as ListedRates
from fedsim.local import Sgd
from fedsim.types import Arrivals, Updates
from strategies.fedau import FedAU, KnownP
from strategies.fedavg import FedAvg
from strategies.fedstale import FedStale, FedVarp

JUMP = Sgd(lr=2.0, steps=1, batch_size=None)  # of two-dimensional jumpers
TARGETS = [[1, 0], [0, 1], [2, 2]]
P = (0.5, 0.25, 0.8)
SCRIPT = ((0, 1), (1, 2), (), (0, 2))


def toy_of(targets=TARGETS, p=P):
    toy = jumpers(targets)
    return toy._replace(problem=replace(toy.problem, rates=torch.tensor(p)))


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (FedStale(JUMP, server_lr=0.5, beta=0.5, rates="known", weights="uniform"), [[0.33333333, 0.66666667], [0.54166667, 0.91666667]]),
        (
            FedStale(JUMP, server_lr=0.5, beta=0.5, rates="estimated", weights="uniform"),
            [[0.16666667, 0.16666667], [0.52777778, 0.61111111]],
        ),
        (FedVarp(JUMP, server_lr=0.5), [[0.25, 0.25], [0.79166667, 0.79166667]]),
    ],
)
def test_two_rounds_by_hand(strategy, expected):
    """The numbers come from

    import numpy as np
    target, p = np.array([[1., 0.], [0., 1.], [2., 2.]]), np.array([.5, .25, .8])
    alpha = 1 / 3
    for beta, c in ((.5, lambda i, S: alpha / p[i]), (.5, lambda i, S: alpha), (1., lambda i, S: 1 / len(S))):
        w, h = np.zeros(2), np.zeros((3, 2))     # estimated: omega is 1 in both rounds: nobody comes late
        for S in ([0, 1], [1, 2]):
            d = target - w
            v = sum(c(i, S) * (d[i] - beta * h[i]) for i in S) + beta * alpha * h.sum(0)
            w = w + .5 * v
            h[S] = d[S]
            print(w.round(8))
    """
    close(path(strategy, toy_of(), 2, participation=Listed(SCRIPT)), expected)


def test_beta_zero_is_importance_weighted_fedavg():
    random = np.random.default_rng(0)
    toy = problem_of([random.normal(size=(4 + i, 3)) for i in range(3)], [random.normal(size=4 + i) for i in range(3)])
    toy = toy._replace(problem=replace(toy.problem, rates=torch.tensor(P)))
    local = Sgd(lr=0.1, epochs=2, batch_size=3)
    for weights in ("samples", "uniform"):
        stale = path(FedStale(local, beta=0.0, rates="known", weights=weights), toy, 4, participation=Listed(SCRIPT))
        close(stale, path(KnownP(local, weights=weights), toy, 4, participation=Listed(SCRIPT)), within=1e-14)
    estimated = path(FedStale(local, beta=0.0, cutoff=2, weights="uniform"), toy, 4, participation=Listed(SCRIPT))
    close(estimated, path(FedAU(local, cutoff=2), toy, 4, participation=Listed(SCRIPT)), within=1e-7)  # 1/N is float32 there


@pytest.mark.parametrize("rates", ["known", "estimated", "cohort"])
def test_beta_one_is_fedvarp_to_the_bit(rates):
    stale = path(FedStale(JUMP, beta=1.0, rates=rates, weights="uniform"), toy_of(), 4, participation=Listed(SCRIPT))
    assert (stale == path(FedVarp(JUMP, rates=rates), toy_of(), 4, participation=Listed(SCRIPT))).all()


def test_it_is_the_mixture_of_fedavg_and_fedvarp():
    state = rounds(FedStale(JUMP, rates="known"), toy_of(), 2, Listed(SCRIPT))[-1]
    random = np.random.default_rng(0)
    ids = torch.tensor([0, 2])
    who = Arrivals(ids, torch.full((2,), 2.0), torch.zeros_like(ids), torch.zeros_like(ids))
    updates = Updates(who, state.w.map(lambda v: torch.from_numpy(random.normal(size=(2, *v.shape)))))
    end = {b: vector(FedStale(JUMP, beta=b, rates="known").server(toy_of().problem, state, updates, 0).w) for b in (0.0, 0.3, 1.0)}
    close(end[0.3], 0.7 * end[0.0] + 0.3 * end[1.0], within=1e-12)


def test_under_full_participation_beta_does_not_matter_and_it_is_fedavg():
    toy = toy_of(p=(1.0, 1.0, 1.0))
    plain = path(FedAvg(JUMP, weights="uniform"), toy, 4)
    for beta in (0.0, 0.5, 1.0):
        close(path(FedStale(JUMP, beta=beta, rates="known", weights="uniform"), toy, 4), plain, within=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_step_is_unbiased_for_any_beta_and_any_memory(beta):
    """Over 4,000 draws of S ~ Bernoulli(p), with memories and updates held fixed, the mean step is sum_i alpha_i Delta_i.

    The step is sum_i (I_i / p_i) a_i + constant, a_i = alpha_i (Delta_i - beta h_i), so its variance is sum_i a_i^2 (1 - p_i) / p_i, and
    the tolerance four standard errors (in each of two coordinates).
    """
    toy, draws = toy_of(), 4000
    start = rounds(FedStale(JUMP, rates="known"), toy, 2, Listed(SCRIPT))[-1]
    strategy = FedStale(JUMP, beta=beta, rates="known", weights="uniform")
    changes = np.array([[0.5, -1.0], [2.0, 0.3], [-0.7, 0.9]])
    h = start.h.get(torch.arange(3))["weight"][:, 0].numpy()
    a, p = (changes - beta * h) / 3, np.array(P)
    start = replace(start, mean=start.mean.map(lambda _: torch.from_numpy(h.mean(0))[None]))
    random, total = np.random.default_rng(0), np.zeros(2)
    for _ in range(draws):
        came = np.flatnonzero(random.random(3) < p)
        if len(came):
            ids = torch.from_numpy(came)
            who = Arrivals(ids, torch.full((len(ids),), 2.0), torch.zeros_like(ids), torch.zeros_like(ids))
            updates = Updates(who, start.w.map(lambda _, came=came: torch.from_numpy(changes[came])[:, None]))
            total += vector(strategy.server(toy.problem, start, updates, 0).w) - vector(start.w)
        else:
            total += beta * h.mean(0)  # the engine skips this round; the estimate's expectation counts it
    error = np.sqrt((a**2 * ((1 - p) / p)[:, None]).sum(0) / draws)
    assert (np.abs(total / draws - changes.mean(0)) < 4 * error + 1e-9).all()


def test_the_running_mean_is_the_mean_of_the_table_after_many_rounds():
    """In float32 too: what rounding leaves after 300 rounds is below 1e-5."""
    random = np.random.default_rng(0)
    rates = (0.1, 0.3, 0.5, 0.7, 1.0)
    toy = problem_of([random.normal(size=(4 + i, 3)) for i in range(5)], [random.normal(size=4 + i) for i in range(5)], dtype=torch.float32)
    state = rounds(FedStale(Sgd(lr=0.1, batch_size=2)), toy, 300, Bernoulli(ListedRates(rates)))[-1]
    alpha = toy.problem.sizes / toy.problem.sizes.sum()
    exact = alpha.double() @ state.h.get(torch.arange(5))["weight"][:, 0].double()
    close(state.mean["weight"][0], exact, within=1e-5)
    assert state.w["weight"].dtype == torch.float32


def test_known_rates_are_only_needed_where_they_are_used():
    assert FedStale(rates="known").needs == FedVarp(rates="known").needs == {"rates"}
    assert FedStale().needs == FedVarp().needs == set()
