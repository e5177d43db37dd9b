"""Which worker has which item: the bookkeeping behind a pool, without the workers."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass


@dataclass(eq=False)
class Task:
    """An item that a worker has.

    Attributes:
        item: which.
        failures: how often it has failed before.
        worker: who has it.
        since: when the worker began with it (monotonic seconds); infinity while another is before it.
    """

    item: int
    failures: int
    worker: int
    since: float = math.inf


class Handout:
    """Hands out items in their order; one that is taken back goes first.

    Args:
        items: how many there are, the longest first.
        workers: who takes them.
        ahead: let a worker have its next item at hand while it is busy. Who got an item last, and so the shortest, gets another first.
    """

    def __init__(self, items: int, workers: int, ahead: bool):
        self._waiting = deque((item, 0) for item in range(items))
        turns = range(workers)
        self._places = deque([*turns, *reversed(turns)] if ahead else turns)
        self._lines = [deque[Task]() for _ in turns]

    def take(self) -> Task | None:
        """The next item and who gets it; None where no item waits, or nobody has room."""
        if not self._waiting or not self._places:
            return None
        task = Task(*self._waiting.popleft(), self._places.popleft())
        self._lines[task.worker].append(task)
        self._begin(task.worker)
        return task

    def end(self, task: Task) -> float:
        """A worker has done with a task: what it took, in seconds."""
        self._lines[task.worker].remove(task)
        self._places.append(task.worker)
        self._begin(task.worker)
        return time.monotonic() - task.since

    def first(self, worker: int) -> Task:
        """What a worker is busy with."""
        return self._lines[worker][0]

    def take_back(self, failed: Task, again: bool) -> list[Task]:
        """Everything that the worker of a failed task had, to be handed out anew: the failed one only `again`, the others anyway."""
        line = self._lines[failed.worker]
        back = [task for task in line if again or task is not failed]
        self._waiting.extendleft((task.item, task.failures + (task is failed)) for task in reversed(back))
        self._places.extend([failed.worker] * len(line))
        line.clear()
        return back

    def _begin(self, worker: int) -> None:
        line = self._lines[worker]
        if line and line[0].since == math.inf:
            line[0].since = time.monotonic()
