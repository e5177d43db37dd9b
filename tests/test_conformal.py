"""Scores, weighted quantiles and the pinball envelope against brute force; DP-FedCP against the exact quantile, by hand; its privacy."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import norm
from torch import nn

from fedsim.conformal import (
    Aps,
    Cqr,
    Lac,
    OfClient,
    OfLaw,
    Own,
    Pooled,
    Raps,
    Residual,
    envelope,
    importance,
    least_examples,
    slope,
    split_quantile,
    weighted_quantile,
)
from fedsim.data import Lists
from fedsim.local import Constant, Exponential
from fedsim.params import Params
from fedsim.privacy import gaussian_epsilon, gaussian_noise
from fedsim.problem import Classification, Network, Problem
from fedsim.registry import lookup
from fedsim.scenario import load_plugins
from fedsim.strategy import LocalProgram, Strategy
from fedsim.types import Batch
from tests.toy import Listed, Toy, close, rounds

load_plugins()
RNG = np.random.default_rng(0)


def strategy(name: str, **fields) -> Strategy:
    return lookup(Strategy, name)(**fields)


def program(name: str, **fields) -> LocalProgram:
    return lookup(LocalProgram, name)(**fields)


# ---- scores


def brute_aps(logits: np.ndarray, u: float, penalty: float = 0.0, free: int = 0) -> list[float]:
    """Sum the probabilities of labels that come before y, label by label."""
    e = [math.exp(v) for v in logits]
    p = [v / sum(e) for v in e]
    order = sorted(range(len(p)), key=lambda j: (-p[j], j))
    out = [0.0] * len(p)
    for rank, j in enumerate(order, start=1):
        out[j] = sum(p[i] for i in order[: rank - 1]) + u * p[j] + penalty * max(0, rank - free)
    return out


LOGITS = np.concatenate([RNG.normal(size=(40, 5)) * 2, np.array([[0.0, 0, 0, 0, 0], [1, 1, 0, 0, 2]])])
U = RNG.random(len(LOGITS))
Y = RNG.integers(5, size=len(LOGITS))


@pytest.mark.parametrize(
    ("score", "brute"),
    [
        (Lac(), lambda z, u: [1 - math.exp(v) / sum(map(math.exp, z)) for v in z]),
        (Aps(), lambda z, u: brute_aps(z, u)),
        (Aps(randomised=False), lambda z, u: brute_aps(z, 1.0)),
        (Raps(penalty=0.1, free=1), lambda z, u: brute_aps(z, u, 0.1, 1)),
        (Raps(penalty=0.1, free=0, randomised=False), lambda z, u: brute_aps(z, 1.0, 0.1, 0)),
    ],
    ids=["lac", "aps", "aps not randomised", "raps", "raps not randomised"],
)
def test_scores_of_labels(score, brute):
    output, u, y = torch.tensor(LOGITS), torch.tensor(U), torch.tensor(Y)
    expected = np.array([brute(z, v) for z, v in zip(LOGITS.tolist(), U.tolist(), strict=True)])
    close(score.each(output, u), expected, 1e-12)
    close(score.of(output, y, u), expected[np.arange(len(Y)), Y], 1e-12)
    by_client = torch.vmap(score.of)(output.view(6, 7, 5), y.view(6, 7), u.view(6, 7))
    close(by_client.flatten(), score.of(output, y, u), 1e-12)
    q = torch.tensor(RNG.random((len(Y), 5)))
    covered, size = score.judge(output, y, u, q)
    held = expected <= q.numpy()
    assert covered.tolist() == held[np.arange(len(Y)), Y].tolist()
    assert size.tolist() == held.sum(1).tolist()


def test_scores_of_real_targets():
    output, y, u = torch.tensor([[1.0, 4.0], [0.0, 2.0]]), torch.tensor([[2.0], [5.0]]), torch.zeros(2)
    assert Cqr().of(output, y, u).tolist() == [-1.0, 3.0]  # 1 inside both ends; 3 above the upper
    covered, width = Cqr().judge(output, y, u, torch.tensor([[0.5], [-0.5]]))
    assert covered.tolist() == [True, False]
    assert width.tolist() == [4.0, 1.0]
    assert Cqr().judge(output, y, u, torch.full((2, 1), -9.0))[1].tolist() == [0.0, 0.0]
    two = torch.tensor([[1.0, 1.0], [5.0, 7.0]])
    assert Residual().of(output, two, u).tolist() == [3.0, 5.0]
    assert Residual().judge(output, two, u, torch.tensor([[3.0], [4.0]]))[0].tolist() == [True, False]


# ---- quantiles


@pytest.mark.parametrize("alpha", [Fraction(1, 10), Fraction(1, 20), Fraction(1, 3), Fraction(9, 10)])
def test_unit_weights_are_split_conformal_prediction(alpha):
    """The ceil((1 - alpha)(n + 1))-th smallest, in exact arithmetic, for every n up to 120; infinite where n is too small."""
    for n in range(1, 121):
        v = torch.tensor(RNG.random(n))
        k = math.ceil((1 - alpha) * (n + 1))
        expected = float(v.sort().values[k - 1]) if k <= n else math.inf
        assert weighted_quantile(v, torch.zeros(n).long(), torch.ones(1, 1), float(alpha)).item() == expected
        padded = torch.cat([v, torch.zeros(3)])
        local = split_quantile(padded, torch.tensor(n), torch.tensor(float(alpha), dtype=torch.float64)).item()
        assert local == (expected if k <= n else 0)
        assert (n >= least_examples(float(alpha))) == (k <= n)


def test_weighted_quantiles_against_a_search():
    for _ in range(50):
        m, k = int(RNG.integers(1, 60)), 3
        v, y, w, alpha = RNG.integers(0, 20, m) / 20, RNG.integers(k, size=m), RNG.random((2, k)), RNG.uniform(0.02, 0.5)
        got = weighted_quantile(torch.tensor(v), torch.tensor(y), torch.tensor(w), alpha)
        for r, label in itertools.product(range(2), range(k)):
            total = w[r, label] + w[r, y].sum()
            fits = [q for q in sorted(set(v)) if w[r, y][v <= q].sum() >= (1 - alpha) * total - 1e-12]
            assert got[r, label].item() == (fits[0] if fits else math.inf)


def test_importance_weights_make_the_calibration_law_the_target():
    counts, laws = torch.tensor([[10, 0, 30], [20, 0, 0]]), torch.tensor([[0.5, 0.2, 0.3], [0.0, 0.0, 1.0]], dtype=torch.float64)
    w, lacking = importance(laws, counts.sum(0))
    close(w, [[1.0, 0.0, 0.6], [0.0, 0.0, 2.0]])
    assert lacking.tolist() == [[False, True, False], [False, False, False]]
    assert importance(laws, torch.tensor([30.0, 1.9, -3.0]), least=2.0)[1].tolist() == [[False, True, True], [False, False, True]]
    close(Pooled().laws(counts), [[0.5, 0, 0.5]])
    close(Own().laws(torch.tensor([[3, 1], [0, 0]])), [[0.75, 0.25], [0, 0]])
    close(OfClient(0).laws(counts), [[0.25, 0, 0.75]])
    close(importance(Pooled().laws(counts), counts.sum(0))[0], [[1.0, 0, 1.0]])


# ---- the envelope of the pinball loss


@pytest.mark.parametrize(("alpha", "gamma"), [(0.1, 0.3), (0.5, 1.0), (0.35, 0.05)])
def test_the_envelope_is_the_moreau_envelope(alpha, gamma):
    def pinball(q: float, v: float) -> float:
        return (1 - alpha) * max(v - q, 0) + alpha * max(q - v, 0)

    v = 0.4
    q = np.linspace(-1, 2, 61)

    def smallest(x: float) -> float:
        inside = {"bounds": (-4, 5), "method": "bounded", "options": {"xatol": 1e-10}}
        return minimize_scalar(lambda u: pinball(u, v) + (x - u) ** 2 / (2 * gamma), **inside).fun

    d = torch.tensor(q - v)
    close(envelope(d, alpha, gamma), [smallest(x) for x in q], 1e-7)
    h = 1e-6
    close(slope(d, alpha, gamma), (envelope(d + h, alpha, gamma) - envelope(d - h, alpha, gamma)) / (2 * h), 1e-5)
    close(slope(d, torch.tensor(alpha, dtype=torch.float64), gamma), slope(d, alpha, gamma), 1e-15)
    values = slope(d, alpha, gamma)
    assert values.max() - values.min() <= 1 + 1e-15


def test_minimisers_of_the_envelope_are_near_the_quantile():
    """Every minimiser lies in [Q - gamma (1 - alpha), Q + gamma alpha]: the slope's sign changes within, for 300 weighted samples."""
    for _ in range(300):
        m, alpha, gamma = int(RNG.integers(2, 40)), RNG.uniform(0.05, 0.6), RNG.uniform(0.001, 0.5)
        v, p = RNG.random(m), RNG.random(m)
        order = np.argsort(v)
        mass = p[order].cumsum()
        low = v[order][np.searchsorted(mass, (1 - alpha) * mass[-1] - 1e-12)]  # the exact quantiles are [low, high]
        high = v[order][min(np.searchsorted(mass, (1 - alpha) * mass[-1] + 1e-12), m - 1)]

        def g(q: float, v=v, p=p, alpha=alpha, gamma=gamma) -> float:
            return float((torch.tensor(p) * slope(torch.tensor(q - v), alpha, gamma)).sum())

        assert g(low - gamma * (1 - alpha) - 1e-9) <= 1e-9
        assert g(high + gamma * alpha + 1e-9) >= -1e-9


