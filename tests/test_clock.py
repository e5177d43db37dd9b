"""The virtual clock by hand, and paces against queueing arithmetic."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import lognorm

from fedsim import rng
from fedsim.errors import ScenarioError
from fedsim.fleet import DeviceClass, Fleet, Latency, Spread
from fedsim.local import Sgd
from fedsim.pace import Buffered, Deadline, Sync
from fedsim.registry import lookup
from fedsim.scenario import load_plugins
from fedsim.sim.clock import Clock, Events
from fedsim.steps import count_examples
from fedsim.strategy import Strategy
from tests.toy import jumpers, rounds_of

load_plugins()
ONE_STEP = Sgd(lr=1.0, batch_size=None)


def classes(*pairs):
    return lookup(Spread, "classes")(tuple(DeviceClass(share, value) for share, value in pairs))


def events(*due, fate=None, copy=None) -> Events:
    n = len(due)
    zero = np.zeros(n, dtype=np.int64)
    return Events(np.array(due, dtype=float), np.arange(n), zero, np.array(fate or zero), np.array(copy or zero))


def test_what_is_announced_later_comes_later_at_the_same_time():
    clock = Clock().announce(events(3.0, 1.0)).announce(events(1.0, 0.5))
    assert clock.ahead.due.tolist() == [0.5, 1.0, 1.0, 3.0]
    assert clock.ahead.client.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("count", "until", "step", "now", "ready", "left"),
    [
        (None, math.inf, False, 5.0, 3, 0),  # everything, the lost one included
        (2, math.inf, False, 4.0, 2, 1),  # the lost one at 2 does not count
        (2, 3.0, False, 3.0, 1, 2),  # the deadline comes first
        (None, 9.0, False, 5.0, 3, 0),  # nobody waits when all are back
        (None, 0.5, False, 0.5, 0, 4),
        (2, math.inf, True, 1.0, 1, 3),  # one thing at a time
        (0, math.inf, False, 0.0, 0, 4),
    ],
)
def test_waiting(count, until, step, now, ready, left):
    clock = Clock().announce(events(1.0, 2.0, 4.0, 5.0, fate=[0, 2, 0, 0])).wait(count, until, step)
    assert (clock.now, clock.ready, len(clock.ahead)) == (now, ready, left)


def test_of_what_arrives_at_one_instant_only_so_much_is_taken():
    clock = Clock().announce(events(1.0, 1.0, 1.0, 1.0))
    assert [clock.wait(3, math.inf, step).ready for step in (False, True)] == [3, 3]
    past, rest = clock.wait(3, math.inf, False).taken()
    assert (len(past), rest.ready, rest.wait(3, math.inf, False).now) == (3, 0, 1.0)


def test_a_second_copy_does_not_count_as_ready():
    assert Clock().announce(events(1.0, 1.0, copy=[0, 1])).wait(2, math.inf, False).ready == 1


def test_time_never_goes_back():
    clock = Clock(now=7.0).wait(None, 3.0, False)
    assert clock.now == 7.0


def test_examples_are_counted_as_they_are_trained():
    sizes = np.array([0, 3, 10, 25])
    assert count_examples(Sgd(epochs=2, batch_size=4), sizes).tolist() == [0, 6, 20, 50]
    assert count_examples(Sgd(steps=3, batch_size=4), sizes).tolist() == [0, 9, 10, 12]
    assert count_examples(Sgd(steps=4, batch_size=4), sizes).tolist() == [0, 12, 14, 16]  # of ten: 4 + 4 + 2, then 4 of the next epoch
    assert count_examples(Sgd(steps=3, batch_size=None), sizes).tolist() == [0, 9, 30, 75]


def test_a_job_takes_delay_download_training_and_upload():
    latency = Latency(
        delay=lookup(Spread, "constant")(1.0),
        compute=lookup(Spread, "constant")(0.5),
        down=lookup(Spread, "constant")(4.0),
        up=lookup(Spread, "constant")(2.0),
    )
    # Two weights in float64 are 16 bytes down and up; two examples: T = 1 + 16 / 4 + 2 * 0.5 + 16 / 2.
    toy, strategy = jumpers([[1.0, 2.0]] * 3), lookup(Strategy, "fedavg")(local=ONE_STEP)
    first, second = rounds_of(strategy, toy, 2, fleet=Fleet(latency=latency))
    assert (first.time, second.time) == (14.0, 28.0)
    assert first.received.bytes_down == first.received.bytes_up == 48


JITTER = 0.8
ITERATED = Latency(compute=lookup(Spread, "constant")(0.5), jitter=JITTER)  # two examples: a mean of one second


def test_a_synchronous_round_lasts_as_long_as_the_slowest_of_its_clients():
    cohort, count = 5, 400
    job = lognorm(s=JITTER, scale=math.exp(-(JITTER**2) / 2))
    mean = quad(lambda t: 1 - job.cdf(t) ** cohort, 0, np.inf)[0]
    square = quad(lambda t: 2 * t * (1 - job.cdf(t) ** cohort), 0, np.inf)[0]
    strategy = lookup(Strategy, "fedavg")(local=ONE_STEP)
    end = rounds_of(strategy, jumpers([[0.0, 0.0]] * 20), count, fleet=Fleet(latency=ITERATED), pace=Sync(cohort=cohort))[-1].time
    assert abs(end / count - mean) < 4 * math.sqrt((square - mean**2) / count)  # four standard errors


def test_throughput_follows_littles_law():
    """Clients at work = throughput x mean time of a job. M renewal processes that start at 0: after n arrivals the time is
    n mu / M with standard deviation mu cv sqrt(n) / M, and a bias of (1 - cv^2) / 2 arrivals a process."""
    concurrency, buffer, count = 6, 3, 300
    arrivals, cv = buffer * count, math.sqrt(math.exp(JITTER**2) - 1)
    strategy = lookup(Strategy, "fedbuff")(local=ONE_STEP)
    pace = Buffered(concurrency=concurrency, buffer=buffer)
    rounds = rounds_of(strategy, jumpers([[0.0, 0.0]] * 30), count, fleet=Fleet(latency=ITERATED), pace=pace)
    assert all(len(r.received.arrivals) == buffer for r in rounds)
    expected = arrivals / concurrency
    assert abs(rounds[-1].time - expected) < (4 * cv * math.sqrt(arrivals) + concurrency * abs(1 - cv**2) / 2) / concurrency
    staleness = torch.cat([r.received.arrivals.staleness for r in rounds[50:]]).double().mean()
    assert 0.7 < staleness / (concurrency / buffer) < 1.3  # M / K server updates happen while a job runs


def test_a_deadline_is_kept_and_late_updates_come_in_stale():
    slow = Latency(delay=classes((3, 1.0), (1, 4.5)))
    strategy = lookup(Strategy, "fedavg")(local=ONE_STEP)
    rounds = rounds_of(strategy, jumpers([[0.0, 0.0]] * 8), 9, fleet=Fleet(latency=slow), pace=Deadline(seconds=2.0))
    assert [r.time for r in rounds] == [
        2.0,
        4.0,
        5.0,
        7.0,
        9.0,
        10.0,
        12.0,
        14.0,
        15.0,
    ]  # early where all are back
    assert [len(r.received.arrivals) for r in rounds] == [6, 6, 8, 6, 6, 8, 6, 6, 8]
    assert rounds[2].received.arrivals.staleness.sort().values.tolist() == [0] * 6 + [2] * 2
    assert rounds[2].received.arrivals.version.sort().values.tolist() == [0] * 2 + [2] * 6


def test_over_selection_takes_the_first_and_a_timeout_ends_a_round():
    delays = Latency(delay=classes(*((1, float(v)) for v in range(1, 7))))
    strategy, toy = lookup(Strategy, "fedavg")(local=ONE_STEP), jumpers([[0.0, 0.0]] * 6)
    first = rounds_of(strategy, toy, 1, fleet=Fleet(latency=delays), pace=Sync(cohort=4, over_selection=0.5))[0]
    assert (first.time, len(first.received.arrivals), len(first.received.lost)) == (4.0, 4, 2)
    assert set(first.received.lost.values()) == {"not back in time"}
    first = rounds_of(strategy, toy, 1, fleet=Fleet(latency=delays), pace=Sync(timeout=2.5))[0]
    assert (first.time, len(first.received.arrivals), len(first.received.lost)) == (2.5, 2, 4)
    nobody = rounds_of(strategy, toy, 2, fleet=Fleet(latency=delays), pace=Sync(timeout=0.5))
    assert [(r.time, r.received.arrivals, len(r.received.lost)) for r in nobody] == [(0.5, None, 6), (1.0, None, 6)]


def test_fully_asynchronous_rounds_come_one_by_one():
    delays = Latency(delay=classes(*((1, v) for v in (1.0, 1.5, 10.0))))
    strategy, toy = lookup(Strategy, "fedasync")(local=ONE_STEP), jumpers([[0.0, 0.0]] * 3)
    rounds = rounds_of(strategy, toy, 20, fleet=Fleet(latency=delays), pace=Buffered(concurrency=3, buffer=1))
    assert [r.time for r in rounds[:6]] == [1.0, 1.5, 2.0, 3.0, 3.0, 4.0]
    stale = {int(r.received.arrivals.staleness) for r in rounds}
    assert max(stale) == 15  # the slowest began at version 0; by then the others had come in nine and six times


# --- devices ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spread", "quantile"),
    [
        (lookup(Spread, "lognormal")(median=2.0, sigma=0.5), lambda q: 2.0 * lognorm(s=0.5).ppf(q)),
        (lookup(Spread, "pareto")(least=2.0, shape=1.5), lambda q: 2.0 * (1 - q) ** (-1 / 1.5)),
    ],
)
def test_devices_are_spread_as_said(spread, quantile):
    n = 20_000
    drawn = spread.draw(n, 3, "x")
    for q in (0.1, 0.5, 0.9, 0.99):
        share = (drawn <= quantile(q)).mean()
        assert abs(share - q) < 4 * math.sqrt(q * (1 - q) / n)


def test_classes_have_their_shares():
    values = classes((0.5, 1.0), (0.3, 2.0), (0.2, 3.0)).draw(10, 1, "")
    assert sorted(values.tolist()) == [1.0] * 5 + [2.0] * 3 + [3.0] * 2


def test_slow_devices_hold_the_rare_class():
    labels = np.array([[9, 1], [1, 9], [5, 5], [0, 10], [10, 0]])
    latency = Latency(compute=lookup(Spread, "lognormal")(median=1.0), down=lookup(Spread, "lognormal")(median=1.0), slow_labels=(1,))
    devices = latency.draw(5, labels, 4)
    order = [4, 0, 2, 1, 3]  # by the share of class 1
    assert (np.diff(devices.compute[order]) > 0).all()
    assert (np.diff(devices.down[order]) < 0).all()
    loose = Latency(compute=lookup(Spread, "lognormal")(median=1.0), slow_labels=(1,), correlation=0.0).draw(5, labels, 4)
    assert sorted(loose.compute) == sorted(devices.compute)
    assert (np.diff(loose.compute[order]) < 0).any()


def test_recorded_devices_are_read_and_faults_of_the_file_are_named(tmp_path):
    file = tmp_path / "speed.csv"
    file.write_text("client,value\n1,0.5\n0,2\n")
    assert lookup(Spread, "recorded")(str(file)).draw(2, 0, "fleet.latency.compute").tolist() == [2.0, 0.5]
    for text, fault in [
        ("client,value\n0,1\n", "client 1 has no row"),
        ("client,value\n0,1\n1,2\n1,3\n", "more than one row"),
        ("client,value\n0,fast\n", "line 2: 'value' is 'fast'"),
        ("client,value\n0,-1\n", "line 2: 'value' is -1.0"),
        ("client\n0\n", "the header lacks value"),
    ]:
        file.write_text(text)
        with pytest.raises(ScenarioError, match=fault) as error:
            lookup(Spread, "recorded")(str(file)).draw(2, 0, "fleet.latency.compute")
        assert error.value.field.startswith("fleet.latency.compute")


def test_two_strategies_meet_the_same_devices():
    toy = jumpers([[1.0, 2.0]] * 12)
    fleet = Fleet(latency=Latency(compute=lookup(Spread, "pareto")(least=1.0), jitter=0.5))
    times = [
        [r.time for r in rounds_of(lookup(Strategy, name)(local=ONE_STEP), toy, 5, fleet=fleet, pace=Sync(cohort=4))]
        for name in ("fedavg", "fedadam")
    ]
    assert times[0] == times[1]
    assert len(set(times[0])) == 5


def test_jitter_has_a_mean_of_one():
    n = 20_000
    devices = Latency(compute=lookup(Spread, "constant")(1.0), jitter=0.5).draw(n, None, 1)
    training = devices.phases(np.arange(n), np.ones(n), 0, 0, rng.fold_each(5, np.arange(n)))[:, 2]
    assert abs(training.mean() - 1) < 4 * math.sqrt((math.exp(0.25) - 1) / n)
    assert abs(np.log(training).std() - 0.5) < 4 * 0.5 / math.sqrt(2 * n)


def test_a_population_without_labels_has_no_slow_labels():
    with pytest.raises(ScenarioError, match="class labels"):
        Latency(slow_labels=(1,)).draw(3, None, 0)
    with pytest.raises(ScenarioError, match="no class 7"):
        Latency(slow_labels=(7,)).draw(3, np.ones((3, 2), dtype=int), 0)
    with pytest.raises(ScenarioError, match="0 bytes a second"):
        Latency(up=lookup(Spread, "constant")(0.0)).draw(3, None, 0)


def test_the_clock_goes_on_in_order_whatever_is_asked():
    clock = Clock()
    for start in range(5):
        clock = clock.announce(events(*(clock.now + np.array([0.3, 0.1, 0.2]) + start % 2)))
        before, clock = clock.now, clock.wait(2, math.inf, False)
        assert clock.now >= before
        past, clock = clock.taken()
        assert (np.diff(past.due) >= 0).all()
    assert list(itertools.pairwise(clock.ahead.due)) == sorted(itertools.pairwise(clock.ahead.due))
