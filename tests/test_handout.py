"""Items go to workers in order, one that is busy may have its next one, and what a worker had that failed goes to others."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.sim.handout import Handout


def taken(handout: Handout) -> list:
    return list(iter(handout.take, None))


def placed(tasks) -> list[tuple[int, int]]:
    return [(task.item, task.worker) for task in tasks]


def test_one_by_one_a_worker_that_is_done_gets_the_next():
    handout = Handout(4, 2, ahead=False)
    first, second = taken(handout)
    assert placed([first, second]) == [(0, 0), (1, 1)]
    handout.end(second)
    assert placed(taken(handout)) == [(2, 1)]


def test_ahead_of_time_who_has_the_shortest_item_gets_the_next():
    handout = Handout(5, 2, ahead=True)
    tasks = taken(handout)
    assert placed(tasks) == [(0, 0), (1, 1), (2, 1), (3, 0)]
    assert [math.isfinite(task.since) for task in tasks] == [True, True, False, False]
    assert handout.end(tasks[1]) >= 0
    assert handout.first(1) is tasks[2]
    assert math.isfinite(tasks[2].since)  # its time begins now
    assert placed(taken(handout)) == [(4, 1)]


@pytest.mark.parametrize("again", [True, False])
def test_what_a_failed_worker_had_goes_first_and_only_the_failed_item_is_blamed(again):
    handout = Handout(5, 2, ahead=True)
    tasks = taken(handout)
    back = handout.take_back(tasks[1], again)
    assert [task.item for task in back] == [1, 2] if again else [2]
    handed = taken(handout)
    assert [(task.item, task.failures) for task in handed] == ([(1, 1), (2, 0)] if again else [(2, 0), (4, 0)])
    assert {task.worker for task in handed} == {1}


@settings(derandomize=True, deadline=None, max_examples=200, database=None)
@given(st.integers(0, 12), st.integers(1, 4), st.booleans(), st.data())
def test_whatever_fails_every_item_ends_once_and_nobody_has_more_than_two(items, workers, ahead, data):
    handout, ended, running = Handout(items, workers, ahead), [], []
    for _ in itertools.count():
        running += taken(handout)
        per_worker = [sum(task.worker == worker for task in running) for worker in range(workers)]
        assert max(per_worker) <= (2 if ahead else 1)
        if not running:
            break
        task = handout.first(data.draw(st.sampled_from(running)).worker)
        if task.failures < 2 and data.draw(st.booleans()):
            handout.take_back(task, again=True)
            running = [other for other in running if other.worker != task.worker]
        else:
            handout.end(task)
            running.remove(task)
            ended.append(task.item)
    assert sorted(ended) == list(range(items))
