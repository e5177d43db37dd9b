"""From an update to data that give it: a case that the gradient determines, replays by hand, and what must not change an answer."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from toy import close, problem_of

from fedsim import rng
from fedsim.errors import FedsimError
from fedsim.inversion import Guess, Search, Sent, distance, draw, invert, largest, replay, sent_by
from fedsim.local import Adam, Sgd
from fedsim.params import Params
from fedsim.problem import Classification, Inputs, MultiLabel, Network, NextToken, Problem, Regression
from fedsim.tree import concat, rows, tree_leaves
from fedsim.types import Batch

STEP = Sgd(lr=0.5, steps=1, batch_size=None)


def softmax_problem(dtype: torch.dtype = torch.float64, inputs: int = 4, classes: int = 3) -> tuple[Problem, Params]:
    """A linear softmax classifier of inputs in [-1, 1], at zero."""
    module = nn.Linear(inputs, classes, dtype=dtype)
    like = torch.ones((), dtype=dtype)
    problem = Problem(Network(module), Classification(classes), torch.ones(5), inputs=Inputs((inputs,), -like, like))
    return problem, Params({name: torch.zeros_like(v) for name, v in module.named_parameters()})


def stacked(w: Params, count: int) -> Params:
    return w.map(lambda v: v.expand(count, *v.shape))


def random_updates(count: int, dtype: torch.dtype = torch.float64) -> tuple[Problem, Sent]:
    """Updates of clients with 2, 1, 3, 2 ... steps of their own, from models of their own."""
    problem, w = softmax_problem(dtype)
    generator = torch.Generator().manual_seed(3)
    started, data = (
        w.map(lambda v: 0.3 * torch.randn(count, *v.shape, generator=generator, dtype=dtype)),
        draw(problem, w, 6, keys(count, 8)),
    )
    sent = Sent(started, torch.zeros(count), torch.tensor([2, 1, 3, 2, 1])[:count], started)
    return problem, replace(sent, change=replay(problem, STEP, sent, data))


def keys(count: int, seed: int = 5) -> rng.Keys:
    return rng.fold_each(seed, torch.arange(count).numpy())


@pytest.mark.parametrize(("dtype", "norm"), [(torch.float32, "l2"), (torch.float64, "l1")])
def test_one_step_on_one_example_tells_all_of_it(dtype, norm):
    """At w = 0 all classes have probability 1/3, so with targets q the change is db = lr (q - 1/3) and dW = db x^T: x = dW_k / db_k.

    The rate ends at 0.3e-3 and an entry errs by a few such steps: 5e-3 is more than ten.
    """
    x, q = torch.tensor([0.5, -0.25, 0.8, -0.9], dtype=dtype), torch.tensor([0.7, 0.2, 0.1], dtype=dtype)
    problem, w = softmax_problem(dtype)
    db = 0.5 * (q - 1 / 3)
    change = Params({"weight": torch.outer(db, x)[None], "bias": db[None]})
    sent = sent_by(STEP, stacked(w, 1), torch.zeros(1), torch.ones(1), change)
    found = invert(problem, STEP, Search(240, lr=0.3, norm=norm), sent, draw(problem, w, 1, keys(1)))
    close(found.guess.x[0, 0], x, within=5e-3)
    close(found.guess.y[0, 0].softmax(0), q, within=5e-3)
    assert found.guess.x.dtype == dtype
    assert found.lowest < 5e-3
    assert found.iterations == 240


def test_a_replay_by_hand_with_a_schedule_and_steps_of_each_ones_own():
    """Half squared error, data (1, 0) -> 2 and (0, 1) -> 4: each step adds lr / 2 (target - w).

    From (0, 0), lr = 1: (1, 2) after one step, (1.5, 3) after two. From (2, 4) nothing moves. From (4, 0), version 1, lr = 1/2, one step:
    (-0.5, 1).
    """
    toy = problem_of([[[1, 0]]], [[1]])
    program = replace(STEP, lr=1.0, schedule=Halving())
    started = Params({"weight": torch.tensor([[[0.0, 0]], [[0, 0]], [[2, 4]], [[4, 0]]], dtype=torch.float64)})
    guess = Guess(torch.eye(2).double().expand(4, 2, 2), torch.tensor([[2.0], [4]]).double().expand(4, 2, 1))
    sent = Sent(started, torch.tensor([0, 0, 0, 1]), torch.tensor([1, 2, 2, 1]), started)
    close(replay(toy.problem, program, sent, guess)["weight"][:, 0], [[1, 2], [1.5, 3], [0, 0], [-0.5, 1]])


class Halving:
    """A rate that halves with every version."""

    def factor(self, version: torch.Tensor) -> torch.Tensor:
        return 0.5**version


def test_a_replay_is_what_the_client_does():
    """On a client's own data and hard labels as targets, the server's replay is the program's own three steps."""
    problem, w = softmax_problem()
    x, y = torch.randn(7, 4).double(), torch.tensor([0, 2, 1, 1, 0, 2, 2])
    program = Sgd(lr=0.3, momentum=0.5, weight_decay=0.1, steps=3, batch_size=None)
    carry = program.begin(problem, w, {})
    for _ in range(3):
        carry = program.step(problem, carry, Batch(x, y), {}, "train")
    sent = sent_by(program, stacked(w, 1), torch.zeros(1), torch.tensor([7.0]), stacked(w, 1))
    certain = 100 * torch.nn.functional.one_hot(y).double()
    ours = replay(problem, program, sent, Guess(x[None], certain[None]))
    torch.testing.assert_close(dict(rows(ours, 0)), dict(carry.w - w), rtol=0, atol=1e-12)


