"""Unstale: what is inverted, what an inner strategy then sees, the switch back by hand, and that nothing happens where nothing is stale."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from test_inversion import softmax_problem
from toy import close, jumpers, path, rounds

from fedsim import tree
from fedsim.errors import FedsimError
from fedsim.inversion import Guess
from fedsim.local import Sgd
from fedsim.params import Params
from fedsim.problem import Inputs
from fedsim.strategy import LocalProgram, ModelState, Strategy
from fedsim.tree import record, rows
from fedsim.types import Arrivals, Updates
from strategies.compensation import DcAsgd
from strategies.fedavg import FedAvg
from strategies.fedprox import FedProx
from strategies.scaffold import Scaffold
from strategies.unstale import Kept, Unstale

STEP = Sgd(lr=0.5, steps=1, batch_size=None)
JUMP = Sgd(lr=2.0, steps=1, batch_size=None)  # of two-dimensional jumpers
TARGETS = [[1, 0], [0, 2], [3, 3]]


@record
class Seen:
    """A model that never moves, and the last updates."""

    w: Params
    updates: Any


@dataclass(frozen=True)
class Watch(Strategy):
    """Looks at updates and does nothing."""

    recalls = True
    local: LocalProgram = STEP

    def init(self, problem, w):
        return Seen(w, None)

    def server(self, problem, state, updates, key):
        return Seen(state.w, updates)

    def report(self, problem, before, state, arrivals):
        return {"weight": 1.0 / (1 + arrivals.staleness)}


def arrivals(ids, staleness, version=7) -> Arrivals:
    ids, staleness = torch.tensor(ids), torch.tensor(staleness)
    return Arrivals(ids, torch.ones(len(ids)), version - staleness, staleness)


def one_example(w: Params, x: torch.Tensor, q: torch.Tensor, lr: float = 0.5) -> Params:
    """The change that one step on one example with targets q makes, written out: dW = lr (q - p) x^T, db = lr (q - p)."""
    db = lr * (q - (w["weight"] @ x + w["bias"]).softmax(0))
    return Params({"weight": torch.outer(db, x), "bias": db})


def late(count: int = 3, staleness=(0, 4, 0)) -> tuple[Any, Params, Params, Updates, torch.Tensor, torch.Tensor]:
    """Three clients of one example each at version 7; the middle one began four versions ago, with another model."""
    problem, old = softmax_problem()
    generator = torch.Generator().manual_seed(1)
    w = old.map(lambda v: 0.5 * torch.randn(v.shape, generator=generator, dtype=v.dtype))
    x = torch.tensor([[0.5, -0.25, 0.8, -0.9], [-0.7, 0.6, 0.1, 0.4], [0.3, -0.2, 0.9, -0.8]]).double()[:count]
    q = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.6, 0.3, 0.1]]).double()[:count]
    began = [old if late else w for late in staleness]
    changes = tree.stack([one_example(*each) for each in zip(began, x, q, strict=True)])
    metrics = {"loss": (torch.arange(count).double(), torch.ones(count).double())}
    return problem.at(7), old, w, Updates(arrivals(list(range(count)), list(staleness)), changes, tree.stack(began), metrics), x, q


def unstale(inner: Strategy | None = None, **fields: Any) -> Unstale:
    return Unstale(inner or Watch(), **{"examples": 1, "iterations": 240, "lr": 0.3, "tolerance": 0.0, "unique": None} | fields)


@pytest.fixture(scope="module")
def renewed():
    """The state of `unstale` over `Watch` after a round in which the middle client of three is stale."""
    problem, _, w, updates, x, q = late()
    strategy = unstale()
    state = replace(strategy.init(problem, w), inner=Seen(w, None))
    return strategy, problem, state, strategy.server(problem, state, updates, 9), updates, (w, x, q)


def test_a_stale_update_becomes_what_the_client_would_do_now(renewed):
    """One example and one step: the update tells both, so what comes out is the true update at w, to the search's 5e-3."""
    _, _, _, after, updates, (w, x, q) = renewed
    seen = after.inner.updates
    truth = one_example(w, x[1], q[1])
    for name in truth:
        close(seen.payload[name][1], truth[name], within=5e-3)
        assert torch.equal(seen.payload[name][[0, 2]], updates.payload[name][[0, 2]])
        assert (updates.payload[name][1] - truth[name]).abs().max() > 0.04  # eight times that
        assert torch.equal(seen.started[name][1], w[name])
    assert seen.metrics == updates.metrics
    assert seen.arrivals.staleness.tolist() == [0, 0, 0]
    assert seen.arrivals.version.tolist() == [7, 7, 7]
    assert after.told["inverted"] == 1
    assert after.told["mismatch"] < 5e-3
    assert after.kept.written.tolist() == [False, True, False, False, False]


