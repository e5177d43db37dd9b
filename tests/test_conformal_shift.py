"""Label shift, 1,000 times: the promise is kept by weights, and broken without. `python -m tests.test_conformal_shift` prints the table.

Twenty clients, three classes of which the last is hard: LAC-like scores V | y ~ Beta(1 + 2 y, 4). Calibration: 1,000 examples, 60 % easy,
10 % hard; target: 60 % hard. alpha = 0.1. In each repetition the calibration set and one test example are drawn, so that the number of hits
is binomial; `mean` is the mean of the exact coverage given the thresholds, which has less noise.
"""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import beta, binom

from fedsim.conformal import importance, slope, weighted_quantile
from fedsim.privacy import gaussian_noise
from strategies.conformal import Conformal, infinite, masses

REPETITIONS, CLIENTS, EXAMPLES, ALPHA = 1000, 20, 1000, 0.1
CALIBRATION, TARGET = np.array([0.6, 0.3, 0.1]), np.array([0.1, 0.3, 0.6])
SCORES = [beta(1 + 2 * y, 4) for y in range(3)]


class Outcome(NamedTuple):
    mean: float  # of the exact coverage over repetitions
    hits: int  # among one test example a repetition
    spread: float  # deviation of the exact coverage over repetitions


def judge(q: np.ndarray) -> Outcome:
    """What thresholds `[repetitions, K]` are worth under the target law."""
    g = np.random.default_rng(1)
    exact = np.stack([SCORES[y].cdf(q[:, y]) for y in range(3)], axis=1) @ TARGET
    y = g.choice(3, REPETITIONS, p=TARGET)
    v = np.stack([s.rvs(REPETITIONS, random_state=g) for s in SCORES], axis=1)[np.arange(REPETITIONS), y]
    return Outcome(float(exact.mean()), int((v <= q[np.arange(REPETITIONS), y]).sum()), float(exact.std()))


