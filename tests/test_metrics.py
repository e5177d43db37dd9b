"""What is measured: against scikit-learn, by hand, and cut in every way."""

import math
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    log_loss,
    mean_absolute_error,
    mean_pinball_loss,
    mean_squared_error,
    r2_score,
)
from statsmodels.stats.proportion import proportion_confint

from fedsim import tree
from fedsim.errors import FedsimError
from fedsim.metrics import (
    Judged,
    across_clients,
    add,
    binomial_interval,
    coverage,
    mean,
    measure,
    of_client,
    per_example,
    summarise,
    under_law,
)
from fedsim.problem import Classification, MultiLabel, NextToken, Quantiles, Regression, Task

IGNORE = NextToken.IGNORE


def sample(task, n, seed=0):
    """Outputs and labels of n examples: [n, ...]."""
    g = torch.Generator().manual_seed(seed)
    match task:
        case Classification():
            return 2 * torch.randn(n, task.outputs, generator=g), torch.randint(task.outputs - 1, (n,), generator=g)  # one class absent
        case NextToken():
            y = torch.randint(task.outputs, (n, 5), generator=g)
            return torch.randn(n, 5, task.outputs, generator=g), y.where(torch.rand(n, 5, generator=g) > 0.3, IGNORE)
        case Regression():
            y = torch.randn(n, task.outputs, generator=g) * torch.arange(1, task.outputs + 1) + 3
            return y + 0.5 * torch.randn(n, task.outputs, generator=g), y
        case _:
            return torch.randn(n, task.outputs, generator=g), torch.randint(2, (n, task.outputs), generator=g)


def score(task, output, y):
    return summarise(task, measure(task, output, y, torch.ones(len(y))))


TASKS = [Classification(5), NextToken(7), Regression(3), MultiLabel(4)]


@pytest.fixture(params=TASKS, ids=lambda task: type(task).__name__)
def task(request):
    return request.param


# ---- pairs


def test_pairs_add_up():
    a = {"loss": (3.0, 2.0), "only_a": (1.0, 1.0)}
    b = {"loss": (1.0, 2.0), "empty": (0.0, 0.0)}
    assert add(a, b) == add(b, a) == {"loss": (4.0, 4.0), "only_a": (1.0, 1.0), "empty": (0.0, 0.0)}
    assert mean(add(a, b)) == {"loss": 1.0, "only_a": 1.0}  # nothing was weighed: no mean
    assert a == {"loss": (3.0, 2.0), "only_a": (1.0, 1.0)}


# ---- scores against scikit-learn


