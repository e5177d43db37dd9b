"""What goes wrong, what is said of it, and that the model survives it."""

import itertools
import math

import numpy as np
import pytest
import torch

from fedsim import rng, tree
from fedsim.engine import run
from fedsim.fleet import LOST, Byzantine, Channel, Corruption, DeviceClass, Drops, Faults, Fleet, Latency, Link, Spread, Straggle
from fedsim.local import Constant, Sgd, StepDecay
from fedsim.pace import Buffered, Deadline, Sync
from fedsim.registry import lookup
from fedsim.scenario import load_plugins
from fedsim.sim.cohort import Trainer
from fedsim.sim.executor import Inline
from fedsim.sim.port import SimPort
from fedsim.strategy import Strategy
from tests.toy import jumpers, rounds_of

load_plugins()
ONE_STEP = Sgd(lr=2.0, batch_size=None)  # lands exactly on a jumper's target
FEDAVG = lookup(Strategy, "fedavg")(local=ONE_STEP)
KEYS = rng.fold_each(3, np.arange(20_000))


def fleet(faults=None, channel=None, **latency) -> Fleet:
    return Fleet(latency=Latency(**latency), faults=faults or Faults(), channel=channel or Channel())


def vector(round) -> np.ndarray:
    return round.state.w["weight"].numpy()[0]


@pytest.mark.parametrize("mode", ["vmap", "loop"])
@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        (Faults(drop=Drops(download=0.5)), "dropped out before the download"),
        (Faults(drop=Drops(training=0.5)), "dropped out during training"),
        (Faults(drop=Drops(upload=0.5)), "dropped out during the upload"),
    ],
)
def test_who_drops_out_is_counted_and_the_others_are_averaged(faults, reason, mode):
    toy = jumpers(np.arange(20.0).reshape(10, 2))
    first = rounds_of(FEDAVG, toy, 1, fleet(faults), mode=mode)[0]
    lost, back = first.received.lost, first.received.arrivals.ids.tolist()
    assert set(lost.values()) == {reason}
    assert sorted([*lost, *back]) == list(range(10))
    assert 0 < len(lost) < 10
    np.testing.assert_allclose(vector(first), np.arange(20.0).reshape(10, 2)[back].mean(0), rtol=1e-12)


