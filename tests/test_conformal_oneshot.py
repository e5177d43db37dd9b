"""The one-shot competitors: quantiles of quantiles, sketches, the oracle; each against simulation or brute force."""

import math

import numpy as np
import pytest
import torch

from fedsim.conformal import OfLaw, Own, Pooled, weighted_quantile
from strategies.conformal_oneshot import rank_of_ranks
from strategies.conformal_sketch import digest, merged, places
from tests.test_conformal import exact, federation, random_federation, strategy
from tests.toy import Listed, close, rounds

# ---- quantile of quantiles


def local_rank(n, alpha):
    return np.ceil((1 - alpha) * (np.asarray(n) + 1) * (1 - 1e-12))


def coverage_of(n, alpha, k, draws=40_000):
    """Coverage of the k-th smallest local quantile of uniform scores, by simulation: order statistics are Beta(l, n - l + 1)."""
    n, rank = np.asarray(n), local_rank(n, alpha)
    g = np.random.default_rng(0)
    q = np.where(rank <= n, g.beta(rank, np.maximum(n - rank + 1, 1), size=(draws, len(n))), np.inf)
    return np.minimum(np.sort(q, axis=1)[:, k - 1], 1).mean()


@pytest.mark.parametrize(("n", "alpha"), [([20] * 10, 0.1), ([9, 30, 100, 12, 50], 0.1), ([5, 40, 40, 40], 0.2), ([19] * 30, 0.05)])
def test_k_is_the_least_that_covers(n, alpha):
    n = np.array(n)
    k = rank_of_ranks(local_rank(n, alpha), n, alpha)
    noise = 4 * 0.5 / math.sqrt(40_000)  # four standard errors at most
    assert 1 <= k <= len(n)
    assert coverage_of(n, alpha, k) > 1 - alpha - noise
    assert k == 1 or coverage_of(n, alpha, k - 1) < 1 - alpha + noise


def test_one_client_is_split_conformal_and_too_few_examples_are_a_full_set():
    assert rank_of_ranks(local_rank([50], 0.1), np.array([50]), 0.1) == 1
    assert rank_of_ranks(local_rank([5, 6, 12], 0.1), np.array([5, 6, 12]), 0.1) == 1  # 12 of 12 cover 12 / 13 by themselves
    assert rank_of_ranks(local_rank([9] * 3, 0.05), np.array([9] * 3), 0.05) == 1  # all are infinite
    toy, _, _ = random_federation(clients=3, examples=9)
    qq = strategy("conformal-qq", alpha=0.05)
    assert qq.thresholds(toy.problem, rounds(qq, toy, 1)[-1]).isinf().all()


def test_by_hand():
    """Three clients of nine scores i / 10, i / 20, i / 30 (i = 1..9), alpha = 0.2: l = 8, so quantiles 0.8, 0.4, 0.8 / 3.

    E of the k-th smallest of three Beta(8, 2): by integration 1 - int P(Bin(3, I_t(8, 2)) >= k) dt = 0.6943, 0.8107, 0.8949: k = 2.

        import numpy as np
        from scipy.special import betainc
        t = (np.arange(100000) + .5) / 100000; g = betainc(8, 2, t)
        print(1 - (1 - (1 - g)**3).mean(), 1 - (g**3 + 3 * g**2 * (1 - g)).mean(), 1 - (g**3).mean())
    """
    i = np.arange(1, 10)
    toy = federation([i / 10, i / 20, i / 30], [np.zeros(9, dtype=int)] * 3, 2)
    local, qq = strategy("conformal-local", alpha=0.2), strategy("conformal-qq", alpha=0.2)
    close(local.thresholds(toy.problem, rounds(local, toy, 1)[-1])[:, 0], [0.8, 0.4, 0.8 / 3])
    close(qq.thresholds(toy.problem, rounds(qq, toy, 1)[-1]), [[0.4, 0.4]])
    pooled = strategy("conformal-exact", alpha=0.2)
    close(pooled.thresholds(toy.problem, rounds(pooled, toy, 1)[-1])[:, 0], [0.5])  # ceil(0.8 * 28) = 23rd of 27


# ---- sketches


@pytest.mark.parametrize("n", [0, 1, 10, 300, 20_000])
@pytest.mark.parametrize("compression", [10, 100, 1000])
def test_a_digest_fits_into_its_place(n, compression):
    values = np.random.default_rng(n).lognormal(size=n)
    packed = digest(values, compression)
    assert len(packed) <= places(compression, n)
    assert packed == digest(values[::-1].copy(), compression)  # a function of the numbers alone


def test_digests_merge_into_one_of_all_numbers():
    g = np.random.default_rng(0)
    parts = [g.beta(1 + i, 2, size=g.integers(0, 400)) for i in range(8)]
    size = places(100, 400)
    packed = np.stack([np.frombuffer(digest(p, 100).ljust(size, b"\0"), dtype=np.uint8) for p in parts])
    sketch, everything = merged(packed, np.array([len(p) for p in parts])), np.sort(np.concatenate(parts))
    for level in (0.01, 0.1, 0.5, 0.9, 0.99):
        rank = np.searchsorted(everything, sketch.get_quantile(level)) / len(everything)
        assert abs(rank - level) < 0.02  # t-digest is accurate to about 4 q (1 - q) / k in rank, k = 100
    assert merged(packed, np.zeros(8)) is None


@pytest.mark.parametrize("target", [Pooled(), Own(), OfLaw((0.2, 0.2, 0.6))], ids=repr)
def test_weighted_thresholds_from_sketches(target):
    """In rank of each class's scores, thresholds of sketches and exact ones differ by 2 %."""
    toy, v, y = random_federation(clients=6, examples=150)
    chosen = strategy("conformal-sketch", target=target)
    q, oracle = chosen.thresholds(toy.problem, rounds(chosen, toy, 1)[-1]).numpy(), exact(toy, v, y, target)
    assert q.shape == oracle.shape
    both = np.isfinite(oracle) & np.isfinite(q)
    assert both.mean() > 0.9 * np.isfinite(oracle).mean()
    assert (np.isinf(q) >= np.isinf(oracle)).all()  # never less cautious
    ranks = [np.searchsorted(np.sort(v), x) / len(v) for x in (q[both], oracle[both])]
    assert np.abs(ranks[0] - ranks[1]).max() < 0.02


# ---- who answers when


@pytest.mark.parametrize("name", ["conformal-exact", "conformal-sketch", "conformal-qq", "conformal-local"])
def test_each_client_answers_once(name):
    toy, v, y = random_federation(clients=4)
    chosen = strategy(name)
    first, second, third = rounds(chosen, toy, 3, participation=Listed(((0, 1), (0, 1, 3), (1, 3))))
    assert [s.heard.tolist() for s in (first, second, third)] == [
        [True, True, False, False],
        [True, True, False, True],
        [True, True, False, True],
    ]
    q = chosen.thresholds(toy.problem, third)
    assert torch.equal(q, chosen.thresholds(toy.problem, second))
    if name == "conformal-exact":
        kept = np.isin(toy.lists.owners(), (0, 1, 3))
        expected = weighted_quantile(torch.tensor(v[kept]), torch.tensor(y[kept]), torch.ones(1, 3), 0.1)
        present = np.unique(y[kept])
        close(q[:, present], expected[:, present])
    if name == "conformal-local":
        assert q[2].isinf().all()
        assert q[[0, 1, 3]].isfinite().all()