def test_the_report_is_of_what_the_inner_strategy_saw(renewed):
    strategy, problem, before, after, updates, _ = renewed
    report = strategy.report(problem, before, after, updates.arrivals)
    assert report["weight"].tolist() == [1, 1, 1]  # 0.2 without the inversion
    assert report["gamma"] == 1


def test_a_resumed_state_goes_on_to_the_same_bits(renewed):
    strategy, problem, _, after, updates, _ = renewed
    problem, again, short = problem.at(8), tree.load(*tree.dump(after)), replace(strategy, iterations=5)
    a, b = (short.server(problem, state, updates, 10) for state in (after, again))
    (xs, outline), (ys, other) = tree.dump(a), tree.dump(b)
    assert outline == other
    assert all(torch.equal(xs[name], ys[name]) for name in xs)


def test_a_warm_search_begins_where_the_last_one_ended(renewed):
    """With one iteration a search ends where it began."""
    strategy, problem, _, after, updates, _ = renewed
    warm, cold = (replace(strategy, iterations=1, warm=w).server(problem, after, updates, 10) for w in (True, False))
    kept = after.kept.get(torch.tensor([1]))
    assert torch.equal(warm.kept.get(torch.tensor([1])).guess.x, kept.guess.x)
    assert warm.told["mismatch"] == pytest.approx(after.told["mismatch"], rel=1e-12)
    assert cold.told["mismatch"] > 10 * warm.told["mismatch"]


def test_what_explains_nothing_of_an_update_leaves_it_alone(renewed):
    """No single step away from the start gives a thousandth of the change: the mismatch is far above 1. The same goes for a NaN."""
    strategy, problem, before, _, updates, _ = renewed
    small = replace(updates, payload=updates.payload * 1e-3)
    broken = replace(updates, started=updates.started.map(lambda v: v.index_fill(0, torch.tensor([1]), torch.nan)))
    for each in (small, broken):
        after = replace(strategy, iterations=1).server(problem, before, each, 9)
        assert after.told["failed"] == after.told["inverted"] == 1
        assert torch.equal(after.inner.updates.payload["weight"], each.payload["weight"])
        assert after.inner.updates.arrivals.staleness.tolist() == [0, 4, 0]
        assert not after.kept.written.any()


def test_two_stale_clients_are_renewed_as_each_alone():
    problem, _, w, updates, _, _ = late(staleness=(4, 4, 0))
    strategy = unstale(iterations=8, lr=0.1)
    state = replace(strategy.init(problem, w), inner=Seen(w, None))
    both = strategy.server(problem, state, updates, 9).inner.updates.payload
    for i in (0, 1):
        alone = strategy.server(problem, state, updates.take(torch.tensor([i, 2])), 9).inner.updates.payload
        for name in w:
            torch.testing.assert_close(both[name][i], alone[name][0], rtol=1e-9, atol=1e-11)


def test_a_client_that_arrives_twice_is_kept_once():
    problem, _, w, updates, _, _ = late(staleness=(4, 4, 0))
    strategy = unstale(iterations=8)
    twice = replace(updates, arrivals=replace(updates.arrivals, ids=torch.tensor([1, 1, 2])))
    after = strategy.server(problem, replace(strategy.init(problem, w), inner=Seen(w, None)), twice, 9)
    assert after.kept.written.tolist() == [False, True, False, False, False]
    assert torch.equal(rows(after.kept.get(torch.tensor([1])).change, 0)["bias"], updates.payload["bias"][1])


def test_a_renewed_update_is_one_of_the_program_that_is_really_run():
    """FedProx gives its clients a proximal term, which the strategy's own `local` does not have."""
    problem, _, w, updates, _, _ = late()
    longer = replace(STEP, steps=3)
    models = []
    for inner in (FedProx(longer, mu=5.0), FedAvg(longer)):
        strategy = unstale(inner, iterations=5)
        models.append(strategy.server(problem, replace(strategy.init(problem, w), inner=ModelState(w)), updates, 9).w)
    assert not torch.equal(models[0]["weight"], models[1]["weight"])


