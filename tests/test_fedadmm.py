"""ADMM: two rounds by hand, the pooled solution, and what noise on the links does, against theory."""

from itertools import product

import numpy as np
import pytest
from scipy.linalg import solve_discrete_lyapunov

from fedsim.errors import ScenarioError
from fedsim.fleet import Channel, Fleet, Link
from strategies.fedadmm import AdmmSgd, AdmmSolve, FedAdmm
from tests.bench.admm import expected_error, recursion
from tests.toy import Listed, close, path, problem_of, rounds, rounds_of, vector

FORMS = tuple(product(("dual", "eliminated", "last"), ("sum", "model")))


def federation(clients=5, dim=3):
    """Five clients of four to eight examples that do not agree. `xs, ys`."""
    random = np.random.default_rng(7)
    xs = [random.normal(size=(4 + i, dim)) for i in range(clients)]
    return xs, [x @ random.normal(size=dim) + random.normal(size=len(x)) for x in xs]


def quadratics():
    """f_k = v.H_k v / 2 - b_k.v, H_k `[5, 3, 3]`, b_k `[5, 3]`, and the pooled solution."""
    xs, ys = federation()
    h = np.array([x.T @ x / len(x) for x in xs])
    b = np.array([x.T @ y / len(x) for x, y in zip(xs, ys, strict=True)])
    return h, b, np.linalg.solve(h.mean(0), b.mean(0))


X = [[[1, 2]], [[0, 1], [2, 1], [1, -1]]]
Y = [[1], [0, 3, 1]]
SCRIPT = ((0, 1), (1,), (0, 1))
HAND = np.array([[1.34995977, -0.22928399], [1.36725664, -0.0917136], [1.32776274, -0.03232648]])
HAND_SGD = np.array([[1.23194444, -0.58833333], [1.27544672, -0.50328742], [1.36100377, -0.32831966]])
HAND_ON = np.array([[1.37590507, -0.0229284], [1.38022928, 0.0114642], [1.71190745, 0.81319542]])


@pytest.mark.parametrize("mode", ["vmap", "loop"])
@pytest.mark.parametrize("form", ["dual", "eliminated"])
def test_three_rounds_the_second_with_one_client_by_hand(form, mode):
    """The numbers come from

    import numpy as np
    X = [np.array([[1., 2.]]), np.array([[0., 1.], [2., 1.], [1., -1.]])]
    Y = [np.array([1.]), np.array([0., 3., 1.])]
    w, rho = np.array([1., -1.]), 0.5
    v, z, u, met = np.zeros((2, 2)), np.zeros((2, 2)), np.zeros((2, 2)), [False, False]
    for S in ([0, 1], [1], [0, 1]):
        for k in S:
            z[k] = z[k] + rho * (v[k] - w) if met[k] else z[k]
            H, b = X[k].T @ X[k] / len(Y[k]), X[k].T @ Y[k] / len(Y[k])
            v[k] = np.linalg.solve(H + rho * np.eye(2), b - z[k] + rho * w)
            u[k], met[k] = v[k] + z[k] / rho, True
        w = u.mean(0)
        print(w.round(8))
    """
    strategy = FedAdmm(AdmmSolve(rho=0.5, form=form))
    close(path(strategy, problem_of(X, Y, w=[1, -1]), 3, participation=Listed(SCRIPT), mode=mode), HAND)


@pytest.mark.parametrize("mode", ["vmap", "loop"])
def test_inexact_rounds_by_hand(mode):
    """The script is the one above, with the solution of `v[k]` replaced by

    v[k] = w
    for _ in range(2):
        v[k] = v[k] - 0.1 * (X[k].T @ (X[k] @ v[k] - Y[k]) / len(Y[k]) + z[k] + rho * (v[k] - w))
    """
    strategy = FedAdmm(AdmmSgd(rho=0.5, lr=0.1, steps=2, batch_size=None))
    close(path(strategy, problem_of(X, Y, w=[1, -1]), 3, participation=Listed(SCRIPT), mode=mode), HAND_SGD)


@pytest.mark.parametrize("form", ["dual", "eliminated"])
def test_a_client_that_is_not_asked_goes_on_by_hand(form):
    """The script is the first one, but in rounds in which client 0 is not asked its lines run with the last `w` that it received, and its
    `u` stays as it was.
    """
    strategy = FedAdmm(AdmmSolve(rho=0.5, form=form, continues=5))
    script = ((0, 1), (1,), (1,), (1,), (0, 1))
    close(path(strategy, problem_of(X, Y, w=[1, -1]), 5, participation=Listed(script))[2:], HAND_ON)
    fewer = FedAdmm(AdmmSolve(rho=0.5, form=form, continues=1))
    assert abs(path(fewer, problem_of(X, Y, w=[1, -1]), 5, participation=Listed(script))[-1] - HAND_ON[-1]).max() > 1e-3


