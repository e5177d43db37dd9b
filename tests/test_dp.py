"""Client-level privacy: by hand, what it reduces to, how far one client can move it, its noise, its account, and what it refuses."""

import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting import rdp
from scipy import stats
from toy import Listed, close, jumpers, path, problem_of, rounds, vector

from fedsim.errors import FedsimError
from fedsim.experiment import start, train
from fedsim.folder import Folder
from fedsim.local import Sgd
from fedsim.params import Params
from fedsim.privacy import Protection
from fedsim.problem import Problem
from fedsim.scenario import load
from fedsim.types import Arrivals, Total
from fedsim.world import build
from strategies.dp import Dp, Guarded, Short
from strategies.fedau import FedAU
from strategies.fedavg import FedAvg
from strategies.fedopt import FedAdam, FedAvgM
from strategies.robust import Median
from strategies.scaffold import Scaffold

QUIET = 1e-12  # noise that cannot be seen
JUMP = Sgd(lr=2.0, steps=1, batch_size=None)  # in two dimensions: exactly onto the client's target
UNIFORM = FedAvg(JUMP, weights="uniform")
TARGETS = [[3.0, 4.0], [0.3, -0.4], [-6.0, 8.0]]
LOCAL = Sgd(lr=0.1, epochs=2, batch_size=3)


@pytest.mark.parametrize("mode", ["vmap", "loop"])
@pytest.mark.parametrize(
    ("quantile", "expected", "clip"),
    [(None, [[0.1, 0.4], [0.16712797, 0.65287353]], 1.0), (0.5, [[0.1, 0.4], [0.1671436, 0.67048341]], 1.06893911)],
)
def test_two_rounds_by_hand(quantile, expected, clip, mode):
    """Every client goes to its target, so Delta_i = target_i - w. The numbers come from

    import numpy as np
    T = np.array([[3.0, 4.0], [0.3, -0.4], [-6.0, 8.0]])
    for quantile in (None, 0.5):
        w, C = np.zeros(2), 1.0
        for _ in range(2):
            d = T - w
            n = np.linalg.norm(d, axis=1)
            w = w + (d * np.minimum(1, C / n)[:, None]).mean(0)
            print(quantile, w.round(8), end=" ")
            if quantile: C = C * np.exp(-0.2 * ((n <= C).mean() - quantile))
        print(C)
    """
    strategy = Dp(UNIFORM, noise=QUIET, clip=1.0, quantile=quantile, count_noise=QUIET, cohort=3)
    states = rounds(strategy, jumpers(TARGETS), 2, mode=mode)
    close([vector(state.w) for state in states], expected, within=1e-7)
    assert float(states[-1].clip) == pytest.approx(clip, abs=1e-7)


@pytest.mark.parametrize("inner", [FedAvg(LOCAL, weights="uniform"), FedAvgM(LOCAL, weights="uniform"), FedAdam(LOCAL, weights="uniform")])
def test_without_clipping_and_noise_it_is_the_inner_strategy(inner):
    random = np.random.default_rng(5)
    xs = [random.normal(size=(3 + i, 3)) for i in range(5)]
    toy = problem_of(xs, [x @ random.normal(size=3) for x in xs])
    close(path(Dp(inner, noise=QUIET, clip=1e3, cohort=5), toy, 4), path(inner, toy, 4), within=1e-7)


def test_the_divisor_is_what_is_expected_and_not_who_came():
    strategy = Dp(UNIFORM, noise=QUIET, clip=100.0, cohort=3)
    close(path(strategy, jumpers(TARGETS), 1, participation=Listed(((0,),)))[0], [1.0, 4 / 3], within=1e-7)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_one_client_moves_the_sum_by_at_most_the_norm_whatever_it_sends(size):
    """Neighbours: with and without the last client."""
    toy = jumpers([*TARGETS, [size, -size]])
    strategy = Dp(UNIFORM, noise=QUIET, clip=0.7, cohort=4)
    with_, without = (path(strategy, toy, 1, participation=Listed((who,)))[0] for who in ((0, 1, 2, 3), (0, 1, 2)))
    assert np.linalg.norm(with_ - without) <= 0.7 / 4 + 1e-9