def test_many_at_once_equal_one_at_a_time_also_where_some_end_early():
    """The tolerance is between what the searches reach, so that they leave the stack one after the other."""
    problem, sent = random_updates(5)
    first = draw(problem, rows(sent.started, 0), 3, keys(5))
    search = Search(40, lr=0.1, tolerance=0.4)
    together = invert(problem, STEP, search, sent, first)
    single = concat([invert(problem, STEP, search, rows(sent, slice(i, i + 1)), rows(first, slice(i, i + 1))) for i in range(5)])
    assert len(set(together.iterations.tolist())) > 1
    assert together.iterations.min() < 40
    for a, b in zip(tree_leaves(together), tree_leaves(single), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_what_is_found_is_the_best_that_was_met_and_never_worse_than_the_start():
    problem, sent = random_updates(3)
    first = draw(problem, rows(sent.started, 0), 6, keys(3))
    found = invert(problem, STEP, Search(25, lr=1.0), sent, first)
    again = replay(problem, STEP, sent, found.guess) - sent.change
    close(again.row_norms() / sent.change.row_norms(), found.lowest, within=1e-12)
    at_first = invert(problem, STEP, Search(1, lr=1.0), sent, first)
    assert (found.lowest < at_first.lowest).all()
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(at_first.guess), tree_leaves(first), strict=True))


def test_the_largest_entries_of_each_row():
    change = Params({"a": torch.tensor([[3.0, -4.0], [0.1, 0.0]]), "b": torch.tensor([[[1.0], [-5.0], [0.5]], [[0.3], [0.2], [-0.4]]])})
    mask = largest(change, 0.4)  # two of five
    assert mask["a"].tolist() == [[0, 1], [0, 0]]
    assert mask["b"].tolist() == [[[0], [1], [0]], [[1], [0], [1]]]
    assert largest(change, 0.41).flat().sum(1).tolist() == [3, 3]
    assert largest(change, 1.0).flat().sum(1).tolist() == [5, 5]
    assert largest(change, 1e-9).flat().sum(1).tolist() == [1, 1]


