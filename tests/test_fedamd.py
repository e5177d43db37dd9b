"""FedAMD: rounds by hand, what miners become with full batches, and whom coins make an anchor."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import Listed, close, path, problem_of, rounds, rounds_of, vector

from fedsim.fleet import Fleet
from fedsim.rng import PLAN, fold
from strategies.fedamd import Anchor, FedAmd, Miner, best_chance

X = [[[1, 2]], [[0, 1], [2, 1], [1, -1]], [[1, 0], [1, 1]]]
Y = [[1], [0, 3, 1], [2, -1]]


@pytest.mark.parametrize("mode", ["vmap", "loop"])
def test_four_rounds_of_anchors_and_miners_in_turn_by_hand(mode):
    """The numbers come from

    import numpy as np
    X = [np.array([[1., 2.]]), np.array([[0., 1.], [2., 1.], [1., -1.]]), np.array([[1., 0.], [1., 1.]])]
    Y = [np.array([1.]), np.array([0., 3., 1.]), np.array([2., -1.])]
    grad = lambda i, y: X[i].T @ (X[i] @ y - Y[i]) / len(Y[i])
    x, v, lr, server_lr, K = np.array([1., -1.]), {}, 0.1, 0.5, 3
    for t, S in enumerate(([0, 1], [0, 1, 2], [2], [1, 2])):      # anchors in rounds 0 and 2
        vbar = np.mean(list(v.values()), 0) if v else np.zeros(2)
        if t % 2 == 0:
            v |= {i: grad(i, x) for i in S}
        else:
            moves = []
            for i in S:
                y = before = x
                g = vbar
                for _ in range(K):
                    g = g - grad(i, before) + grad(i, y)
                    before, y = y, y - lr * g
                moves.append(y - x)
            x = x + server_lr * np.mean(moves, 0)
        print(x.round(8))
    """
    strategy = FedAmd(Miner(lr=0.1, steps=3, batch_size=None), server_lr=0.5, period=2)
    script = Listed(((0, 1), (0, 1, 2), (2,), (1, 2)))
    states = rounds(strategy, problem_of(X, Y, w=[1, -1]), 4, script, mode)
    close([vector(state.w) for state in states], EXPECTED)
    assert [float(state.anchors) for state in states] == [2, 0, 1, 0]
    assert [int(state.v.written.sum()) for state in states] == [2, 2, 3, 3]


EXPECTED = [[1, -1], [1.16717978, -0.68206867], [1.16717978, -0.68206867], [1.27503191, -0.4743342]]


def gradients(w):
    return np.array([np.array(x).T @ (np.array(x) @ w - np.array(y)) / len(y) for x, y in zip(X, Y, strict=True)])  # [3, 2]


@pytest.mark.parametrize("coin", ["client", "round"])
def test_anchors_and_miners_of_one_round_against_a_replay(coin):
    """Who is an anchor is read from `plan`, under the engine's own keys; what follows is worked out here."""
    strategy = FedAmd(Miner(lr=0.1, steps=2, batch_size=None), p=0.4, coin=coin)
    toy = problem_of(X, Y, w=[1, -1])
    states, x, v, mixed = rounds(strategy, toy, 12, chunk=2), np.array([1.0, -1.0]), np.zeros((3, 2)), 0
    before = strategy.init(toy.problem, toy.w)
    for t, state in enumerate(states):
        jobs = strategy.plan(toy.problem.at(t), before, np.arange(3), fold(fold(0, 1000), PLAN, t, 1))
        anchors = {int(i) for job in jobs if isinstance(job.program, Anchor) for i in job.ids}
        miners, vbar = sorted({0, 1, 2} - anchors), v.mean(0)
        mixed += len(jobs) == 2
        moves = []
        for i in miners:
            first = x - 0.1 * vbar
            moves.append(first - 0.1 * (vbar + gradients(first)[i] - gradients(x)[i]) - x)
        v[sorted(anchors)] = gradients(x)[sorted(anchors)]
        x = x + np.mean(moves, 0) if miners else x
        close(vector(state.w), x, within=1e-12)
        close(vector(state.total), v.sum(0), within=1e-12)
        assert float(state.anchors) == len(anchors)
        before = state
    assert (mixed > 3) == (coin == "client")
    assert len({float(state.anchors) for state in states}) > 1