# ---- DP-FedCP


def federation(scores: list, labels: list, classes: int) -> Toy:
    """Clients whose LAC scores are as given: inputs are logits that give each true label the probability 1 - score."""
    x, y = [], []
    for v, label in zip(scores, labels, strict=True):
        p = np.repeat(np.asarray(v, dtype=np.float64)[:, None] / (classes - 1), classes, axis=1)
        p[np.arange(len(v)), label] = 1 - np.asarray(v)
        x.append(np.log(p))
        y.append(np.asarray(label, dtype=np.int64))
    sizes = np.array([len(v) for v in x])
    lists = Lists.of_clients(np.split(np.arange(sizes.sum()), sizes.cumsum()[:-1]))
    n = torch.from_numpy(sizes.astype(np.float32))
    version = torch.zeros((), dtype=torch.float64)
    problem = Problem(Network(nn.Identity()), Classification(classes), n, calibration=n, frozen=Params({}), version=version)
    return Toy(problem, Params({}), torch.from_numpy(np.concatenate(x)), torch.from_numpy(np.concatenate(y)), lists)


def random_federation(clients: int = 5, examples: int = 30, classes: int = 3, seed: int = 1) -> tuple[Toy, np.ndarray, np.ndarray]:
    g = np.random.default_rng(seed)
    labels = [g.choice(classes, examples, p=g.dirichlet(np.ones(classes))) for _ in range(clients)]
    scores = [g.beta(1 + y, 3) for y in labels]
    return federation(scores, labels, classes), np.concatenate(scores), np.concatenate(labels)