def test_entries_that_are_not_chosen_do_not_matter():
    """All but the largest 20 % of entries are set to zero: nothing changes, to the bit. With all entries matched, it does."""
    problem, sent = random_updates(3)
    first = draw(problem, rows(sent.started, 0), 3, keys(3))
    other = replace(sent, change=sent.change * largest(sent.change, 0.2))
    for keep, same in ((0.2, True), (1.0, False)):
        a, b = (invert(problem, STEP, Search(20, lr=0.1, keep=keep), each, first) for each in (sent, other))
        assert torch.equal(a.guess.x, b.guess.x) == same
        assert torch.equal(a.lowest, b.lowest) == same


def test_inputs_stay_within_what_they_can_be():
    problem, sent = random_updates(2)
    narrow = replace(problem, inputs=Inputs((4,), torch.tensor(-0.25), torch.tensor(0.5)))
    first = draw(narrow, rows(sent.started, 0), 3, keys(2))
    found = invert(narrow, STEP, Search(20, lr=1.0), sent, first)
    for guess in (first, found.guess):
        assert guess.x.min() >= -0.25
        assert guess.x.max() <= 0.5


def test_a_first_guess_depends_on_its_own_key_alone():
    problem, w = softmax_problem()
    all_, some = draw(problem, w, 3, keys(4)), draw(problem, w, 3, keys(4)[[2]])
    assert torch.equal(all_.x[[2]], some.x)
    assert torch.equal(all_.y[[2]], some.y)
    assert not torch.equal(all_.x[0], all_.x[1])


def test_a_search_that_meets_a_nan_says_so_and_leaves_the_others_alone():
    problem, sent = random_updates(3)
    broken = replace(sent, started=sent.started.map(lambda v: v.index_fill(0, torch.tensor([1]), math.nan)))
    first = draw(problem, rows(sent.started, 0), 3, keys(3))
    a, b = (invert(problem, STEP, Search(10, lr=0.1), each, first) for each in (sent, broken))
    assert b.lowest[1] == math.inf
    assert torch.equal(a.guess.x[[0, 2]], b.guess.x[[0, 2]])


def test_other_programs_and_tasks():
    """Adam on a smooth model, a regression and a multi-label task: the search gets nearer."""
    for task in (Classification(3), Regression(3), MultiLabel(3)):
        problem, w = softmax_problem()
        problem = replace(problem, task=task)
        started = w.map(lambda v: 0.3 * torch.ones(2, *v.shape).double())
        program = Adam(lr=0.1, steps=2, batch_size=None)
        sent = Sent(started, torch.zeros(2), torch.tensor([2, 2]), started)
        sent = replace(sent, change=replay(problem, program, sent, draw(problem, w, 4, keys(2, 9))))
        first = draw(problem, w, 4, keys(2))
        before, after = (invert(problem, program, Search(k, lr=0.1), sent, first).lowest for k in (1, 30))
        assert (after < before).all(), task


def test_what_an_input_can_be():
    x = torch.tensor([[[[0.0, 1.0]], [[-2.0, 3.0]]], [[[-1.0, 0.5]], [[5.0, 0.0]]]])  # [2, 2 channels, 1, 2]
    inputs = Inputs.of(x)
    assert inputs.shape == (2, 1, 2)
    assert inputs.low.flatten().tolist() == [-1, -2]
    assert inputs.high.flatten().tolist() == [1, 5]
    assert inputs.low.shape == (2, 1, 1)
    table = Inputs.of(x.flatten(1))
    assert (table.shape, float(table.low), float(table.high)) == ((4,), -2, 5)
    assert Inputs.of(torch.tensor([[1, 2]])) is None


def test_tokens_cannot_be_reconstructed():
    problem, w = softmax_problem()
    with pytest.raises(FedsimError, match="cannot be reconstructed"):
        draw(replace(problem, inputs=None), w, 3, keys(1))
    with pytest.raises(FedsimError, match="nexttoken has no targets between its labels"):
        NextToken(3).targets(torch.zeros(1, 3))


def test_distance_is_a_sum_over_all_names():
    a, b = (Params({"p": torch.tensor([[1.0, -1.0], [0.0, 2.0]]), "q": torch.tensor([[z], [z]])}) for z in (0.0, 3.0))
    close(distance(a, b * 0.0), [2, 2])
    close(distance(a, b), [3, 3])