def test_without_stale_arrivals_it_is_its_inner_strategy_to_the_bit():
    toy = with_inputs(jumpers(TARGETS))
    inner = FedAvg(JUMP, weights="samples", server_lr=0.5)
    for wrapped in (Unstale(inner), DcAsgd(inner), Unstale(DcAsgd(inner))):
        assert (path(wrapped, toy, 4) == path(inner, toy, 4)).all()
    last = rounds(Unstale(inner), toy, 2)[-1]
    assert (last.told["inverted"], last.kept.written.any(), last.switched) == (0, False, -1)


def with_inputs(toy):
    return toy._replace(problem=replace(toy.problem, inputs=Inputs.of(torch.tensor([[-9.0, 9.0]]).double())))


def flat_updates(vectors, staleness) -> Updates:
    change = Params({"weight": torch.tensor(vectors).double()[:, None]})
    return Updates(arrivals(list(range(len(vectors))), staleness), change, change)


def test_what_is_unlike_the_fresh_ones():
    """Fresh: 0, 10 and 40 degrees; nearest distances 1 - cos of 10, 10 and 30 degrees; the median is that of 10. Stale: 48 and 55 degrees,
    8 and 15 degrees from the nearest, so the second is unlike; by the largest distance (30 degrees) neither is; by the least, again one.
    """
    degrees = torch.tensor([0.0, 10, 40, 48, 55]).double().deg2rad()
    vectors = torch.stack([degrees.cos(), degrees.sin()], 1) * torch.tensor([1, 2, 3, 4, 5])[:, None]
    updates = flat_updates(vectors.tolist(), [0, 0, 0, 2, 3])
    for quantile, expected in ((0.5, [4]), (1.0, []), (0.0, [4]), (None, [3, 4])):
        assert Unstale(FedAvg(), unique=quantile).unlike(updates).nonzero().flatten().tolist() == expected
    assert Unstale(FedAvg(), unique=None, fresh=2).unlike(updates).nonzero().flatten().tolist() == [4]
    assert Unstale(FedAvg()).unlike(updates.take(torch.tensor([0, 3, 4]))).tolist() == [False, True, True]  # one fresh: nothing to go by
    assert Unstale(FedAvg()).unlike(flat_updates([[0, 0], [1, 0], [0, 0]], [0, 0, 1])).tolist() == [False, False, False]


@pytest.mark.parametrize(
    ("now", "switched", "fields", "gamma"),
    [
        (5, -1, {"until": None}, 1),
        (5, 5, {"window": 4}, 1),
        (6, 5, {"window": 4}, 0.75),
        (8, 5, {"window": 4}, 0.25),
        (9, 5, {"window": 4}, 0),
        (99, 5, {"window": 4}, 0),
        (5, 5, {"window": 0}, 0),
        (4, 5, {"window": 0}, 1),
        (20, -1, {"until": 20, "window": 4}, 1),
        (22, -1, {"until": 20, "window": 4}, 0.5),
        (22, 21, {"until": 20, "window": 4}, 0.5),  # the cap came first
        (22, 19, {"until": 20, "window": 4}, 0.25),
        (0, -1, {"until": 0, "window": 0}, 0),
    ],
)
def test_how_much_of_an_estimate_is_used(now, switched, fields, gamma):
    assert Unstale(FedAvg(), **fields).gamma(now, switched) == gamma


@dataclass(frozen=True)
class Story:
    """What the server keeps of client 0 (a jumper: data that lead to `data`, an old change), and what its true update turns out to be.

    It began at v = (1, 1) and its change is (2, 0). From v, kept data make (data - v): E1 = |data - v - change|_1, E2 = |old - change|_1.
    """

    data: tuple[float, float]
    old: tuple[float, float]
    e1: float
    e2: float


