"""Example-level privacy: gradients, sensitivity, sampling, noise, and the account of them."""

import math
from collections.abc import Callable
from copy import deepcopy
from itertools import islice
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting import pld, rdp
from scipy import stats
from torch import nn
from toy import problem_of, rounds, vector

from fedsim import rng
from fedsim.data import Lists, plan
from fedsim.entropy import KEYED, SYSTEM, Entropy
from fedsim.errors import FedsimError, ScenarioError
from fedsim.experiment import start, train
from fedsim.folder import Folder
from fedsim.local import Adam, Sgd
from fedsim.params import Params
from fedsim.privacy import Spent, clipped, clipped_sum, default_delta, epsilon, example_norms, noise_like, solve_noise, zcdp
from fedsim.private import NOISE, DpAdam, DpSgd, example_gradients
from fedsim.problem import Classification, Network, NextToken, Problem
from fedsim.scenario import load
from fedsim.sim.chunk import Chunk
from fedsim.sim.cohort import Trainer
from fedsim.types import Batch, Draw
from fedsim.world import build
from strategies.fedavg import FedAvg

DELTA = 1e-5


# ---- gradients of examples


def transformer() -> tuple[Problem, Params, Batch]:
    from fedsim.models import realise
    from fedsim.models.attention import CharTransformer

    task = NextToken(11)
    module, w, draws = realise(CharTransformer(dim=16, depth=1, heads=2), (6,), torch.int64, 11, 11, 3, task)
    tokens = torch.from_numpy(rng.generator(1).integers(0, 11, (5, 7)))
    return Problem(Network(module), task, torch.ones(1), draws), w, Batch(tokens[:, :-1], tokens[:, 1:])


def loop(problem: Problem, w: Params, batch: Batch) -> list[Params]:
    return [problem.grad(w, Batch(batch.x[i : i + 1], batch.y[i : i + 1]))[0] for i in range(len(batch.y))]


def test_example_gradients_and_their_clipped_sum_equal_a_loops():
    problem, w, batch = transformer()
    each = loop(problem, w, batch)
    g = example_gradients(problem, w, batch, {})
    for name, stack in g.items():
        torch.testing.assert_close(stack, torch.stack([one[name] for one in each]), rtol=1e-5, atol=1e-6)
    limit = float(torch.stack([one.norm() for one in each]).median())  # some are clipped, some are not
    expected = w.zeros()
    for one in each:
        expected = expected + one * min(1.0, limit / float(one.norm()))
    for name, total in clipped_sum(g, None, limit).items():
        torch.testing.assert_close(total, expected[name], rtol=1e-5, atol=1e-6)


def test_clipped_sums_equal_opacus_on_the_same_network():
    opacus = pytest.importorskip("opacus.grad_sample")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    problem = Problem(Network(module), Classification(4), torch.ones(1))
    w = Params({k: v.detach().clone() for k, v in module.named_parameters()})
    batch = Batch(torch.randn(9, 6), torch.randint(0, 4, (9,)))
    theirs = opacus.GradSampleModule(deepcopy(module), loss_reduction="mean")
    nn.functional.cross_entropy(theirs(batch.x.clone().requires_grad_()), batch.y).backward()
    samples = {k.removeprefix("_module."): p.grad_sample for k, p in theirs.named_parameters()}
    norms = torch.stack([s.flatten(1).norm(dim=1) for s in samples.values()], 1).norm(dim=1)
    factor = (1.0 / norms).clamp(max=1)
    g = example_gradients(problem, w, batch, {})
    torch.testing.assert_close(example_norms(g), norms, rtol=1e-5, atol=1e-5)
    for name, total in clipped_sum(g, None, 1.0).items():
        torch.testing.assert_close(total, torch.einsum("b,b...->...", factor, samples[name]), rtol=1e-5, atol=1e-5)