LAW = OfLaw((0.6, 0.3, 0.1))
SETTLED = Exponential(decay=0.97)


def exact(toy: Toy, v: np.ndarray, y: np.ndarray, target, alpha: float = 0.1) -> np.ndarray:
    """The oracle, from first principles of `weighted_quantile`, which has its own test."""
    owner = toy.lists.owners()
    counts = torch.zeros(toy.problem.clients, 3).index_put((torch.tensor(owner), torch.tensor(y)), torch.ones(len(y)), accumulate=True)
    w, lacking = importance(target.laws(counts), counts.sum(0))
    return weighted_quantile(torch.tensor(v), torch.tensor(y), w, alpha).masked_fill(lacking, math.inf).numpy()


@pytest.mark.parametrize(
    ("target", "gamma"), [(LAW, 0.1), (LAW, 0.01), (LAW, 0.001), (Own(), 0.001), (Pooled(), 0.001), (OfClient(2), 0.001)], ids=repr
)
def test_without_noise_it_is_the_centralised_weighted_quantile(target, gamma):
    """One local step, everyone takes part, gamma -> 0: the thresholds lie in [Q, Q + gamma], up to steps that have shrunk to 1e-5."""
    toy, v, y = random_federation()
    chosen = strategy("conformal", target=target, local=program("pinball-sgd", lr=0.4, gamma=gamma, schedule=SETTLED))
    last = rounds(chosen, toy, 300, chunk=5)[-1]
    q, expected = chosen.thresholds(toy.problem, last).numpy(), exact(toy, v, y, target)
    finite = np.isfinite(expected)
    assert (np.isfinite(q) == finite).all()
    assert finite.mean() > 0.7
    error = (q - expected)[finite]
    assert error.min() > -1e-4
    assert error.max() < gamma + 1e-4
    oracle = strategy("conformal-exact", target=target)
    close(oracle.thresholds(toy.problem, rounds(oracle, toy, 1)[-1])[finite if len(expected) == len(finite) else ...], expected[finite])


