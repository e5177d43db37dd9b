"""FedAU: the interval estimate against the algorithm as printed, one case by hand, what it reduces to; and the baseline that knows p."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import Listed, close, jumpers, path, problem_of, rounds, vector

from fedsim.errors import ScenarioError
from fedsim.intervals import Intervals, judge
from fedsim.local import Sgd
from fedsim.scenario import load
from fedsim.types import Arrivals
from fedsim.world import build
from strategies.fedau import FedAU, KnownP
from strategies.fedavg import FedAvg

JUMP = Sgd(lr=2.0, steps=1, batch_size=None)  # of two-dimensional jumpers
SCRIPT = ((0, 1), (), (0,), (0, 2), (), (1, 2))


def arrivals(*ids):
    who = torch.tensor(ids)
    return Arrivals(who, torch.ones(len(ids)), torch.zeros_like(who), torch.zeros_like(who))


@pytest.mark.parametrize("mode", ["vmap", "loop"])
def test_six_rounds_two_of_them_empty_by_hand(mode):
    """The numbers come from

    import numpy as np
    target = np.array([[1., 0.], [0., 1.], [2., 2.]])
    K, N, w = 2, 3, np.zeros(2)
    M, s, omega = [0] * N, [0] * N, [1.0] * N
    for S in ((0, 1), (), (0,), (0, 2), (), (1, 2)):
        w = w + 0.5 / N * sum((omega[i] * (target[i] - w) for i in S), np.zeros(2))
        for i in range(N):
            s[i] += 1
            if i in S or s[i] >= K:
                omega[i] = (M[i] * omega[i] + s[i]) / (M[i] + 1)
                M[i], s[i] = M[i] + 1, 0
        print(w.round(8), np.round(omega, 8))
    """
    models = path(FedAU(JUMP, server_lr=0.5, cutoff=2), jumpers([[1, 0], [0, 1], [2, 2]]), 6, participation=Listed(SCRIPT), mode=mode)
    expected = [
        [0.16666667, 0.16666667],
        [0.16666667, 0.16666667],
        [0.30555556, 0.13888889],
        [1.04398148, 0.72453704],
        [1.04398148, 0.72453704],
        [1.07265947, 1.22620885],
    ]
    close(models, expected)


@pytest.mark.parametrize("cutoff", [1, 2, 3, 7, None])
def test_the_estimate_is_the_printed_algorithm_to_the_bit(cutoff):
    """Stepped in exact fractions, for clients that come always, often, seldom and never, through rounds in which nobody comes."""
    p = np.array([1.0, 0.6, 0.3, 0.1, 0.03, 0.0])
    random = np.random.default_rng(0)
    count, current, omega = [0] * 6, [0] * 6, [Fraction(1)] * 6
    lazy = Intervals.none(6)
    empty = 0
    for t in range(200):
        came = random.random(6) < p * (random.random() < 0.8)
        empty += not came.any()
        assert lazy.omega(t, cutoff).tolist() == [float(np.float32(o.numerator / o.denominator)) for o in omega], t
        _, complete = lazy.complete(t, cutoff)
        assert complete.tolist() == count
        if came.any():  # the engine asks for nothing where nobody came
            lazy = lazy.after(t, cutoff, torch.from_numpy(np.flatnonzero(came)))
        for n in range(6):
            current[n] += 1
            if came[n] or (cutoff is not None and current[n] >= cutoff):
                omega[n] = (count[n] * omega[n] + current[n]) / (count[n] + 1)
                count[n], current[n] = count[n] + 1, 0
    assert empty > 20


def test_the_interval_that_ends_now_does_not_count_yet():
    """First take part in round 3: weight 1 there (nothing is complete), then the mean of 4, and of 4 and 2."""
    strategy, problem = FedAU(cutoff=None), problem_of([[[1.0]]], [[1.0]]).problem
    state = strategy.init(problem, problem_of([[[1.0]]], [[1.0]]).w)
    assert strategy.weigh(problem.at(3), state, arrivals(0)).tolist() == [1]
    state = replace(state, intervals=state.intervals.after(3, None, torch.tensor([0])))
    assert strategy.weigh(problem.at(5), state, arrivals(0)).tolist() == [4]
    state = replace(state, intervals=state.intervals.after(5, None, torch.tensor([0])))
    assert strategy.weigh(problem.at(6), state, arrivals(0)).tolist() == [3]


def test_a_cut_fires_for_those_who_never_came():
    state = Intervals.none(1)
    assert [float(state.omega(t, 5)) for t in (0, 4, 5, 9, 10)] == [1, 1, 5, 5, 5]


@pytest.mark.parametrize("cutoff", [5, 50, None])
@pytest.mark.parametrize("p", [0.5, 0.1, 0.02])
def test_omega_converges_to_its_closed_form(p, cutoff):
    """E min(G, K) = (1 - (1-p)^K) / p for a geometric G. A client's omega is a mean of m intervals, m about rounds * p / (1 - (1-p)^K) and
    at least half of that; the mean over N clients is then within four standard errors of std(min(G, K)) / sqrt(N m), and of the interval
    that is still open: at most E G / m.
    """
    clients, periods = 2000, 3000
    random = np.random.default_rng(1)
    state = Intervals.none(clients)
    for t in range(periods):
        came = np.flatnonzero(random.random(clients) < p)
        if len(came):
            state = state.after(t, cutoff, torch.from_numpy(came))
    k = np.arange(1, 5000)
    chance = p * (1 - p) ** (k - 1)
    cut = k if cutoff is None else np.minimum(k, cutoff)
    mean, std = chance @ cut, np.sqrt(chance @ cut**2 - (chance @ cut) ** 2)
    closed = 1 / p if cutoff is None else (1 - (1 - p) ** cutoff) / p
    assert mean == pytest.approx(closed, rel=1e-6)
    m = periods / closed / 2
    error = abs(float(state.omega(periods, cutoff).mean()) - closed)
    assert error < 4 * std / np.sqrt(clients * m) + mean / m


def test_under_full_participation_it_is_fedavg_over_n_to_the_bit():
    random = np.random.default_rng(0)
    toy = problem_of([random.normal(size=(4 + i, 3)) for i in range(5)], [random.normal(size=4 + i) for i in range(5)])
    local = Sgd(lr=0.1, epochs=2, batch_size=3)
    assert (path(FedAU(local), toy, 8) == path(FedAvg(local, weights="all"), toy, 8)).all()


def test_with_a_cutoff_of_one_every_client_counts_as_one():
    toy = jumpers([[1, 0], [0, 1], [2, 2]])
    one, all_ = (path(s, toy, 6, participation=Listed(SCRIPT)) for s in (FedAU(JUMP, cutoff=1), FedAvg(JUMP, weights="all")))
    assert (one == all_).all()


def with_rates(toy, *p):
    return toy._replace(problem=replace(toy.problem, rates=torch.tensor(p)))


def test_known_p_by_hand():
    """w = 0, targets (1, 0) and (2, 2), p = 1/2 and 1/4 of N = 3: (2 (1, 0) + 4 (2, 2)) / 3. All have two examples, so by
    examples it is the same.
    """
    toy = with_rates(jumpers([[1, 0], [0, 1], [2, 2]]), 0.5, 1.0, 0.25)
    for weights in ("uniform", "samples"):
        (state,) = rounds(KnownP(JUMP, weights=weights), toy, 1, Listed(((0, 2),)))
        close(vector(state.w), [10 / 3, 8 / 3])


def test_how_good_the_estimate_is_is_said_where_the_truth_is_known():
    """Two rounds are over; client 0 came in both (omega 1), client 1 in the second (omega 2), client 2 never and never will."""
    state = Intervals.none(3).after(0, None, torch.tensor([0])).after(1, None, torch.tensor([0, 1]))
    problem = problem_of([[[1.0]]], [[1.0]]).problem.at(2)
    assert judge(state, None, problem, arrivals(1)) == {}
    said = judge(state, None, replace(problem, rates=torch.tensor([0.8, 0.4, 0.0])), arrivals(1))
    assert said["truth"].tolist() == [2.5]
    assert said["omega_bias"] == pytest.approx(((1 - 1.25) + (2 - 2.5)) / 2)
    assert said["omega_error"] == pytest.approx(0.2)


def test_the_report_says_how_much_each_counted():
    toy = with_rates(jumpers([[1, 0], [0, 1], [2, 2]]), 0.5, 0.5, 0.5)
    strategy = FedAU(JUMP, cutoff=2)
    *_, before, after = rounds(strategy, toy, 6, Listed(SCRIPT))
    said = strategy.report(toy.problem.at(5), before, after, arrivals(1, 2))
    assert said["weight"].tolist() == pytest.approx([5 / 3, 2])
    assert said["truth"].tolist() == [2, 2]


QUICKSTART = Path(__file__).parents[1] / "scenarios/quickstart.yaml"


def built(*fields):
    return build(load(QUICKSTART, ("strategy={name: known-p}", *fields))[0]).problem.rates


def test_the_simulator_knows_the_rates():
    """A full period of the staircase is (1 + 0.4) / 2 of the rate. Cohorts of a fixed size are cut to the pace's."""
    assert built("fleet.participation=full").tolist() == [1] * 20
    assert built("fleet.participation=full", "pace={name: sync, cohort: 5}").tolist() == [0.25] * 20
    assert built("fleet.participation={name: uniform, clients: 10}", "pace={name: sync, cohort: 5}").tolist() == [0.25] * 20
    assert built("fleet.participation={name: uniform, clients: 4}", "pace={name: sync, cohort: 5}").tolist() == pytest.approx([0.2] * 20)
    rates = "rates: {name: constant, mean: 0.5}"
    assert built(f"fleet.participation={{name: bernoulli, {rates}, modulation: staircase}}").tolist() == pytest.approx([0.35] * 20)


@pytest.mark.parametrize("strategy", ["known-p", "{name: fedstale, rates: known}", "{name: fedvarp, rates: known}"])
def test_unknown_rates_are_refused_where_they_are_needed(strategy, tmp_path):
    (tmp_path / "trace.csv").write_text("client,from,to\n0,0,9\n")
    unknown = (
        (f"fleet.participation={{name: trace, file: {tmp_path / 'trace.csv'}}}",),
        ("pace={name: sync, cohort: 5}",),  # of a changing number of clients
    )
    for fields in unknown:
        scenario, _ = load(QUICKSTART, (f"strategy={strategy}", *fields))
        with pytest.raises(ScenarioError, match="true participation probability") as caught:
            build(scenario)
        assert caught.value.field == "strategy"
        assert build(load(QUICKSTART, ("strategy=fedau", *fields))[0]).problem.rates is None