def gradients(count: int = 40, key: int = 0) -> Params:
    """Gradients of many lengths, from tiny to huge."""
    draw = rng.generator(key)
    scale = 10.0 ** draw.uniform(-6, 6, count)
    return Params({name: torch.from_numpy(draw.normal(size=(count, *s)) * scale.reshape(-1, *[1] * len(s))) for name, s in SHAPES.items()})


SHAPES = {"a": (3, 2), "b": (4,), "c": ()}


@pytest.mark.parametrize("clipping", ["flat", "per-layer", "automatic"])
def test_one_example_moves_the_sum_of_all_tensors_together_by_at_most_the_limit(clipping):
    """The joint sensitivity, over many examples: neighbours differ by the one that is left out."""
    g, limit = gradients(), 0.7
    whole = clipped_sum(g, None, limit, clipping)
    for i in range(40):
        mask = torch.ones(40, dtype=torch.float64)
        mask[i] = 0
        # 1e-9: sums of forty numbers of size one in float64 differ by rounding only.
        assert float((whole - clipped_sum(g, mask, limit, clipping)).norm()) <= limit + 1e-9


def test_flat_clipping_is_tight_and_leaves_short_gradients_alone():
    g = Params({"a": torch.tensor([[3.0, 4.0]]), "b": torch.tensor([[12.0]])})  # length 13
    assert clipped_sum(g, None, 13.0)["b"].tolist() == [12.0]
    assert float(clipped_sum(g, None, 1.3).norm()) == pytest.approx(1.3)
    assert clipped_sum(g, None, 1.3)["a"].tolist() == pytest.approx([0.3, 0.4])


def test_per_layer_clips_each_tensor_to_its_share_and_automatic_scales_what_is_short():
    g = Params({"a": torch.tensor([[3.0, 4.0]]), "b": torch.tensor([[0.1]])})
    out = clipped_sum(g, None, math.sqrt(2.0), "per-layer")
    assert out["a"].tolist() == pytest.approx([0.6, 0.8])
    assert out["b"].tolist() == pytest.approx([0.1])
    short = Params({"a": torch.tensor([[0.3, 0.4]])})
    assert float(clipped_sum(short, None, 2.0, "automatic").norm()) == pytest.approx(2.0 * 0.5 / 0.51)


def test_an_example_that_is_not_finite_counts_as_zero():
    g = Params({"a": torch.tensor([[1.0, 0.0], [math.nan, 1.0], [math.inf, 0.0]])})
    assert clipped_sum(g, None, 1.0)["a"].tolist() == [1.0, 0.0]


def test_padding_leaves_no_trace():
    problem, w, batch = transformer()
    padded = Batch(torch.cat([batch.x, batch.x[:2]]), torch.cat([batch.y, batch.y[:2]]), torch.tensor([1.0] * 5 + [0.0] * 2))
    a = clipped_sum(example_gradients(problem, w, batch, {}), None, 0.1)
    b = clipped_sum(example_gradients(problem, w, padded, {}), padded.mask, 0.1)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-7)


# ---- steps


X, Y = [[[1, 2], [3, 0]], [[0, 1], [2, 1], [1, -1]]], [[1, 2], [0, 3, 1]]
WHOLE = {"rate": 1.0, "steps": 2}


@pytest.mark.parametrize("mode", ["vmap", "loop"])
def test_two_steps_of_two_clients_by_hand(mode):
    """Without noise and with every example in every step. The numbers come from

    import numpy as np
    X = [np.array([[1., 2.], [3., 0.]]), np.array([[0., 1.], [2., 1.], [1., -1.]])]
    Y = [np.array([1., 2.]), np.array([0., 3., 1.])]
    w0, lr, C, L = np.array([1., -1.]), 0.1, 1.5, 4
    d = []
    for x, y in zip(X, Y):
        w = w0.copy()
        for _ in range(2):
            g = x * (x @ w - y)[:, None]
            g = g * np.minimum(1, C / np.linalg.norm(g, axis=1))[:, None]
            w = w - lr * g.sum(0) / L
        d.append(w - w0)
    print((w0 + np.mean(d, 0)).round(8))
    """
    program = DpSgd(lr=0.1, noise=0.0, clip=1.5, batch_size=4, **WHOLE)
    (state,) = rounds(FedAvg(program, weights="uniform"), problem_of(X, Y, w=[1, -1]), 1, mode=mode)
    assert vector(state.w).tolist() == pytest.approx(HAND, abs=1e-8)