def test_one_threshold_for_all_labels_is_that_of_the_largest_weight():
    toy, v, y = random_federation()
    chosen = strategy("conformal", target=LAW, per_label=False, local=program("pinball-sgd", lr=0.4, gamma=0.001, schedule=SETTLED))
    q = chosen.thresholds(toy.problem, rounds(chosen, toy, 300)[-1])
    assert q.shape == (1, 3)
    largest = exact(toy, v, y, LAW).max()
    assert torch.equal(q, q[:, :1].expand(1, 3))
    assert largest - 1e-4 < q[0, 0] < largest + 0.001 + 1e-4


def test_one_round_by_hand():
    """Two clients, two classes, alpha = 0.25, gamma = 0.5, lr = 1, start = 0.5, target (0.75, 0.25), K = 1.

    import numpy as np
    v = [np.array([.2, .6, .9]), np.array([.4])]; y = [np.array([0, 0, 1]), np.array([1])]
    w = np.array([.75, .25]) / (np.array([2, 2]) / 4)                      # [1.5, 0.5]
    counts = np.array([[2, 1], [0, 1]]); n = 2; a = .25
    m = counts @ w                                                        # [3.5, 0.5]: at least max w = 1.5 -> [3.5, 1.5]
    m = np.maximum(m, w.max())[:, None] + w / n                           # [2, L = 2]
    q = np.full(2, .5); new = q.copy()
    for i in range(2):
        s = np.clip((q[:, None] - v[i]) / .5, -.75, .25)                  # [L, n_i]
        g = ((w[y[i]] * s).sum(1) - (1 - a) * w / n) / m[i]
        new += m[i] / m.sum(0) * (-g)
    print(w, m, new)                                                      # q after one round: [.70384615, .60454545]
    """
    toy = federation([[0.2, 0.6, 0.9], [0.4]], [[0, 0, 1], [1]], 2)
    local = program("pinball-sgd", lr=1.0, gamma=0.5, schedule=Constant())
    chosen = strategy("conformal", alpha=0.25, target=OfLaw((0.75, 0.25)), local=local)
    counted, stepped, _ = rounds(chosen, toy, 3)
    close(counted.counts, [[2, 1], [0, 1]])
    v, y = [np.array([0.2, 0.6, 0.9]), np.array([0.4])], [np.array([0, 0, 1]), np.array([1])]
    w, n = np.array([1.5, 0.5]), 2
    m = np.maximum(np.array([[2, 1], [0, 1]]) @ w, w.max())[:, None] + w / n
    new = np.full(2, 0.5)
    for i in range(2):
        s = np.clip((0.5 - v[i]) / 0.5, -0.75, 0.25)
        new += m[i] / m.sum(0) * (0.75 * w / n - (w[y[i]] * s).sum()) / m[i]
    close(stepped.q, new[None], 1e-12)
    close(stepped.q, [[0.70384615, 0.60454545]], 1e-8)
    close(stepped.mean, stepped.q)  # the first iterate is all of the average
    assert chosen.thresholds(toy.problem, counted).isinf().all()  # nothing is known yet: full sets


def test_who_takes_part_rarely_and_who_never_counted():
    """Cohorts of two of four, the last client never: the quantile of the three that counted, and full sets for the fourth's own law."""
    toy, v, y = random_federation(clients=4)
    cohorts = ((0, 1, 2), *([(0, 1), (1, 2), (0, 2), (0, 1, 3)] * 75))
    chosen = strategy("conformal", target=Own(), local=program("pinball-sgd", lr=0.2, gamma=0.01, schedule=Exponential(decay=0.99)))
    last = rounds(chosen, toy, 300, participation=Listed(cohorts))[-1]
    q = chosen.thresholds(toy.problem, last).numpy()
    assert np.isinf(q[3]).all()
    kept = toy.lists.owners() < 3
    three = toy._replace(
        problem=replace(toy.problem, sizes=toy.problem.sizes[:3], calibration=toy.problem.sizes[:3]),
        lists=Lists(toy.lists.index[kept], toy.lists.offset[:4]),
    )
    expected = exact(three, v[kept], y[kept], Own())
    finite = np.isfinite(expected)
    assert np.abs((q[:3] - expected)[finite]).max() < 0.03  # a cohort's gradient is an estimate: no bound, but near
    assert last.known.tolist() == [True, True, True, False]