def test_miners_with_full_batches_are_gradient_descent():
    """g_{k+1} = vbar - grad f_i(x) + grad f_i(y_k): where clients are alike and v is fresh, grad f(y_k). All are anchors (p = 1) in one
    round and miners in the next.
    """
    toy = problem_of([X[1]] * 3, [Y[1]] * 3, w=[1, -1])
    strategy = FedAmd(Miner(lr=0.1, steps=4, batch_size=None), period=2)
    y, expected = np.array([1.0, -1.0]), []
    for t in range(6):
        for _ in range(4 * (t % 2)):
            y = y - 0.1 * (np.array(X[1]).T @ (np.array(X[1]) @ y - np.array(Y[1]))) / 3
        expected.append(y)
    close(path(strategy, toy, 6), expected, within=1e-12)


def test_one_step_of_miners_after_everyone_was_an_anchor_is_gradient_descent_on_the_mean_loss():
    w, expected = np.array([1.0, -1.0]), []
    for t in range(8):
        w = w - 0.1 * (t % 2) * gradients(w).mean(0)
        expected.append(w)
    strategy = FedAmd(Miner(lr=0.1, steps=1, batch_size=1), period=2)  # whatever the batch: the first step goes along vbar
    close(path(strategy, problem_of(X, Y, w=[1, -1]), 8), expected, within=1e-12)


def test_where_all_are_anchors_the_model_never_moves():
    states = rounds(FedAmd(p=1.0), problem_of(X, Y, w=[1, -1]), 4)
    close([vector(state.w) for state in states], [[1, -1]] * 4, within=0)
    close(vector(states[-1].vbar), gradients(np.array([1, -1])).mean(0), within=1e-12)


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_an_anchors_gradient_is_exact_in_any_batches(batch_size):
    states = rounds(FedAmd(anchor=Anchor(batch_size=batch_size)), problem_of(X, Y, w=[1, -1]), 1)
    close(states[0].v.get(np.arange(3))["weight"][:, 0], gradients(np.array([1, -1])), within=1e-12)


def test_the_optimal_chance():
    """`opta` by its own derivative: with u = p^A, d/dp [1/(1-u) + c/(p sqrt(1-u))] = 0 at the minimum; the others are formulas."""
    assert best_chance("optb", 20, 10) == pytest.approx(np.sqrt(20) - 4)
    assert best_chance("optc", 20, 10) == pytest.approx((2 / 12) ** 0.1)
    for clients, sampled in ((20, 10), (100, 10), (100, 100), (5, 1)):
        p, c = best_chance("opta", clients, sampled), 2 * clients / sampled

        def objective(p, a=sampled, c=c):
            return 1 / (1 - p**a) + c / (p * np.sqrt(1 - p**a))

        assert objective(p) <= min(objective(p - 1e-3), objective(p + 1e-3))
        assert (objective(p + 1e-6) - objective(p - 1e-6)) / 2e-6 == pytest.approx(0, abs=0.05 * c)


def test_anchors_come_as_often_as_p_says():
    """12 clients, 200 rounds after the first: the share of anchors has deviation sqrt(p (1 - p) / 2400) = 0.008."""
    toy = problem_of([[[1.0]]] * 12, [[1.0]] * 12)
    states = rounds(FedAmd(Miner(steps=1), p=0.2), toy, 201)
    assert np.mean([float(state.anchors) for state in states[1:]]) / 12 == pytest.approx(0.2, abs=0.03)
    optimal = rounds(FedAmd(Miner(steps=1), p="optb"), toy, 101)
    assert np.mean([float(state.anchors) for state in optimal[1:]]) / 12 == pytest.approx(np.sqrt(6) - 2, abs=0.04)


def test_what_travels_is_one_vector_up_and_for_miners_two_down():
    """Models of 2 float64: 16 bytes to an anchor, 32 to a miner, 16 and a flag of 8 back."""
    first, second = rounds_of(FedAmd(Miner(batch_size=None), period=2), problem_of(X, Y), 2, Fleet())
    assert (first.received.bytes_down, first.received.bytes_up) == (3 * 16, 3 * 24)
    assert (second.received.bytes_down, second.received.bytes_up) == (3 * 32, 3 * 24)


def test_the_report_counts_anchors_and_clients_heard_of():
    last = rounds_of(FedAmd(period=2), problem_of(X, Y), 2, Fleet(Listed(((0, 2), (1,)))))[-1]
    assert last.report == {"anchors": 0.0, "heard": 2.0}


def test_a_state_without_anchors_has_no_direction():
    toy = problem_of(X, Y, w=[1, -1])
    state = FedAmd().init(toy.problem, toy.w)
    assert torch.equal(state.vbar["weight"], torch.zeros(1, 2, dtype=torch.float64))
    assert len(FedAmd(p=0.5).plan(toy.problem, replace(state), np.arange(3), 7)) == 1