@pytest.mark.parametrize(
    ("story", "margin", "switches"),
    [
        (Story((3, 1), (2, 1), 0, 1), 0.9, False),  # the estimate is right
        (Story((3, 3), (2, 1), 2, 1), 0.9, True),  # 1 < 0.9 * 2
        (Story((3, 3), (2, 1), 2, 1), 0.5, False),  # 1 < 0.5 * 2 is not true
        (Story((2, 1), (2, 1), 1, 1), 0.9, False),  # neither is nearer
        (Story((0, 0), (2, 0), 4, 0), 0.9, True),  # the old change is still right
    ],
)
def test_the_switch_back_by_hand(story, margin, switches):
    toy = with_inputs(jumpers(TARGETS))
    strategy = Unstale(FedAvg(JUMP), examples=2, margin=margin, window=4)
    state = strategy.init(toy.problem, toy.w)
    data = Guess(torch.eye(2).double()[None], torch.tensor(story.data).double()[None, :, None])
    old = Params({"weight": torch.tensor([[story.old]]).double()})
    state = replace(state, kept=state.kept.put(torch.tensor([0]), Kept(data, old)))
    change, began = (Params({"weight": torch.tensor([[pair]]).double()}) for pair in ([2, 0], [1, 1]))
    fresh = replace(Updates(arrivals([0], [0]), change, began), arrivals=replace(arrivals([0], [0]), n=torch.tensor([2.0])))
    after = strategy.server(toy.problem.at(7), state, fresh, 9)
    close([after.told["estimate_error"], after.told["direct_error"]], [story.e1, story.e2], within=1e-12)
    assert after.switched == (7 if switches else -1)
    assert after.told["gamma"] == 1
    # Once switched, always switched, with less and less of the estimate; nothing is compared when none of it is left.
    later = strategy.server(toy.problem.at(9), after, fresh, 9)
    assert (later.switched, later.told["gamma"]) == ((7, 0.5) if switches else (-1, 1))
    last = strategy.server(toy.problem.at(11), later, fresh, 9)
    assert last.told["gamma"] == (0 if switches else 1)
    assert ("estimate_error" in last.told) != switches


def test_a_blend_is_between_the_estimate_and_the_stale_update(renewed):
    strategy, problem, before, _, updates, _ = renewed
    short = replace(strategy, iterations=30, window=4)
    after, half = (short.server(problem, replace(before, switched=s), updates, 9) for s in (-1, 5))  # two of four rounds later
    assert (half.told["gamma"], half.told["failed"]) == (0.5, 0)
    for name, blended in half.inner.updates.payload.items():
        close(blended[1], (after.inner.updates.payload[name][1] + updates.payload[name][1]) / 2, within=1e-12)


def test_after_the_window_stale_updates_are_left_as_they_are():
    problem, _, w, updates, _, _ = late()
    for strategy in (unstale(until=3, window=4), unstale(until=7, window=0)):
        after = strategy.server(problem, replace(strategy.init(problem, w), inner=Seen(w, None)), updates, 9)
        assert after.inner.updates is updates
        assert after.told == {"gamma": 0.0, "inverted": 0.0}


def test_first_order_compensation_by_hand():
    """Delta = (1, -2), w - w_started = (0.5, 0.25), lam = 2: (1 - 2 * 1 * 0.5, -2 - 2 * 4 * 0.25) = (0, -4). The fresh row stays."""
    w = Params({"weight": torch.tensor([[1.0, 1.0]])})
    change = Params({"weight": torch.tensor([[[1.0, -2.0]], [[3.0, 3.0]]])})
    began = Params({"weight": torch.tensor([[[0.5, 0.75]], [[9.0, 9.0]]])})
    updates = Updates(arrivals([0, 1], [3, 0]), change, began)
    problem, _ = softmax_problem()
    after = DcAsgd(Watch(), lam=2.0).server(problem, Seen(w, None), updates, 9)
    assert after.updates.payload["weight"].tolist() == [[[0, -4]], [[3, 3]]]
    assert after.updates.arrivals.staleness.tolist() == [3, 0]
    plain = DcAsgd(Watch(), lam=0.0).server(problem, Seen(w, None), updates, 9)
    assert torch.equal(plain.updates.payload["weight"], change["weight"])


def test_what_cannot_be_wrapped():
    for wrapper in (Unstale, DcAsgd):
        with pytest.raises(ValueError, match="inner: scaffold sends its clients more than a model"):
            wrapper(Scaffold())
    with pytest.raises(ValueError, match="inner: TwoPasses passes over its data in more than one way"):
        Unstale(FedAvg(TwoPasses()))
    problem, w = softmax_problem()
    with pytest.raises(FedsimError, match="cannot be reconstructed"):
        Unstale(FedAvg()).init(replace(problem, inputs=None), w)


class TwoPasses(Sgd):
    """A program with two passes."""

    passes = ("one", "two")