def test_classification():
    task = Classification(5)
    output, y = sample(task, 400)
    predicted = output.argmax(1)
    got = score(task, output, y)
    assert got["accuracy"] == pytest.approx(accuracy_score(y, predicted), abs=1e-12)
    present = predicted != 4  # scikit-learn warns of predicted classes that never occur
    assert got["macro_f1"] == pytest.approx(f1_score(y, predicted, average="macro"), abs=1e-12)
    assert got["loss"] == pytest.approx(log_loss(y, output.double().softmax(1), labels=range(5)), rel=1e-6)
    part = score(task, output[present], y[present])
    assert part["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y[present], predicted[present]), abs=1e-12)
    recalls = [(predicted[y == k] == k).double().mean().item() for k in range(4)]
    assert got["balanced_accuracy"] == pytest.approx(np.mean(recalls), abs=1e-12)


def test_calibration_by_hand():
    """Two classes, confidences .7, .7 (right, wrong), .9 (right), 1 (wrong): bins 11 (10/15, 11/15], 14 (13/15, 14/15] and 15.

    ECE = |1 - 1.4| / 4 + |1 - .9| / 4 + |0 - 1| / 4 = 0.375.
    """
    p = torch.tensor([0.7, 0.7, 0.9, 1.0], dtype=torch.float64)
    output = torch.stack([p, 1 - p], 1).log().clamp(min=-1e4)
    y = torch.tensor([0, 1, 0, 1])
    record = measure(Classification(2), output, y, torch.ones(4))
    assert record["bin_count"].nonzero().flatten().tolist() == [10, 13, 14]
    assert record["bin_correct"][10] == 1
    assert record["bin_confidence"][10].item() == pytest.approx(1.4)
    assert summarise(Classification(2), record)["ece"] == pytest.approx(0.375)


def test_calibration_of_a_calibrated_model():
    """Labels drawn from the model's own probabilities: ECE shrinks to its noise, under 15 bins * sqrt(1 / (4 n)) at worst."""
    n = 20_000
    output, _ = sample(Classification(4), n)
    y = torch.multinomial(output.softmax(1), 1, generator=torch.Generator().manual_seed(1)).flatten()
    assert score(Classification(4), output, y)["ece"] < 15 * math.sqrt(1 / (4 * n)) / 2
    assert score(Classification(4), 5 * output, y)["ece"] > 0.1  # overconfident


def test_next_token():
    task = NextToken(7)
    output, y = sample(task, 60)
    real = y != IGNORE
    got = score(task, output, y)
    assert got["accuracy"] == pytest.approx(accuracy_score(y[real], output[real].argmax(1)), abs=1e-12)
    assert got["loss"] == pytest.approx(log_loss(y[real], output[real].double().softmax(1), labels=range(7)), rel=1e-6)
    assert got["perplexity"] == pytest.approx(math.exp(got["loss"]))
    sure = torch.full((1, 1, 7), -2000.0)
    sure[0, 0, 0] = 0.0
    assert score(task, sure, torch.tensor([[1]]))["perplexity"] == math.inf


def test_regression():
    task = Regression(3)
    output, y = sample(task, 300)
    got = score(task, output, y)
    assert got["r2"] == pytest.approx(r2_score(y, output), abs=1e-6)
    assert got["mse"] == pytest.approx(mean_squared_error(y, output), rel=1e-6)
    assert got["mae"] == pytest.approx(mean_absolute_error(y, output), rel=1e-6)
    assert got["loss"] == pytest.approx(1.5 * got["mse"], rel=1e-6)  # half the squared error, summed over three targets


def test_targets_that_do_not_vary():
    y = torch.tensor([[1.0, 0.1], [2.0, 0.1], [3.0, 0.1]])
    assert score(Regression(2), y + 0.5, y)["r2"] == pytest.approx(1 - 0.75 / 2)  # of the first target only
    assert math.isnan(score(Regression(1), y[:, 1:], y[:, 1:])["r2"])


def test_multilabel():
    task = MultiLabel(4)
    output, y = sample(task, 200)
    output[:, 3], y[:, 3] = -1.0, 0  # a label that nobody has and nobody predicts has no F1
    predicted = (output > 0).int()
    got = score(task, output, y)
    assert got["accuracy"] == pytest.approx(accuracy_score(y, predicted), abs=1e-12)
    assert got["micro_f1"] == pytest.approx(f1_score(y, predicted, average="micro"), abs=1e-12)
    assert got["macro_f1"] == pytest.approx(f1_score(y[:, :3], predicted[:, :3], average="macro"), abs=1e-12)
    assert got["loss"] == pytest.approx(task.loss(output, y).mean().item(), rel=1e-6)


# ---- what every task keeps to


def test_padding_leaves_no_trace(task):
    output, y = sample(task, 20)
    mask = torch.arange(20) < 13
    whole = measure(task, output[:13], y[:13], torch.ones(13))
    output[13:] = math.nan
    padded = measure(task, output, y, mask.float())
    assert whole.keys() == padded.keys()
    for name in whole:
        torch.testing.assert_close(padded[name], whole[name], rtol=1e-12, atol=0)
        assert padded[name].dtype == torch.float64


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=5), which=st.sampled_from(TASKS))
def test_any_cut_gives_the_same_summary(cuts, which):
    output, y = sample(which, 40, seed=3)
    edges = [0, *sorted(cuts), 40]
    parts = [measure(which, output[a:b], y[a:b], torch.ones(b - a)) for a, b in pairwise(edges)]
    got, want = summarise(which, reduce(tree.add, parts)), score(which, output, y)
    assert got.keys() == want.keys()
    for name in want:
        assert got[name] == pytest.approx(want[name], rel=1e-6 if "loss" in name or name == "perplexity" else 1e-9, abs=1e-9)