HAND = [0.9885394, -0.90125097]


@pytest.mark.parametrize(("private", "plain"), [(DpSgd, Sgd), (DpAdam, Adam)])
def test_without_noise_clipping_and_sampling_they_are_sgd_and_adam(private, plain):
    """On clients of one size, whose batch is all of it."""
    xs, ys = [X[0], X[1][:2]], [Y[0], Y[1][:2]]
    same = {"lr": 0.1, "steps": 3, "weight_decay": 0.1}
    toy = problem_of(xs, ys, w=[1, -1])
    ours = rounds(FedAvg(private(noise=0.0, clip=1e6, batch_size=2, rate=1.0, **same)), toy, 3)[-1]
    theirs = rounds(FedAvg(plain(batch_size=None, **same)), toy, 3)[-1]
    np.testing.assert_allclose(vector(ours.w), vector(theirs.w), rtol=0, atol=1e-9)


def noises(entropy: Entropy = KEYED, clients: int = 400, steps: int = 1) -> np.ndarray:
    """What one round changes of each client's model by noise alone: examples whose gradient is zero. `[C, d]`."""
    d, sigma, limit, batch = 6, 1.7, 0.3, 5
    toy = problem_of([np.zeros((4, d))] * clients, [np.zeros(4)] * clients)
    problem = toy.problem if entropy is KEYED else toy.problem.__class__(**{**vars(toy.problem), "entropy": entropy})
    program = DpSgd(lr=1.0, noise=sigma, clip=limit, batch_size=batch, steps=steps)
    chunk = Chunk(np.arange(clients), 0, 11, {}, None)
    reply = Trainer(problem, toy.x, toy.y, toy.lists, "vmap").train((program, toy.w), chunk)
    return reply.payload["weight"][:, 0].numpy() * batch / (sigma * limit)


@pytest.mark.parametrize("entropy", [KEYED, SYSTEM], ids=["keys", "system"])
def test_the_noise_of_a_step_is_normal_with_the_stated_deviation(entropy):
    """2,400 numbers. Of the keyed ones, which never change, p is above 1e-3; the system's fail at 1e-9, so once in a billion runs."""
    z = noises(entropy).ravel()
    least = 1e-3 if entropy is KEYED else 1e-9
    assert stats.kstest(z, "norm").pvalue > least
    # (n - 1) s^2 is chi-squared.
    assert least < stats.chi2.cdf((z**2).sum(), len(z)) < 1 - least


def test_noise_of_tensors_steps_and_clients_is_independent():
    """Correlations of 400 clients' numbers: between entries (so tensors), between steps, between neighbours; each under 5 / sqrt(400)."""
    z, two = noises(), noises(steps=2)
    later = two - z  # the first of two steps draws what one step alone draws
    limit = 5 / math.sqrt(400)
    between = np.corrcoef(np.concatenate([z, later], axis=1).T)  # [12, 12]: entries of step 0 and of step 1
    assert np.abs(between - np.eye(12)).max() < limit
    assert abs(np.corrcoef(z[:-1].ravel(), z[1:].ravel())[0, 1]) < limit
    assert not np.array_equal(z[0], z[1])