# ---- privacy


def gradient(local, toy: Toy, counts, q: float, w, alpha: float, noise: float = 0.0, z: float = 0.0) -> np.ndarray:
    """g_i at q, of the only client of `toy`, with these released counts."""
    order = lookup(Strategy, "conformal").sends
    kept = lookup(Strategy, "conformal")().memory(toy.problem, toy.w)
    scores, y = 1 - toy.x.softmax(1).gather(1, toy.y[:, None])[:, 0], toy.y
    kept = replace(kept, v=scores, y=y, there=torch.ones_like(scores), counts=torch.tensor(counts, dtype=torch.float64))
    w = torch.tensor([w], dtype=torch.float64)
    start = torch.full_like(w, q)
    message = order(start, w, *(torch.tensor(v, dtype=torch.float64) for v in (alpha, noise, 3.0)))
    carry = local.begin(toy.problem, message, kept)
    after = local.step(toy.problem, carry, Batch(toy.x[:1], toy.y[:1]), {"z": torch.full_like(w, z)}, "train")
    return ((start - after.q) / local.lr).numpy()


def test_sensitivity_of_gradients_and_counts_by_brute_force():
    """All neighbours of a client of three examples: any score (a grid and the extremes), any label. Released counts stay."""
    alpha, w, counts = 0.2, [2.0, 0.5], [1.3, 1.9]
    local = program("pinball-sgd", lr=1.0, gamma=0.05, schedule=Constant())
    values, labels = (1e-9, 0.3, 0.5, 0.52, 0.8, 1 - 1e-9), (0, 1)
    worst, jump = 0.0, 0.0
    for q in (0.0, 0.3, 0.51, 1.0):
        for v, y in itertools.product(itertools.product((0.3, 0.8), repeat=2), itertools.product(labels, repeat=2)):
            seen = []
            for score, label in itertools.product(values, labels):
                toy = federation([[*v, score]], [[*y, label]], 2)
                seen.append((gradient(local, toy, counts, q, w, alpha), np.bincount([*y, label], minlength=2)))
            for (a, m), (b, n) in itertools.combinations(seen, 2):
                worst, jump = max(worst, float(np.abs(a - b)[0, 0])), max(jump, float(np.linalg.norm(m - n)))
    m = max(w) * 1.3 + 0.5 * 1.9
    bound = max(w) / (m + w[0] / 3)  # max w / m_i of the first threshold, with its share of the point at infinity
    assert worst <= bound + 1e-9
    assert worst > 0.999 * bound  # and it is attained
    assert jump == pytest.approx(math.sqrt(2))


def test_noise_has_the_deviation_that_is_accounted():
    """Of a gradient: z_g sqrt(R L) max w / m_i, in one coordinate; of counts: sqrt(2) z_c."""
    toy = federation([[0.2, 0.7]], [[0, 1]], 2)
    local = program("pinball-sgd", lr=0.3, gamma=0.05, schedule=Constant())
    noisy = replace(local, noisy=(1, 2))
    w, m = [2.0, 0.5], 2.0 * 1 + 0.5 * 1
    plain = gradient(local, toy, [1.0, 1.0], 0.4, w, 0.1)
    shaken = gradient(noisy, toy, [1.0, 1.0], 0.4, w, 0.1, noise=7 * math.sqrt(2), z=1.0)
    close(shaken - plain, [[7 * math.sqrt(2) * 2 / (m + 2.0 / 3), 7 * math.sqrt(2) * 2 / (m + 0.5 / 3)]], 1e-12)
    toy, _, y = random_federation(clients=200, examples=4)
    chosen = strategy("conformal", target=LAW, epsilon=1.0, iterations=2)
    released = rounds(chosen, toy, 1)[-1].counts
    true = np.array([np.bincount(part, minlength=3) for part in np.split(y, 200)])
    noise = (released.numpy() - true) / (math.sqrt(2) * chosen.noise()[0])
    assert abs(noise.std() - 1) < 4 / math.sqrt(2 * 600)  # four standard errors of a deviation of 600 draws
    assert abs(noise.mean()) < 4 / math.sqrt(600)