def test_all_tensors_are_clipped_together():
    from fedsim.privacy import clipped

    cut, _ = clipped(Params({"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}), 1.0)
    assert float(cut.norm()) == pytest.approx(1.0)
    assert cut["b"].item() == pytest.approx(0.8)


def noises(strategy: Dp, count: int = 500) -> tuple[np.ndarray, Problem]:
    """What `apply` adds to an empty sum, over many keys. `[count, 7]`."""
    toy = problem_of([np.zeros((2, 7))] * 4, [np.zeros(2)] * 4)
    state = strategy.init(toy.problem, toy.w)
    zero = Total(Short(toy.w.zeros(), torch.zeros((), dtype=torch.float64)), torch.tensor(4.0))
    arrivals = Arrivals(*(torch.zeros(4) for _ in range(4)))
    return np.stack([vector(strategy.apply(toy.problem, state, zero, arrivals, key).w) for key in range(count)]), toy.problem


@pytest.mark.parametrize("quantile", [None, 0.5])
def test_the_noise_on_the_sum_has_the_accounted_deviation(quantile):
    """z C on the sum, so z C / m on the mean; with a quantile a little more, for the count's share of the budget. 3,500 fixed numbers."""
    strategy = Dp(UNIFORM, noise=1.3, clip=0.5, quantile=quantile, cohort=40)
    z_sum = 1.3 if quantile is None else (1.3**-2 - (2 * 40 / 20) ** -2) ** -0.5
    sample = noises(strategy)[0].ravel() * 40 / (0.5 * z_sum)
    assert stats.kstest(sample, "norm").pvalue > 1e-3
    assert 1e-3 < stats.chi2.cdf((sample**2).sum(), len(sample)) < 1 - 1e-3


@pytest.mark.parametrize("m", [1, 20, 400])
def test_sum_and_count_together_cost_what_the_sum_alone_would(m):
    """The pair is one Gaussian mechanism: 1 / z^2 = 1 / z_sum^2 + (1/2)^2 / z_count^2, because b - 1/2 moves by a half."""
    toy = problem_of([np.zeros((1, 2))], [np.zeros(1)])
    _, z_sum, z_count = Dp(UNIFORM, noise=1.1, quantile=0.5, cohort=m).scales(toy.problem)
    assert z_sum**-2 + 0.25 * z_count**-2 == pytest.approx(1.1**-2)


def test_the_norm_follows_the_quantile():
    """Updates of lengths 1 to 9 that never change, because the model is put back: the norm settles at the quantile."""
    toy = jumpers([[float(i), 0.0] for i in range(1, 10)])
    strategy = Dp(
        FedAvg(JUMP, weights="uniform", server_lr=1e-9), noise=QUIET, clip=0.1, quantile=0.5, clip_lr=0.5, count_noise=QUIET, cohort=9
    )
    norms = [float(state.clip) for state in rounds(strategy, toy, 60)]
    assert norms[0] == pytest.approx(0.1 * math.exp(0.25), rel=1e-6)
    assert all(4.0 <= norm <= 6.0 for norm in norms[-10:])  # four, then five of nine are short


def test_no_loss_is_sent_and_the_weight_is_one():
    toy = jumpers(TARGETS)
    state = rounds(Dp(UNIFORM, noise=1.0, cohort=3), toy, 1)[-1]
    assert isinstance(state, Guarded)
    arrivals = Arrivals(torch.arange(3), torch.tensor([1.0, 50.0, 3.0]), torch.zeros(3), torch.zeros(3))
    assert Dp(UNIFORM, noise=1.0, cohort=3).weigh(toy.problem, state, arrivals).tolist() == [1.0, 1.0, 1.0]


def test_the_pretended_cohort_divides_the_noise_and_keeps_the_label():
    small = Dp(UNIFORM, noise=1.3, clip=0.5, cohort=40, noise_cohort=4000, population=10**6)
    sample = noises(small)[0].ravel() * 4000 / (0.5 * 1.3)
    assert 1e-3 < stats.chi2.cdf((sample**2).sum(), len(sample)) < 1 - 1e-3
    assert small.protects() == Protection("client", 1.3, (4000, 10**6))


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (FedAvg(JUMP), "fedavg does not promise that each client weighs 1"),
        (FedAU(JUMP), "fedau does not promise"),
        (Median(JUMP), "median looks at each update and not at their sum"),
        (Scaffold(), "scaffold does not promise"),
    ],
)
def test_what_is_not_bounded_is_refused_with_the_reason(inner, message):
    with pytest.raises(ValueError, match=message):
        Dp(inner, noise=1.0)


# ---- runs

SCENARIO = """\
name: clients
seed: 2
data: {source: digits, clients: 30, partition: iid}
model: logreg
fleet: {participation: {name: bernoulli, rates: {name: constant, mean: 0.4}}}
strategy: {name: dp, noise: 1.1, clip: 0.3, inner: {name: fedavg, weights: uniform, local: {name: sgd, lr: 0.1}}}
privacy: {delta: 1.0e-5}
rounds: 5
evaluate: {every: 5}
engine: {workers: 0}
"""


def rows_of(tmp_path: Path, *assignments: str) -> list[dict]:
    (tmp_path / "clients.yaml").write_text(SCENARIO)
    scenario, _ = load(tmp_path / "clients.yaml", assignments)
    folder = Folder.create(tmp_path / "run", scenario.name)
    world = build(scenario)
    start(scenario, world, folder)
    list(train(scenario, world, folder))
    return folder.rows()


def direct(event, uses: int, replaced: bool = False, delta: float = 1e-5) -> float:
    relation = dp_accounting.NeighboringRelation.REPLACE_ONE if replaced else dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    account = rdp.RdpAccountant(neighboring_relation=relation)
    return account.compose(dp_accounting.SelfComposedDpEvent(event, uses)).get_epsilon(delta)


GAUSS = dp_accounting.GaussianDpEvent
SAMPLINGS = {
    "bernoulli": ("{name: bernoulli, rates: {name: constant, mean: 0.4}}", dp_accounting.PoissonSampledDpEvent(0.4, GAUSS(1.1)), False),
    "full": ("full", GAUSS(1.1), False),
    "uniform": ("{name: uniform, clients: 12}", dp_accounting.SampledWithoutReplacementDpEvent(30, 12, GAUSS(0.55)), True),
}


@pytest.mark.parametrize(("fleet", "event", "replaced"), SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_the_account_is_of_the_sampling_that_runs(tmp_path, fleet, event, replaced):
    rows = rows_of(tmp_path, f"fleet.participation={fleet}")
    for row in rows[1:]:
        assert row["privacy.epsilon"] == pytest.approx(direct(event, row["round"], replaced), rel=1e-9)
        assert row["server.clip"] == pytest.approx(0.3)
    skipped = 5 * 0.4 * 0.6**29 if "bernoulli" in fleet else 0.0  # a client that was alone in a round
    assert rows[-1]["privacy.delta"] == pytest.approx(1e-5 + skipped)


def test_where_sampling_is_not_known_to_amplify_rounds_are_counted_client_by_client(tmp_path):
    fleet = "{name: bernoulli, rates: {name: uniform-range, low: 0.2, high: 0.9}}"
    rows = rows_of(tmp_path, f"fleet.participation={fleet}")
    took = np.zeros(30, dtype=int)
    for row, who in zip(rows[1:], Folder.open(tmp_path / "run").rows("clients"), strict=True):
        took[who["ids"]] += 1
        assert row["privacy.epsilon"] == pytest.approx(direct(GAUSS(1.1), int(took.max())), rel=1e-9)


def test_a_pretended_federation_never_counts_as_epsilon(tmp_path):
    rows = rows_of(tmp_path, "strategy.noise_cohort=100", "strategy.population=10000")
    assert "privacy.epsilon" not in rows[-1]
    event = dp_accounting.PoissonSampledDpEvent(0.01, GAUSS(1.1))
    assert rows[-1]["privacy.pretended.epsilon"] == pytest.approx(direct(event, 5), rel=1e-9)


def test_clients_and_examples_may_both_be_protected(tmp_path):
    rows = rows_of(tmp_path, "strategy.inner.local={name: dp-sgd, noise: 2.0, batch_size: 8, steps: 2}", "fleet.participation=full")
    assert rows[-1]["privacy.epsilon"] == pytest.approx(direct(GAUSS(1.1), 5), rel=1e-9)
    q = 8 / 47  # the smallest client has 47 examples
    assert rows[-1]["privacy.example.epsilon"] == pytest.approx(direct(dp_accounting.PoissonSampledDpEvent(q, GAUSS(2.0)), 10), rel=1e-9)


def test_noise_is_solved_for_and_the_same_on_workers(tmp_path):
    rows = rows_of(tmp_path, "strategy.noise=null", "privacy.target_epsilon=6")
    assert 5.9 < rows[-1]["privacy.epsilon"] <= 6
    assert rows[-1]["privacy.noise"] > 0


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (("strategy.inner.weights=samples",), "strategy: inner: fedavg does not promise that each client weighs 1"),
        (("strategy.inner={name: median}",), "strategy: inner: median looks at each update"),
        (("strategy.population=5",), "noise_cohort and population belong together"),
        (("strategy.clip=0",), "strategy.clip: "),
    ],
)
def test_refusals_name_the_file_and_the_reason(tmp_path, assignments, message):
    (tmp_path / "clients.yaml").write_text(SCENARIO)
    with pytest.raises(FedsimError) as caught:
        load(tmp_path / "clients.yaml", assignments)
    assert message in str(caught.value)


def test_the_state_says_its_model_and_is_a_value():
    toy = jumpers(TARGETS)
    strategy = Dp(UNIFORM, noise=1.0, cohort=3)
    first = list(islice(rounds(strategy, toy, 2), 2))
    assert (vector(first[0].w) != vector(first[1].w)).any()
    assert replace(strategy, noise=None).protects() == Protection("client", None)