def test_nothing_measured(task):
    output, y = sample(task, 0)
    assert all(math.isnan(value) for value in score(task, output, y).values())


def test_a_diverged_model_is_scored(task):
    output, y = sample(task, 10)
    assert math.isnan(score(task, output * math.nan, y)["loss"])


def test_each_example(task):
    output, y = sample(task, 50)
    each, whole = per_example(task, output, y), score(task, output, y)
    assert all(value.shape == (50,) and value.dtype == torch.float32 for value in each.values())
    assert ("correct" in each) == (not isinstance(task, Regression))
    tokens = (y != IGNORE).sum(1) if isinstance(task, NextToken) else torch.ones(50)
    for name, total in (("loss", "loss"), ("correct", "accuracy")):
        if name in each:
            assert ((each[name] * tokens).sum() / tokens.sum()).item() == pytest.approx(whole[total], rel=1e-5)


@dataclass(frozen=True)
class Ranking(Task):
    """A task that nobody wrote scores for."""

    outputs: int = 1

    def loss(self, output, y):
        return output


@dataclass(frozen=True)
class Digits(Classification):
    """A special case has the scores of the general one."""


def test_tasks_are_open():
    x = torch.zeros(1, 1)
    for function, rest in ((measure, (x, x, x)), (summarise, ({},)), (per_example, (x, x))):
        with pytest.raises(FedsimError, match=f"no scores for the task Ranking.*{function.__name__}"):
            function(Ranking(), *rest)
    output, y = sample(Classification(5), 30)
    assert score(Digits(5), output, y) == score(Classification(5), output, y)


# ---- over clients


def test_fairness_by_hand():
    """Ten clients with 0.1, ..., 1.0 and one without data. sum x = 5.5, sum x^2 = 3.85: Jain = 30.25 / 38.5."""
    x = np.append(np.arange(10, 0, -1) / 10, np.nan)
    w = np.append(np.arange(10), 1000)
    got = across_clients(x, w)
    assert got == pytest.approx({
        "mean": 0.55,
        "weighted_mean": (x[:10] @ w[:10]) / 45,
        "std": math.sqrt(0.0825),
        "worst_10": 0.1,
        "best_10": 1.0,
        "min": 0.1,
        "max": 1.0,
        "jain": 30.25 / 38.5,
    })  # fmt: skip


@pytest.mark.parametrize(("n", "tenth"), [(1, 1), (9, 1), (10, 1), (11, 2), (30, 3), (31, 4)])
def test_a_tenth_is_rounded_up(n, tenth):
    got = across_clients(np.arange(n, dtype=float), np.ones(n))
    assert got["worst_10"] == pytest.approx((tenth - 1) / 2)
    assert got["best_10"] == pytest.approx(n - 1 - (tenth - 1) / 2)


def test_fairness_at_the_edges():
    assert all(math.isnan(v) for v in across_clients(np.array([np.nan]), np.ones(1)).values())
    assert across_clients(np.array([0.0, 0, 0, 1]), np.ones(4))["jain"] == pytest.approx(1 / 4)
    assert across_clients(np.zeros(3), np.ones(3))["jain"] == 1
    assert math.isnan(across_clients(np.array([-1.0, 1]), np.ones(2))["jain"])
    assert math.isnan(across_clients(np.ones(2), np.zeros(2))["weighted_mean"])


# ---- two quantiles of a real target


def test_quantiles_by_hand():
    """Levels 0.1 and 0.9. Example 1: y = 2 in [1, 3]: 0.1 * 1 + 0.1 * 1. Example 2: y = 5 above [0, 4]: 0.1 * 5 + 0.9 * 1."""
    task = Quantiles(0.1, 0.9)
    output, y = torch.tensor([[1.0, 3.0], [0.0, 4.0], [9.0, 9.0]]), torch.tensor([[2.0], [5.0], [0.0]])
    record = measure(task, output, y, torch.tensor([1.0, 1.0, 0.0]))
    got = summarise(task, record)
    assert got == pytest.approx({"loss": (0.2 + 1.4) / 2, "inside": 0.5, "width": 3.0})
    assert per_example(task, output, y)["loss"][:2].tolist() == pytest.approx([0.2, 1.4])
    loss = [mean_pinball_loss([[2.0], [5.0]], output[:2, i : i + 1], alpha=level) for i, level in enumerate((0.1, 0.9))]
    assert got["loss"] == pytest.approx(sum(loss))