def draw() -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels of all repetitions, `[repetitions, EXAMPLES]`."""
    g = np.random.default_rng(0)
    y = g.choice(3, (REPETITIONS, EXAMPLES), p=CALIBRATION)
    return np.select([y == k for k in range(3)], [s.rvs(y.shape, random_state=g) for s in SCORES]), y


def exactly(v: np.ndarray, y: np.ndarray, weighted: bool) -> np.ndarray:
    """The exact quantile of each repetition."""
    out = []
    for scores, labels in zip(torch.tensor(v), torch.tensor(y), strict=True):
        counts = torch.bincount(labels, minlength=3)[None]
        law = torch.tensor(TARGET)[None] if weighted else counts / counts.sum()
        out.append(weighted_quantile(scores, labels, importance(law, counts[0])[0], ALPHA)[0].numpy())
    return np.stack(out)


def privately(v: np.ndarray, y: np.ndarray, budget: float | None, rounds: int = 100) -> np.ndarray:
    """DP-FedCP's descent, all repetitions at once; one local step and full participation, so clients' gradients add up to one.

    The strategy's own functions; equality with the strategy run on a fleet is tests/test_conformal.py.
    """
    g = torch.Generator().manual_seed(2)
    chosen = Conformal(epsilon=budget, iterations=rounds, per_label=False)
    z_c, z_g = chosen.noise()
    scores, labels = torch.tensor(v), torch.tensor(y)
    counts = torch.nn.functional.one_hot(labels.view(REPETITIONS, CLIENTS, -1), 3).sum(2).double()
    counts = counts + math.sqrt(2) * z_c * torch.randn(counts.shape, generator=g, dtype=torch.float64)  # [R, CLIENTS, K]
    w = torch.stack([importance(torch.tensor(TARGET)[None], c.sum(0))[0][0] for c in counts])  # [R, K]
    m = torch.stack(
        [masses(c, one[None], infinite(one[None], False), torch.tensor(float(CLIENTS)))[:, 0, 0] for c, one in zip(counts, w, strict=True)]
    )
    weight, largest, total = w.gather(1, labels), w.amax(1), m.sum(1)
    deviation = z_g * largest * math.sqrt(CLIENTS) / total  # of sum_i lambda_i z_i, with s_i = z_g max w / m_i
    q = torch.full((REPETITIONS,), chosen.start, dtype=torch.float64)
    mean = q
    for t in range(rounds):
        pull = (weight * slope(q[:, None] - scores, ALPHA, chosen.local.gamma)).sum(1) - (1 - ALPHA) * largest
        noise = deviation * torch.randn(REPETITIONS, generator=g, dtype=torch.float64)
        q = q - chosen.local.lr * chosen.local.schedule.factor(torch.tensor(float(t + 1))) * (pull / total + noise)
        mean = mean + (chosen.average + 1) / (t + chosen.average + 1) * (q - mean)
    return np.repeat((mean + chosen.local.gamma * (1 - ALPHA)).numpy()[:, None], 3, axis=1)


@pytest.fixture(scope="module")
def calibration() -> tuple[np.ndarray, np.ndarray]:
    return draw()


LOW, HIGH = binom.interval(0.99, REPETITIONS, 1 - ALPHA)  # a sound method is outside once in a hundred seeds; this seed is not


def test_weighted_sets_keep_the_promise(calibration):
    """The exact mean lies in [1 - alpha, 1 - alpha + E of the candidate's own mass], up to four standard errors and estimated weights."""
    outcome = judge(exactly(*calibration, weighted=True))
    assert LOW <= outcome.hits <= HIGH
    slack = 4 * outcome.spread / math.sqrt(REPETITIONS)
    own_mass = float(TARGET @ (TARGET / CALIBRATION)) / EXAMPLES
    assert 1 - ALPHA - slack < outcome.mean < 1 - ALPHA + own_mass + slack


def test_unweighted_sets_break_it_by_seventeen_points(calibration):
    """The exact asymptotic coverage of the pooled quantile under the target law, found from the mixture's distribution function."""
    outcome = judge(exactly(*calibration, weighted=False))
    grid = np.linspace(0, 1, 20_001)
    q = grid[np.searchsorted(CALIBRATION @ np.stack([s.cdf(grid) for s in SCORES]), 1 - ALPHA)]
    expected = TARGET @ np.array([s.cdf(q) for s in SCORES])
    assert 1 - ALPHA - expected == pytest.approx(0.177, abs=0.002)
    assert outcome.mean == pytest.approx(expected, abs=4 * outcome.spread / math.sqrt(REPETITIONS) + 1 / EXAMPLES)
    assert outcome.hits < LOW


def test_descent_without_noise_keeps_it_too(calibration):
    """Above the exact quantile by gamma = 0.005 and one mass for all labels: 1.2 points, at a density of 2.3, and own_mass."""
    outcome = judge(privately(*calibration, None))
    assert LOW <= outcome.hits <= HIGH
    slack = 4 * outcome.spread / math.sqrt(REPETITIONS)
    assert 1 - ALPHA - slack < outcome.mean < 1 - ALPHA + 0.005 * 2.3 + max(TARGET / CALIBRATION) / EXAMPLES + slack


@pytest.mark.parametrize("budget", [8.0, 2.0])
def test_noise_makes_sets_larger_rather_than_wrong(calibration, budget):
    """A threshold that noise has thrown too high comes back with force alpha, one too low with 1 - alpha: the mean coverage rises."""
    outcome = judge(privately(*calibration, budget))
    quiet = judge(privately(*calibration, None))
    assert outcome.hits >= LOW
    assert outcome.mean > quiet.mean
    assert outcome.spread > quiet.spread  # what noise costs: a single calibration is less reliable


if __name__ == "__main__":
    data = draw()
    print(f"{LOW:.0f} to {HIGH:.0f} of {REPETITIONS} hits are within the noise of {1 - ALPHA:g} (99 %)")
    rows = {"weighted": exactly(*data, weighted=True), "unweighted": exactly(*data, weighted=False)}
    for budget in (None, 8.0, 4.0, 2.0, 1.0):
        label = "no noise" if budget is None else f"epsilon {budget:g} (noise {gaussian_noise(budget, 1e-5):.2f})"
        rows[f"DP-FedCP, {label}"] = privately(*data, budget)
    for name, q in rows.items():
        outcome = judge(q)
        print(f"{name:36s} mean coverage {outcome.mean:.4f}  hits {outcome.hits}  deviation over repetitions {outcome.spread:.4f}")