def test_the_systems_noise_does_not_repeat_and_other_programs_stay_keyed():
    assert not np.array_equal(noises(SYSTEM, 3), noises(SYSTEM, 3))
    assert np.array_equal(noises(KEYED, 3), noises(KEYED, 3))
    toy = problem_of(X, Y, w=[1, -1])
    deployed = toy._replace(problem=toy.problem.__class__(**{**vars(toy.problem), "entropy": SYSTEM}))
    plain = FedAvg(Sgd(batch_size=1))
    assert np.array_equal(vector(rounds(plain, toy, 2)[-1].w), vector(rounds(plain, deployed, 2)[-1].w))


def test_no_loss_is_sent():
    program = DpSgd(noise=1.0, batch_size=2)
    toy = problem_of(X, Y)
    reply = Trainer(toy.problem, toy.x, toy.y, toy.lists, "vmap").train((program, toy.w), Chunk(np.array([1, 0]), 0, 1, {}, None))
    assert reply.metrics == {}


def test_a_step_draws_noise_for_everything_that_is_trained_and_what_the_network_asks_for():
    problem, w, _ = transformer()
    assert DpSgd(noise=1.0).draws(problem, 3) == {NOISE: Draw("normal", (w.size,))}


# ---- Poisson sampling


def sampled(sizes: list[int], batch: int, steps: int, entropy: Entropy = KEYED, **more: float):
    offset = np.concatenate([[0], np.cumsum(sizes)])
    lists = Lists(1000 + np.arange(offset[-1]), offset)
    keys = rng.fold_each(3, np.arange(len(sizes)))
    return plan(DpSgd(noise=1.0, batch_size=batch, steps=steps, **more), lists, np.arange(len(sizes)), keys, entropy), lists


@pytest.mark.parametrize("entropy", [KEYED, SYSTEM], ids=["keys", "system"])
def test_each_example_is_in_each_step_with_its_chance_and_never_twice(entropy):
    work, lists = sampled([50, 10, 3], 5, 400, entropy)
    for c, q in enumerate((0.1, 0.5, 1.0)):
        own = lists.of(c)
        present = np.zeros((400, len(own)))
        for s in range(400):
            taken = work.index[c, s][work.mask[c, s] > 0]
            assert len(set(taken)) == len(taken)
            present[s, taken - own[0]] = 1
        assert (work.index[c][work.mask[c] > 0] >= own[0]).all()
        assert (work.index[c][work.mask[c] > 0] <= own[-1]).all()
        # Counts are binomial; p < 1e-9 fails, once in a billion runs of the system's.
        assert stats.binomtest(int(present.sum()), present.size, q).pvalue > 1e-9
        if q < 1:
            # Steps are independent: lag-one agreement of an example with itself is q^2, within 5 deviations.
            together = (present[1:] * present[:-1]).mean()
            assert abs(together - q * q) < 5 * math.sqrt(q * q * (1 - q * q) / present[1:].size) * 2


def test_a_clients_sample_does_not_depend_on_its_chunk():
    together, _ = sampled([50, 50], 5, 4)
    offset = np.array([0, 50, 100])
    alone = plan(
        DpSgd(noise=1.0, batch_size=5, steps=4), Lists(1000 + np.arange(100), offset), np.array([1]), rng.fold_each(3, np.array([1]))
    )
    for s in range(4):
        assert together.index[1, s][together.mask[1, s] > 0].tolist() == alone.index[0, s][alone.mask[0, s] > 0].tolist()


def test_a_common_rate_and_steps_without_any_example():
    work, _ = sampled([40, 4], 5, 300, rate=0.1)
    assert work.steps.tolist() == [300, 300]
    empty = work.mask[1].sum(1) == 0  # (1 - 0.1)^4 = 0.656 of them
    assert stats.binomtest(int(empty.sum()), 300, 0.9**4).pvalue > 1e-6
    toy = problem_of([np.ones((40, 2)), np.ones((4, 2))], [np.ones(40), np.ones(4)])
    program = FedAvg(DpSgd(noise=0.5, batch_size=5, steps=30, rate=0.05))
    stacked, single = (vector(rounds(program, toy, 2, mode=mode)[-1].w) for mode in ("vmap", "loop"))
    np.testing.assert_allclose(stacked, single, rtol=0, atol=1e-9)
    assert np.isfinite(stacked).all()