def test_bytes_are_those_of_messages_that_were_sent():
    toy = jumpers(np.zeros((10, 2)))
    sent = {}
    for name in ("download", "training", "upload"):
        first = rounds_of(FEDAVG, toy, 1, fleet(Faults(drop=Drops(**{name: 0.5}))))[0].received
        sent[name] = (first.bytes_down // 16, first.bytes_up // 16, len(first.arrivals))
    assert all(up == arrived for _, up, arrived in sent.values())
    assert sent["download"][0] == sent["download"][2]
    assert sent["training"][0] == sent["upload"][0] == 10


def test_a_channel_loses_messages():
    toy = jumpers(np.zeros((40, 2)))
    down = rounds_of(FEDAVG, toy, 1, fleet(channel=Channel(down=Link(erasure=0.5))))[0].received
    up = rounds_of(FEDAVG, toy, 1, fleet(channel=Channel(up=Link(erasure=0.5))))[0].received
    assert set(down.lost.values()) == {"message lost on the downlink"}
    assert set(up.lost.values()) == {"update lost on the uplink"}
    assert all(5 < len(part.lost) < 35 for part in (down, up))


def test_faults_come_as_often_as_declared():
    faults = Faults(Drops(0.1, 0.2, 0.05), duplicate=0.3, corrupt=Corruption(0.15, 0.25), straggle=Straggle(0.2, 5.0))
    fates = faults.draw(KEYS, 0.0, 0.0)
    shares = {"": 0.65, LOST[1]: 0.1, LOST[2]: 0.2, LOST[3]: 0.05}
    for reason, share in shares.items():
        assert abs((fates.fate == LOST.index(reason)).mean() - share) < 4 * math.sqrt(share * (1 - share) / len(KEYS))
    for drawn, share in ((fates.twice, 0.3), (fates.nan, 0.15), (fates.bent, 0.25), (fates.slower == 5, 0.2)):
        assert abs(drawn.mean() - share) < 4 * math.sqrt(share * (1 - share) / len(KEYS))
    channel = Faults().draw(KEYS, 0.1, 0.2).fate
    for fate, share in ((4, 0.1), (5, 0.9 * 0.2), (0, 0.9 * 0.8)):
        assert abs((channel == fate).mean() - share) < 4 * math.sqrt(share * (1 - share) / len(KEYS))


@pytest.mark.parametrize("mode", ["vmap", "loop"])
@pytest.mark.parametrize("pace", [Sync(), Deadline(seconds=5.0), Buffered(concurrency=6, buffer=3)], ids=lambda pace: pace.paced)
@pytest.mark.parametrize(
    ("corrupt", "reason"),
    [
        (Corruption(nan=0.4), "update is not finite"),
        (Corruption(shape=0.4), "update has float64[1] at ['weight'], not float64[1, 2]"),
    ],
    ids=["nan", "shape"],
)
def test_a_broken_update_is_rejected_and_never_poisons_the_model(corrupt, reason, pace, mode):
    targets = np.arange(16.0).reshape(8, 2)
    toy = jumpers(targets)
    rounds = rounds_of(FEDAVG, toy, 6, fleet(Faults(corrupt=corrupt), jitter=0.5, compute=lookup(Spread, "constant")(1.0)), pace, mode)
    rejected = [r.received.rejected for r in rounds]
    assert {why for each in rejected for why in each.values()} == {reason}
    for round in rounds:
        assert torch.isfinite(round.state.w["weight"]).all()
        if round.received.arrivals is not None:
            assert not set(round.received.arrivals.ids.tolist()) & set(round.received.rejected)
            assert targets[:, 0].min() - 1e-9 <= vector(round)[0] <= targets[:, 0].max() + 16  # a mean of jumps to the targets


def test_whoever_is_rejected_has_no_weight():
    targets = np.arange(16.0).reshape(8, 2)
    first = rounds_of(FEDAVG, jumpers(targets), 1, fleet(Faults(corrupt=Corruption(nan=0.4))))[0]
    back = [i for i in range(8) if i not in first.received.rejected]
    assert len(back) < 8
    np.testing.assert_allclose(vector(first), targets[back].mean(0), rtol=1e-12)


def test_an_update_that_comes_twice_counts_once():
    targets = np.arange(16.0).reshape(8, 2)
    plain = rounds_of(FEDAVG, jumpers(targets), 3)
    twice = rounds_of(FEDAVG, jumpers(targets), 3, fleet(Faults(duplicate=0.5)))
    assert {why for r in twice for why in r.received.rejected.values()} == {"came a second time"}
    assert all(torch.equal(a.state.w["weight"], b.state.w["weight"]) for a, b in zip(plain, twice, strict=True))
    assert [len(r.received.arrivals) for r in twice] == [8, 8, 8]


def test_a_straggler_takes_longer():
    delay = {"delay": lookup(Spread, "constant")(2.0)}
    toy = jumpers(np.zeros((10, 2)))
    assert rounds_of(FEDAVG, toy, 1, fleet(**delay))[0].time == 2.0
    assert rounds_of(FEDAVG, toy, 1, fleet(Faults(straggle=Straggle(rate=0.5, factor=7.0)), **delay))[0].time == 14.0


@pytest.mark.parametrize("mode", ["vmap", "loop"])
@pytest.mark.parametrize(("attack", "factor"), [("sign-flip", -3.0), ("scale", 3.0)])
def test_byzantine_clients_send_something_else(attack, factor, mode):
    targets = np.arange(20.0).reshape(10, 2)
    faults = Faults(byzantine=Byzantine(fraction=0.3, attack=attack, strength=3.0))
    bad = faults.byzantine.draw(10, rng.fold(rng.fold(0, rng.FLEET), 12))
    assert bad.sum() == 3
    first = rounds_of(FEDAVG, jumpers(targets), 1, fleet(faults), mode=mode)[0]
    np.testing.assert_allclose(vector(first), np.where(bad[:, None], factor * targets, targets).mean(0), rtol=1e-12)
    robust = rounds_of(lookup(Strategy, "median")(local=ONE_STEP), jumpers(np.ones((10, 2))), 1, fleet(faults), mode=mode)[0]
    np.testing.assert_allclose(vector(robust), 1.0, rtol=1e-12)


def test_noise_has_the_size_that_was_said():
    n, d = 50, 100
    toy = jumpers(np.ones((n, d)))
    step = lookup(Strategy, "fedavg")(local=Sgd(lr=float(d), batch_size=None))
    attacked = rounds_of(step, toy, 1, fleet(Faults(byzantine=Byzantine(fraction=1.0, attack="noise", strength=2.0))))[0]
    uplink = rounds_of(step, toy, 1, fleet(channel=Channel(up=Link(noise=2.0))))[0]
    # The mean of n updates of root mean square 1, each with noise of standard deviation 2, in d coordinates.
    for w in (vector(attacked), vector(uplink)):
        assert abs(w.mean() - 1) < 4 * 2 / math.sqrt(n * d)
        assert abs(w.std() * math.sqrt(n) / 2 - 1) < 4 / math.sqrt(2 * d)
    # Noise on the way down does not matter to a client that lands on its target whatever it received, but its change is from there.
    downlink = rounds_of(step, toy, 1, fleet(channel=Channel(down=Link(noise=2.0))))[0]
    assert abs(vector(downlink).std() * math.sqrt(n) / 2 - 1) < 4 / math.sqrt(2 * d)


@pytest.mark.parametrize("mode", ["vmap", "loop"])
def test_noise_does_not_depend_on_chunks_or_mode(mode):
    noisy = fleet(Faults(byzantine=Byzantine(attack="noise")), Channel(down=Link(noise=0.1), up=Link(noise=0.2)))
    toy = jumpers(np.arange(20.0).reshape(10, 2))
    a, b = (rounds_of(FEDAVG, toy, 3, noisy, mode=m, chunk=c)[-1] for m, c in (("vmap", 10), (mode, 3)))
    torch.testing.assert_close(a.state.w["weight"], b.state.w["weight"], rtol=1e-12, atol=1e-12)


PACES = [Deadline(seconds=1.5), Buffered(concurrency=6, buffer=3), Sync(cohort=4, over_selection=0.5, timeout=4.0)]
EVERYTHING = Fleet(
    latency=Latency(delay=lookup(Spread, "pareto")(least=0.5, shape=1.2), jitter=0.4, compute=lookup(Spread, "constant")(0.3)),
    faults=Faults(Drops(0.1, 0.1, 0.1), 0.2, Corruption(0.1, 0.1), Straggle(), Byzantine()),
    channel=Channel(Link(0.1, 0.05), Link(0.1, 0.05)),
)


@pytest.mark.parametrize("name", ["fedavg", "fedasync"])
@pytest.mark.parametrize("pace", PACES, ids=lambda pace: pace.paced)
def test_however_jobs_are_grouped_the_result_is_the_same(pace, name):
    toy = jumpers(np.random.default_rng(0).normal(size=(12, 2)))
    strategy = lookup(Strategy, name)(local=Sgd(lr=0.3, epochs=2, batch_size=1))
    together, alone = (rounds_of(strategy, toy, 12, EVERYTHING, pace, mode, chunk) for mode, chunk in (("vmap", 12), ("loop", 1)))
    assert [r.time for r in together] == [r.time for r in alone]
    for a, b in zip(together, alone, strict=True):
        assert (a.received.lost, a.received.rejected) == (b.received.lost, b.received.rejected)
        torch.testing.assert_close(a.state.w["weight"], b.state.w["weight"], rtol=1e-12, atol=1e-13)


def test_laziness_trains_nothing_that_never_arrives():
    """With one update a round a group of six trains once, not six times; what is given up is not trained at all."""
    toy = jumpers(np.zeros((6, 2)))
    delays = Latency(delay=lookup(Spread, "classes")(tuple(DeviceClass(1, float(v)) for v in range(1, 7))))
    rounds = rounds_of(FEDAVG, toy, 1, Fleet(latency=delays), Sync(cohort=2, over_selection=2.0))
    assert rounds[0].received.examples == 2 * 2
    rounds = rounds_of(FEDAVG, toy, 3, Fleet(latency=delays), Buffered(concurrency=6, buffer=1))
    assert [r.received.examples for r in rounds[:1]] == [6 * 2]


class Counting(Inline):
    """Says how many chunks were trained."""

    chunks = 0

    def map(self, task, shared, items):
        self.chunks += len(items) if task == "train" else 0
        return super().map(task, shared, items)


@pytest.mark.parametrize("mode", ["vmap", "loop"])
def test_jobs_of_several_rounds_train_together_where_the_program_does_not_read_the_version(mode):
    """The same numbers, in far fewer chunks. A schedule reads the version, so its jobs train apart; this one changes nothing."""
    toy = jumpers(np.random.default_rng(0).normal(size=(12, 2)))
    came: dict[bool, list] = {}
    chunks = {}
    for ages, schedule in ((False, Constant()), (True, StepDecay(every=10**6))):
        program = Sgd(lr=0.3, epochs=2, batch_size=1, schedule=schedule)
        assert program.ages() is ages
        executor = Counting(Trainer(toy.problem, toy.x, toy.y, toy.lists, mode))
        port = SimPort(executor, EVERYTHING, None, toy.problem.sizes, {}, 12, 5)
        strategy = lookup(Strategy, "fedasync")(local=program)
        came[ages] = list(itertools.islice(run(strategy, toy.problem, toy.w, port, Buffered(concurrency=6, buffer=1), 7), 60))
        chunks[ages] = executor.chunks
    for mixed, apart in zip(came[False], came[True], strict=True):
        assert mixed.received.lost == apart.received.lost
        assert mixed.received.rejected == apart.received.rejected
        torch.testing.assert_close(mixed.state.w["weight"], apart.state.w["weight"], rtol=1e-12, atol=1e-13)
    assert chunks[False] < 0.6 * chunks[True]


@pytest.mark.parametrize("pace", PACES, ids=lambda pace: pace.paced)
def test_faults_and_paces_resume_to_the_bit(pace):
    toy = jumpers(np.random.default_rng(0).normal(size=(12, 2)))
    strategy = lookup(Strategy, "fedasync")(local=Sgd(lr=0.3, epochs=2, batch_size=1))

    def port() -> SimPort:
        trainer = Trainer(toy.problem, toy.x, toy.y, toy.lists, "vmap")
        return SimPort(Inline(trainer), EVERYTHING, None, toy.problem.sizes, {}, 4, 5)

    straight = list(itertools.islice(run(strategy, toy.problem, toy.w, port(), pace, 7), 10))
    first, second = port(), port()
    half = next(itertools.islice(run(strategy, toy.problem, toy.w, first, pace, 7), 4, None))
    second.restore(tree.load(*tree.dump(first.save())))
    rest = list(itertools.islice(run(strategy, toy.problem, toy.w, second, pace, 7, half), 5))
    for a, b in zip([half, *rest], straight[4:], strict=True):
        assert (a.time, a.received.lost, a.received.rejected) == (b.time, b.received.lost, b.received.rejected)
        assert torch.equal(a.state.w["weight"], b.state.w["weight"])