# ---- prediction sets


def judged(**more) -> Judged:
    """Six examples of clients 0, 0, 0, 2, 2, 2 (client 1 has none) and classes 0, 1, 1, 0, 0, 2 of four."""
    fields = {
        "covered": np.array([True, True, False, True, True, False]),
        "size": np.array([1.0, 2, 0, 1, 1, 3]),
        "owner": np.array([0, 0, 0, 2, 2, 2]),
        "label": np.array([0, 1, 1, 0, 0, 2]),
        "clients": 3,
        "classes": 4,
        "counted": True,
    }
    return Judged(**(fields | more))


def test_coverage_by_hand():
    got = coverage(judged(), alpha=0.1)
    low, high = proportion_confint(4, 6, method="beta")
    assert got == pytest.approx(
        {
            "marginal": 4 / 6,
            "low": low,
            "high": high,
            "client_mean": 2 / 3,
            "worst_client": 2 / 3,
            "worst_10": 2 / 3,
            "client_gap": 0.9 - 2 / 3,
            "clients_below": 0.0,  # two of three are within the noise of nine tenths
            "class_gap": (0.1 + 0.4 + 0.9) / 3,
            "worst_class": 0.0,
            "set_size": 8 / 6,
            "set_size_client_mean": (1 + 5 / 3) / 2,
            "singletons": 0.5,
            "empty": 1 / 6,
        }
    )
    mine, size, count = judged().by_client()
    assert math.isnan(mine[1])
    assert count.tolist() == [3, 0, 3]
    assert size[2] == pytest.approx(5 / 3)
    many = judged(covered=np.zeros(6, dtype=bool), owner=np.zeros(6, dtype=np.int64), clients=1, counted=False, classes=1)
    assert coverage(many, 0.1)["clients_below"] == 1.0
    assert not {"singletons", "class_gap"} & coverage(many, 0.1).keys()


def test_coverage_under_another_label_law():
    got = under_law(judged(), np.array([0.5, 0.5, 0, 0]))
    assert got["target"] == pytest.approx(0.5 * 1 + 0.5 * 0.5)
    assert got["target_set_size"] == pytest.approx(0.5 * 1 + 0.5 * 1)
    half = 1.959964 * math.sqrt(0.25 * 0.25 / 2)
    assert (got["target_low"], got["target_high"]) == pytest.approx((0.75 - half, 1.0))
    assert math.isnan(under_law(judged(), np.array([0, 0, 0, 1.0]))["target"])  # nobody is of that class
    one = of_client(judged(), 2)
    assert one["target"] == pytest.approx(2 / 3)
    assert (one["target_low"], one["target_high"]) == pytest.approx(proportion_confint(2, 3, method="beta"))
    assert math.isnan(of_client(judged(), 1)["target"])


@pytest.mark.parametrize("count", [1, 7, 400])
def test_binomial_intervals_against_statsmodels(count):
    hits = np.arange(count + 1)
    low, high = binomial_interval(hits, np.full(count + 1, count))
    expected = np.array([proportion_confint(h, count, method="beta") for h in hits])
    np.testing.assert_allclose(np.stack([low, high], axis=1), expected, atol=1e-12)
    assert binomial_interval(0, 0) == (0.0, 1.0)


def test_binomial_intervals_hold_what_they_say():
    """At least 95 % of intervals hold the probability, for any probability: summed exactly over all outcomes."""
    hits = np.arange(31)
    low, high = binomial_interval(hits, np.full(31, 30))
    for p in (0.02, 0.5, 0.9, 0.97):
        assert binom.pmf(hits, 30, p)[(low <= p) & (p <= high)].sum() >= 0.95