@pytest.mark.parametrize(("form", "share"), FORMS)
def test_all_reach_the_pooled_solution_but_the_last_model_alone(form, share):
    """Where clients send v_k, every consensus is a fixed point of the forms without a dual variable, and the first step decides which."""
    _, _, best = quadratics()
    reached = path(FedAdmm(AdmmSolve(rho=1.0, form=form, share=share)), problem_of(*federation()), 150)[-1]
    away = np.linalg.norm(reached - best)
    assert (away > 0.5) if (form, share) == ("last", "model") else (away < 1e-10)


def test_weighted_by_examples_it_reaches_the_solution_of_all_data_together():
    xs, ys = federation()
    best = np.linalg.lstsq(np.concatenate(xs), np.concatenate(ys), rcond=None)[0]
    close(path(FedAdmm(AdmmSolve(), weights="samples"), problem_of(xs, ys), 200)[-1], best, within=1e-10)


@pytest.mark.parametrize("program", [AdmmSolve(), AdmmSolve(form="eliminated"), AdmmSgd(rho=1.0, lr=0.1, steps=3, batch_size=None)])
def test_it_gets_there_with_few_clients_a_round_too(program):
    _, _, best = quadratics()
    script = tuple((i % 5, (i * i + 1) % 5) if i % 5 != (i * i + 1) % 5 else (i % 5,) for i in range(600))
    close(path(FedAdmm(program), problem_of(*federation()), 600, participation=Listed(script))[-1], best, within=1e-8)


def test_the_forms_with_and_without_a_dual_variable_are_one_algorithm_under_noise_and_absence():
    fleet = Fleet(Listed(((0, 1, 2, 3, 4), (1, 3), (0,), (2, 3, 4), (1,))), channel=Channel(Link(noise=0.1), Link(noise=0.2)))
    for share in ("sum", "model"):
        plain, eliminated = (
            [vector(r.state.w) for r in rounds_of(FedAdmm(AdmmSolve(form=form, share=share)), problem_of(*federation()), 12, fleet)]
            for form in ("dual", "eliminated")
        )
        close(plain, eliminated, within=1e-12)


DOWN, UP = 0.05, 0.03


def expected(form, share, count):
    """E ||w - E w||^2 after each of `count` rounds."""
    return expected_error(quadratics()[0], form, share, 1.0, DOWN, UP, count)


def simulated_error(form, share, count, copies=6):
    """The mean of ||w - w*||^2 over independent copies of the federation, which are one federation with block-diagonal data. `[count]`.

    A client then has `copies` times the examples, so its H is divided by that, and rho likewise.
    """
    xs, ys = federation()
    toy = problem_of([np.kron(np.eye(copies), x) for x in xs], [np.tile(y, copies) for y in ys])
    fleet = Fleet(channel=Channel(Link(noise=DOWN), Link(noise=UP)))
    found = rounds_of(FedAdmm(AdmmSolve(rho=1 / copies, form=form, share=share)), toy, count, fleet)
    w = np.stack([vector(each.state.w) for each in found]).reshape(count, copies, 3)
    return ((w - quadratics()[2]) ** 2).sum(2).mean(1)


def test_the_steady_error_solves_lyapunovs_equation():
    (a, g), spread = recursion(quadratics()[0], "dual", "sum", 1.0), np.repeat([DOWN**2, UP**2], 15)
    assert abs(np.linalg.eigvals(a)).max() < 1
    steady = np.trace(solve_discrete_lyapunov(a, g * spread @ g.T)[-3:, -3:])
    assert steady == pytest.approx(expected("dual", "sum", 200)[-1], rel=1e-6)
    assert steady == pytest.approx(expected("eliminated", "sum", 200)[-1], rel=1e-6)


@pytest.mark.parametrize("form", ["dual", "last"])
def test_the_error_under_noise_is_what_theory_says(form):
    """About 75 independent errors in 3 dimensions of 6 copies: the mean is good to 4 %."""
    theory, found = expected(form, "sum", 300), simulated_error(form, "sum", 300)
    assert found[50:].mean() == pytest.approx(theory[50:].mean(), rel=0.15)


def test_where_clients_send_models_alone_noise_adds_up_without_end():
    """Nothing pulls back along the consensus: a random walk, whose error grows with every round. In 18 directions it is good to a third."""
    theory = expected("dual", "model", 120)
    assert theory[-1] == pytest.approx(2 * theory[59], rel=0.05)
    found = simulated_error("dual", "model", 120)
    assert theory[60:].mean() / 2 < found[60:].mean() < 2 * theory[60:].mean()
    assert found[60:].mean() > 50 * expected("dual", "sum", 120)[-1]


def test_a_problem_too_large_for_an_exact_solution_is_refused():
    toy = problem_of([np.ones((1, 4097))], [[1.0]])
    with pytest.raises(ScenarioError, match="take admm-sgd"):
        rounds(FedAdmm(AdmmSolve()), toy, 1)
