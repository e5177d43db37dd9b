"""FedBuff, FedAsync, weight prediction and staleness weights, worked by hand.

Three jumpers (clients that land on their target in one step) start at w = 0 with targets (1, 0), (0, 2), (4, 4). Delays of 1, 2 and 3.5
seconds, all three always at work, one update a server step (buffer = 1):

    t = 1    client 0 began at version 0: tau = 0
    t = 2    client 1 began at version 0: tau = 1; client 0, asked again at t = 1, is due at the same instant and comes next
    t = 2    client 0 began at version 1: tau = 1
    t = 3    client 0 began at version 3: tau = 0
    t = 3.5  client 2 began at version 0: tau = 4

    def s(tau): return (1 + tau) ** -0.5
    w = np.zeros(2); models = [w]
    for i, began in [(0, 0), (1, 0), (0, 1), (0, 3), (2, 0)]:
        tau = len(models) - 1 - began
        target = np.array([[1, 0], [0, 2], [4, 4]])[i]
        w = w + s(tau) * (target - models[began])        # FedBuff
        w = (1 - .6 * s(tau)) * w + .6 * s(tau) * target # FedAsync: whatever a jumper begins with, its model is its target
        models.append(w)
"""

import math

import numpy as np
import pytest
import torch

from fedsim.fleet import DeviceClass, Fleet, Latency, Spread
from fedsim.local import Sgd
from fedsim.pace import Buffered, Sync
from fedsim.registry import lookup
from fedsim.scenario import load_plugins
from fedsim.staleness import Staleness
from fedsim.strategy import Strategy
from tests.toy import jumpers, rounds_of

load_plugins()
LAND = Sgd(lr=2.0, batch_size=None)
TARGETS = np.array([[1.0, 0.0], [0.0, 2.0], [4.0, 4.0]])
ORDER = [(0, 0), (1, 0), (0, 1), (0, 3), (2, 0)]  # client, version it began with
DELAYS = lookup(Spread, "classes")(tuple(DeviceClass(1, v) for v in (1.0, 2.0, 3.5)))


def run_by_hand(name: str, count: int, **fields):
    """Rounds with delays handed out so that client i has the i-th."""
    toy = jumpers(TARGETS)
    for seed in range(50):  # delays are dealt at random: take the seed that deals them in order
        rounds = rounds_of(lookup(Strategy, name)(local=LAND, **fields), toy, count, Fleet(latency=Latency(delay=DELAYS)), ASYNC, seed=seed)
        if [int(r.received.arrivals.ids) for r in rounds[:5]] == [i for i, _ in ORDER][:count]:
            return rounds
    raise AssertionError("no seed deals the delays in order")


ASYNC = Buffered(concurrency=3, buffer=1)


def models(step) -> list[np.ndarray]:
    w = [np.zeros(2)]
    for i, began in ORDER:
        w.append(step(w, TARGETS[i], w[began], len(w) - 1 - began))
    return w[1:]


def s(tau):
    return (1 + tau) ** -0.5


def test_fedbuff_by_hand():
    rounds = run_by_hand("fedbuff", 5)
    assert [int(r.received.arrivals.staleness) for r in rounds] == [0, 1, 1, 0, 4]
    assert [r.time for r in rounds] == [1.0, 2.0, 2.0, 3.0, 3.5]
    expected = models(lambda w, target, began, tau: w[-1] + s(tau) * (target - began))
    for round, w in zip(rounds, expected, strict=True):
        np.testing.assert_allclose(round.state.w["weight"][0].numpy(), w, rtol=1e-6)


def test_fedasync_by_hand():
    rounds = run_by_hand("fedasync", 5, alpha=0.6)
    expected = models(lambda w, target, began, tau: (1 - 0.6 * s(tau)) * w[-1] + 0.6 * s(tau) * target)
    for round, w in zip(rounds, expected, strict=True):
        np.testing.assert_allclose(round.state.w["weight"][0].numpy(), w, rtol=1e-6)


def test_weight_prediction_by_hand():
    rounds = run_by_hand("weight-prediction", 5, momentum=0.5)
    w, d, tau_hat, sent = np.zeros(2), np.zeros(2), 0.0, [np.zeros(2)]
    for (i, began), round in zip(ORDER, rounds, strict=True):
        step = TARGETS[i] - sent[began]
        tau_hat = 0.5 * (len(sent) - 1 - began) + 0.5 * tau_hat
        w, d = w + step, 0.5 * step + 0.5 * d
        sent.append(w + tau_hat * d)
        np.testing.assert_allclose(round.state.w["weight"][0].numpy(), w, rtol=1e-12)
        np.testing.assert_allclose(round.state.ahead["weight"][0].numpy(), sent[-1], rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("constant", {}, [1, 1, 1, 1]),
        ("hinge", {"a": 2.0, "b": 3.0}, [1, 1, 1 / 3, 1 / 35]),
        ("polynomial", {"a": 0.5}, [1, 0.5, 1 / math.sqrt(5), 1 / math.sqrt(21)]),
        ("exponential", {"half_life": 20.0}, [1, 2**-0.15, 2**-0.2, 0.5]),
    ],
)
def test_staleness_functions(name, fields, expected):
    tau = torch.tensor([0, 3, 4, 20])
    factor = lookup(Staleness, name)(**fields).factor(tau)
    assert factor.dtype == torch.float32
    torch.testing.assert_close(factor, torch.tensor(expected, dtype=torch.float32))


def test_the_fedavg_family_takes_staleness_weights():
    """FedAvg normalises by the sum of its weights: one stale update alone counts in full, beside fresh ones it counts less."""
    halving = lookup(Staleness, "exponential")(half_life=1.0)
    rounds = run_by_hand("fedavg", 3, staleness=halving)
    plain = run_by_hand("fedavg", 3)
    for a, b in zip(rounds, plain, strict=True):
        np.testing.assert_allclose(a.state.w["weight"].numpy(), b.state.w["weight"].numpy())
    fleet = Fleet(latency=Latency(delay=lookup(Spread, "classes")((DeviceClass(1, 1.0), DeviceClass(1, 3.0)))))
    pace = Buffered(concurrency=4, buffer=2)
    stale = rounds_of(lookup(Strategy, "fedavg")(local=LAND, staleness=halving), jumpers(np.eye(4)[:, :2] + 1), 5, fleet, pace)
    tau = torch.stack([r.received.arrivals.staleness for r in stale])
    weights = torch.stack([r.report["weight"] for r in stale])
    torch.testing.assert_close(weights, 2.0 * torch.exp2(-tau.float()))  # two examples each
    assert len(tau.unique()) > 1


@pytest.mark.parametrize("name", ["fedbuff", "weight-prediction"])
def test_without_staleness_it_is_fedavg(name):
    toy = jumpers(np.random.default_rng(0).normal(size=(6, 3)))
    ours, fedavg = (rounds_of(lookup(Strategy, n)(local=LAND), toy, 4, pace=Sync(cohort=4))[-1].state.w["weight"] for n in (name, "fedavg"))
    if name == "fedbuff":  # a sum over K against a weighted mean: the last bits
        torch.testing.assert_close(ours, fedavg, rtol=1e-12, atol=1e-13)
    else:
        assert torch.equal(ours, fedavg)


def test_fedasync_with_alpha_one_is_the_mean_of_models_whatever_they_began_with():
    toy = jumpers(TARGETS)
    w = rounds_of(lookup(Strategy, "fedasync")(local=LAND, alpha=1.0), toy, 1)[0].state.w["weight"][0]
    np.testing.assert_allclose(w.numpy(), TARGETS.mean(0), rtol=1e-6)
