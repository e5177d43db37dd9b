"""The statistics of a comparison against SciPy and statsmodels on known data, and what they say where there is nothing to say."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from fedsim.statistics import area, critical_difference, friedman, holm, mean_ranks, paired, reached, significant, summary

# Student's own data ("The Probable Error of a Mean", Biometrika 1908): additional hours of sleep under two drugs, ten patients.
DEXTRO = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
LAEVO = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_students_sleep() -> None:
    found = paired(LAEVO, DEXTRO)
    assert found.n == 10
    assert found.difference == pytest.approx(1.58)
    assert found.p == pytest.approx(0.002833, abs=1e-6)  # R: t.test(extra ~ group, paired = TRUE)
    assert found.interval == pytest.approx((0.7001142, 2.4598858), abs=1e-6)


def test_paired_agrees_with_scipy_and_statsmodels() -> None:
    random = np.random.default_rng(3)
    for n in (2, 3, 5, 20):
        a, b = random.normal(0.1, 1, n), random.normal(0, 1, n)
        found = paired(list(a), list(b))
        assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue)
        assert found.interval == pytest.approx(DescrStatsW(a - b).tconfint_mean())
        if n < 3:
            assert found.bootstrap is None
            continue
        expected = stats.bootstrap((a - b,), np.mean, n_resamples=4999, rng=np.random.default_rng(0)).confidence_interval
        assert found.bootstrap == pytest.approx((expected.low, expected.high))
        assert paired(list(a), list(b)) == found, "seeded"


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    hits = sum(low <= 0.3 <= high for low, high in (summary(list(random.normal(0.3, 1, 5))).interval for _ in range(2000)))
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)  # three standard errors


def test_summary() -> None:
    found = summary([1.0, 2.0, 4.0])
    assert (found.n, found.mean) == (3, pytest.approx(7 / 3))
    assert found.std == pytest.approx(np.std([1, 2, 4], ddof=1))
    assert found.interval == pytest.approx(DescrStatsW(np.array([1.0, 2, 4])).tconfint_mean())
    assert summary([5.0]) == summary((5.0,))
    assert (summary([5.0]).std, summary([5.0]).interval) == (None, None)
    with pytest.raises(ValueError, match="no values"):
        summary([])


def test_what_cannot_be_tested_is_not_significant() -> None:
    same = paired([0.9, 0.8, 0.7], [0.9, 0.8, 0.7])
    assert (same.difference, same.interval, same.bootstrap, same.p) == (0.0, (0.0, 0.0), (0.0, 0.0), None)
    assert paired([0.9], [0.1]).p is None
    assert paired([0.3, 0.5], [0.1, 0.3]).p is None, "no spread: the t-test would divide by rounding errors"
    assert not significant(None)
    assert not significant(math.nan)
    assert not significant(0.05)
    assert significant(0.049)
    with pytest.raises(ValueError, match="same seeds"):
        paired([], [])


def test_holm_agrees_with_statsmodels() -> None:
    random = np.random.default_rng(0)
    for m in (1, 2, 5, 30):
        p = list(random.uniform(0, 0.2, m))
        assert holm(p) == pytest.approx(list(multipletests(p, method="holm")[1]))
    assert holm([0.01, None, 0.04]) == [pytest.approx(0.02), None, pytest.approx(0.04)]
    assert holm([]) == []


def test_holm_keeps_false_alarms_below_five_percent() -> None:
    random = np.random.default_rng(2)
    alarms = 0
    for _ in range(400):
        base = random.normal(size=5)
        corrected = holm([paired(list(base + random.normal(size=5)), list(base)).p for _ in range(6)])
        alarms += any(significant(p) for p in corrected)
    assert alarms / 400 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_ranks() -> None:
    scores = np.array([[0.9, 0.8, 0.8], [0.7, 0.6, 0.9]])
    assert mean_ranks(scores, higher=True).tolist() == [1.5, 2.75, 1.75]
    assert mean_ranks(-scores, higher=False).tolist() == [1.5, 2.75, 1.75]


def test_friedman_agrees_with_scipy() -> None:
    scores = np.random.default_rng(0).normal(size=(8, 4))
    assert friedman(scores) == pytest.approx(stats.friedmanchisquare(*scores.T).pvalue)
    assert friedman(scores[:2]) is None
    assert friedman(np.ones((5, 4))) is None


def test_the_critical_difference_is_demsars() -> None:
    # Demsar (JMLR 2006), Table 5(a) and the example of section 3.2.2: four classifiers on fourteen data sets.
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)
    assert critical_difference(2, 6) * math.sqrt(6 * 6 / 6) == pytest.approx(1.960, abs=0.001)


def test_area_and_target() -> None:
    assert area([0, 1, 3], [0.0, 1.0, 1.0]) == pytest.approx(2.5 / 3)
    assert area([0], [1.0]) is None
    assert reached([0.1, 0.8, 0.7], 0.8, higher=True) == 1
    assert reached([0.1, 0.8, 0.7], 0.9, higher=True) is None
    assert reached([3.0, 1.0], 2.0, higher=False) == 1