def closed_form(mu: float, delta: float) -> float:
    """Epsilon of mu-Gaussian privacy (Balle and Wang, ICML 2018, Theorem 8)."""
    return brentq(lambda e: norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu) - delta, 0, 60)


def test_accounting_is_that_of_gaussians():
    assert gaussian_epsilon([(2.0, 1), (30.0, 100)], 1e-5) == pytest.approx(closed_form(math.sqrt(1 / 4 + 100 / 900), 1e-5), rel=1e-4)
    composed = PLDAccountant().compose(GaussianDpEvent(2.0)).compose(SelfComposedDpEvent(GaussianDpEvent(30.0), 100))
    assert gaussian_epsilon([(2.0, 1), (30.0, 100)], 1e-5) == pytest.approx(composed.get_epsilon(1e-5), rel=1e-3)
    assert gaussian_epsilon([(2.0, 0)], 1e-5) == 0
    z = gaussian_noise(2.0, 1e-5)
    assert closed_form(1 / z, 1e-5) == pytest.approx(2.0, rel=1e-4)
    assert gaussian_epsilon([(z, 1)], 1e-5) <= 2.0 + 1e-9


@pytest.mark.parametrize(("budget", "steps"), [(1.0, 1), (8.0, 3)])
def test_the_budget_is_spent_and_no_more(budget, steps):
    toy, _, _ = random_federation()
    local = program("pinball-sgd", steps=steps)
    chosen = strategy("conformal", target=LAW, epsilon=budget, iterations=5, local=local)
    states = rounds(chosen, toy, 9)
    arrivals = torch.arange(5)

    class Arrived:
        ids = arrivals

    spent = [chosen.report(toy.problem, a, b, Arrived)["privacy.epsilon"] for a, b in itertools.pairwise(states)]
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(budget, rel=1e-3)
    assert spent[-1] <= budget + 1e-6
    assert int(states[-1].t) == 5  # paid for; the rounds after that ask nobody
    assert torch.equal(states[-1].q, states[5].q)
    z_c, z_g = chosen.noise()
    assert z_c**-2 == pytest.approx(5 * steps * z_g**-2 / 9)  # a tenth of the budget is for the counts


def test_noise_is_fresh_in_each_round_and_for_each_client():
    toy, _, _ = random_federation(clients=2)
    chosen = strategy("conformal", target=LAW, epsilon=1.0, iterations=50, average=0.0)
    moves = np.diff(np.stack([s.q.numpy()[0] for s in rounds(chosen, toy, 40)][1:]), axis=0)
    assert len(np.unique(moves.round(12))) == moves.size


# ---- what is missing


def test_a_class_that_calibration_lacks_is_in_every_set():
    toy, _, _ = random_federation(classes=3)
    toy = toy._replace(y=toy.y.clamp(max=1))
    for name in ("conformal", "conformal-exact", "conformal-sketch"):
        chosen = strategy(name, target=LAW)
        q = chosen.thresholds(toy.problem, rounds(chosen, toy, 5)[-1])
        assert q.isinf().tolist() == [[False, False, True]], name


def test_too_few_examples_give_full_sets():
    """Eight examples cannot give nine tenths: ceil(0.9 * 9) = 9 > 8. Nine can."""
    for examples, full in ((8, True), (9, False)):
        toy, _, _ = random_federation(clients=1, examples=examples)
        for name in ("conformal", "conformal-exact", "conformal-sketch", "conformal-local", "conformal-qq"):
            more = {} if name in {"conformal-local", "conformal-qq"} else {"target": Pooled()}
            chosen = strategy(name, **more)
            q = chosen.thresholds(toy.problem, rounds(chosen, toy, 3)[-1])
            present = toy.y.unique()
            assert (bool(q[:, present].isinf().all()), bool(q[:, present].isinf().any())) == (full, full), (name, examples)


def test_fields_that_make_no_sense():
    with pytest.raises(ValueError, match=r"sum to 1, not to 0\.9"):
        OfLaw((0.5, 0.4))
    with pytest.raises(ValueError, match="negative"):
        OfLaw((1.5, -0.5))
    with pytest.raises(ValueError, match="iterations: 100"):
        strategy("conformal", epsilon=1.0)
    with pytest.raises(ValueError, match="set by the strategy"):
        strategy("conformal", local=program("pinball-sgd", noisy=(1, 1)))
    with pytest.raises(ValueError, match="10 to 10,000"):
        program("send-digests", compression=5)