# ---- accounting


def direct(account, q: float, noise: float, uses: int) -> float:
    event = dp_accounting.GaussianDpEvent(noise)
    event = dp_accounting.PoissonSampledDpEvent(q, event) if q < 1 else event
    return account.compose(dp_accounting.SelfComposedDpEvent(event, uses)).get_epsilon(DELTA)


@pytest.mark.parametrize(("q", "noise", "uses"), [(0.01, 1.0, 1000), (0.1, 1.5, 50), (1.0, 5.0, 10), (0.05, 0.8, 1)])
def test_epsilon_is_dp_accountings(q, noise, uses):
    assert epsilon([Spent(noise, q, uses)], DELTA) == pytest.approx(direct(rdp.RdpAccountant(), q, noise, uses), rel=1e-9)
    assert epsilon([Spent(noise, q, uses)], DELTA, "pld") == pytest.approx(direct(pld.PLDAccountant(), q, noise, uses), rel=1e-9)


def test_epsilon_is_opacus_within_a_hundredth():
    accountants = pytest.importorskip("opacus.accountants")
    for q, noise, uses in ((0.01, 1.0, 1000), (0.05, 0.8, 200)):
        theirs = accountants.RDPAccountant()
        theirs.history = [(noise, q, uses)]
        assert epsilon([Spent(noise, q, uses)], DELTA) == pytest.approx(theirs.get_epsilon(DELTA), rel=0.01)


def test_uses_compose_and_more_costs_more():
    parts = [Spent(1.0, 0.1, 10), Spent(2.0, 0.3, 5)]
    both = epsilon(parts, DELTA)
    assert both > max(epsilon([part], DELTA) for part in parts)
    assert epsilon([Spent(1.0, 0.1, 5), Spent(1.0, 0.1, 5)], DELTA) == pytest.approx(epsilon([Spent(1.0, 0.1, 10)], DELTA))
    assert epsilon([], DELTA) == epsilon([Spent(1.0, 0.1, 0)], DELTA) == 0
    assert epsilon([Spent(0.0, 0.1, 1)], DELTA) == math.inf


def test_the_full_gaussian_is_within_its_concentrated_bound():
    """rho = T / (2 z^2) gives epsilon <= rho + 2 sqrt(rho ln(1/delta)) (Bun and Steinke, 2016, proposition 1.3)."""
    spent = [Spent(4.0, 1.0, 20)]
    rho = zcdp(spent)
    assert rho == pytest.approx(20 / 32)
    assert epsilon(spent, DELTA) <= rho + 2 * math.sqrt(rho * math.log(1 / DELTA))


def test_a_fixed_cohort_is_accounted_under_replacement():
    event = dp_accounting.SampledWithoutReplacementDpEvent(1000, 100, dp_accounting.GaussianDpEvent(1.0))  # twice the sensitivity
    account = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    theirs = account.compose(dp_accounting.SelfComposedDpEvent(event, 30)).get_epsilon(DELTA)
    assert epsilon([Spent(2.0, 1.0, 30, of=(100, 1000))], DELTA) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("target", [0.5, 2.0, 8.0])
def test_the_solved_noise_reaches_its_target_and_little_less_would_not(target):
    spent = [Spent(math.nan, 0.05, 200)]
    noise = solve_noise(target, DELTA, spent)
    assert epsilon([Spent(noise, 0.05, 200)], DELTA) <= target
    assert epsilon([Spent(noise * 0.998, 0.05, 200)], DELTA) > target


def test_noise_that_is_given_stays_when_the_rest_is_solved_for():
    given = Spent(2.0, 0.1, 20)
    noise = solve_noise(4.0, DELTA, [given, Spent(math.nan, 0.1, 20)])
    assert 3.99 < epsilon([given, Spent(noise, 0.1, 20)], DELTA) <= 4.0


def test_a_target_that_no_noise_reaches_is_refused():
    with pytest.raises(FedsimError, match="no noise multiplier"):
        solve_noise(1e-8, 1e-9, [Spent(math.nan, 1.0, 1000)])


def test_delta_is_below_one_over_n():
    assert all(default_delta(n) < 1 / n for n in (2, 100, 1e6))


def test_a_vector_is_clipped_and_told_whether_it_was_short():
    w = Params({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    cut, short = clipped(w, 2.5)
    assert (cut["a"].tolist(), cut["b"].tolist(), float(short)) == ([1.5], [2.0], 0.0)
    same, short = clipped(w, 5.0)
    assert (same["b"].tolist(), float(short)) == ([4.0], 1.0)


def test_noise_like_a_model_is_one_stream():
    w = Params({"a": torch.zeros(2, 3), "b": torch.zeros(4)})
    z = noise_like(w, 5, KEYED)
    assert z.vector().tolist() == rng.normal(np.array([5], dtype=np.uint64), (10,))[0].tolist()


# ---- runs


SCENARIO = """\
name: private
seed: 2
data: {source: digits, clients: 6, partition: {name: dirichlet, alpha: 1.0}}
model: {name: mlp, hidden: [8]}
strategy: {name: fedavg, local: {name: dp-sgd, lr: 0.5, noise: 1.2, batch_size: 16, steps: 3}}
privacy: {delta: 1.0e-5}
rounds: 6
evaluate: {every: 3}
engine: {workers: 0}
output: {checkpoint: 2}
"""


def rows_of(tmp_path: Path, *assignments: str, text: str = SCENARIO, stop: int | None = None) -> list[dict]:
    (tmp_path / "private.yaml").write_text(text)
    scenario, _ = load(tmp_path / "private.yaml", assignments)
    folder = Folder.create(tmp_path / "run", scenario.name) if not (tmp_path / "run").exists() else Folder.open(tmp_path / "run")
    world = build(scenario)
    start(scenario, world, folder)
    steps = train(scenario, world, folder)
    list(islice(steps, stop))
    steps.close()
    return folder.rows()


def test_every_round_says_the_epsilon_of_what_has_run(tmp_path):
    rows = rows_of(tmp_path)
    assert "privacy.epsilon" not in rows[0]
    world = build(load(tmp_path / "private.yaml")[0])
    smallest = world.data.train.sizes.min()  # samples with the highest rate
    for row in rows[1:]:
        expected = direct(rdp.RdpAccountant(), min(1.0, 16 / smallest), 1.2, 3 * row["round"])
        assert row["privacy.epsilon"] == pytest.approx(expected, rel=1e-9)
        assert row["privacy.delta"] == 1e-5
        assert row["privacy.noise"] == 1.2


def test_a_client_that_stays_away_spends_nothing(tmp_path):
    bernoulli = "fleet.participation={name: bernoulli, rates: {name: constant, mean: 0.5}}"
    rows = rows_of(tmp_path, bernoulli, "strategy.local.rate=0.1")
    took = np.zeros(6)
    for row, who in zip(rows[1:], Folder.open(tmp_path / "run").rows("clients"), strict=True):
        took[who["ids"]] += 1
        expected = direct(rdp.RdpAccountant(), 0.1, 1.2, int(3 * took.max())) if took.any() else 0.0
        assert row["privacy.epsilon"] == pytest.approx(expected, rel=1e-9)


def test_a_target_is_reached_at_the_end_and_not_passed(tmp_path):
    rows = rows_of(tmp_path, "privacy.target_epsilon=5", "strategy.local.noise=null")
    assert 4.95 < rows[-1]["privacy.epsilon"] <= 5
    assert len(rows) == 7
    assert "stopped" not in rows[-1]


def test_a_budget_ends_the_run_before_it_is_passed(tmp_path):
    free = rows_of(tmp_path / "a" if (tmp_path / "a").mkdir() is None else tmp_path)
    budget = (free[3]["privacy.epsilon"] + free[4]["privacy.epsilon"]) / 2
    (tmp_path / "b").mkdir()
    rows = rows_of(tmp_path / "b", f"privacy.budget={budget}")
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert rows[-1]["stopped"]
    assert "test.accuracy" in rows[-1]
    assert rows[-1]["privacy.epsilon"] == free[3]["privacy.epsilon"] < budget
    assert Folder.open(tmp_path / "b" / "run").finished


def test_the_account_resumes_to_the_same_bytes(tmp_path):
    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
    straight = rows_of(tmp_path / "straight")
    rows_of(tmp_path / "resumed", stop=4)
    assert rows_of(tmp_path / "resumed") == straight
    models = [(tmp_path / name / "run" / "model.safetensors").read_bytes() for name in ("straight", "resumed")]
    assert models[0] == models[1]


def test_an_unprotected_phase_on_clients_data_makes_the_whole_infinite(tmp_path):
    text = SCENARIO.replace("strategy: {", "phases: [{strategy: {name: fedavg}, rounds: 1}, {strategy: {").replace(
        "3}}\nprivacy", "3}}, rounds: 2}]\nprivacy"
    )
    rows = rows_of(tmp_path, text=text.replace("rounds: 6\n", ""))
    assert rows[-1]["privacy.epsilon"] is None  # JSON has no infinity


BAD: list[tuple[tuple[str, ...], str]] = [
    (("strategy.local.noise=null",), "strategy: its `noise` is left open; set it, or set privacy.target_epsilon"),
    (("privacy.target_epsilon=3",), "privacy.target_epsilon: solves for `noise`, but every `noise` is given"),
    (("strategy.local=sgd", "privacy.budget=3"), "privacy.budget: nothing in this scenario protects examples or clients"),
    (("privacy.delta=1.5",), "privacy.delta: "),
    (("strategy.local.noise=-1",), "strategy.local.noise: "),
]


@pytest.mark.parametrize(("assignments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_what_cannot_be_accounted_for_is_refused_when_loaded(tmp_path, assignments, message):
    (tmp_path / "private.yaml").write_text(SCENARIO)
    with pytest.raises(FedsimError) as caught:
        load(tmp_path / "private.yaml", assignments)
    assert message in str(caught.value)


def built(tmp_path: Path, *assignments: str) -> Callable[[], object]:
    (tmp_path / "private.yaml").write_text(SCENARIO)
    return lambda: build(load(tmp_path / "private.yaml", assignments)[0])


def test_a_target_that_is_too_small_names_the_field(tmp_path):
    with pytest.raises(ScenarioError, match=r"privacy\.target_epsilon: no noise multiplier up to 1e\+06 reaches"):
        built(tmp_path, "privacy.target_epsilon=1e-7", "strategy.local.noise=null", "privacy.delta=1e-9")()


def test_a_delta_that_promises_nothing_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"privacy\.delta 0\.01 is at least 1/n \(n = 1438 examples\)"):
        built(tmp_path, "privacy.delta=0.01")()


def test_a_budget_below_one_round_is_refused(tmp_path):
    with pytest.raises(ScenarioError, match="a single round would pass the budget"):
        rows_of(tmp_path, "privacy.budget=0.01")


def test_a_recurrent_network_is_refused(tmp_path):
    text = "data.source={name: shakespeare, length: 20}"
    with pytest.raises(ScenarioError, match="recurrent layers give no gradient for each example"):
        built(tmp_path, text, "data.partition=natural", "data.clients=null", "model=char-lstm")()
