"""The virtual clock: what is under way, by the time at which it is due. Arrays, so that a thousand jobs cost what one does."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def _ints() -> Ints:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Events:
    """What will happen, sorted by time, then by when it was announced. `[E]` each.

    Attributes:
        due: virtual seconds since the run began.
        client: whom it is about.
        group: the job that it belongs to.
        fate: what happens: 0 = the update arrives, else an index into `fedsim.fleet.LOST`.
        copy: 0 for the first arrival of an update, 1 for a second one.
    """

    due: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    client: Ints = field(default_factory=_ints)
    group: Ints = field(default_factory=_ints)
    fate: Ints = field(default_factory=_ints)
    copy: Ints = field(default_factory=_ints)

    def __len__(self) -> int:
        return len(self.due)

    def take(self, index: Any) -> Events:
        """The chosen ones."""
        return Events(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def plus(self, other: Events) -> Events:
        """Both, those of `other` after those of the same time."""
        both = Events(**{f.name: np.concatenate([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)})
        return both.take(np.argsort(both.due, kind="stable"))

    def save(self) -> dict[str, torch.Tensor]:
        """As tensors, for a checkpoint."""
        return {f.name: torch.from_numpy(getattr(self, f.name)) for f in fields(self)}

    @staticmethod
    def load(saved: dict[str, torch.Tensor]) -> Events:
        """Inverse of `save`."""
        return Events(**{name: values.numpy() for name, values in saved.items()})


@dataclass(frozen=True)
class Clock:
    """The time, what is still to happen, and what has happened since somebody looked.

    Attributes:
        now: virtual seconds since the run began.
        ahead: what will happen.
        past: what happened and was not taken yet.
    """

    now: float = 0.0
    ahead: Events = field(default_factory=Events)
    past: Events = field(default_factory=Events)

    @property
    def ready(self) -> int:
        """How many updates have arrived and were not taken yet."""
        return int(((self.past.fate == 0) & (self.past.copy == 0)).sum())

    def announce(self, events: Events) -> Clock:
        """With more to happen."""
        return replace(self, ahead=self.ahead.plus(events))

    def wait(self, count: int | None, until: float, step: bool) -> Clock:
        """Let time pass until `count` updates are ready (None = all that are under way), or until time `until`.

        With `step`, stop as soon as anything happens. What happens at one instant happens together, but for updates beyond `count`.
        """
        due, arrives = self.ahead.due, (self.ahead.fate == 0) & (self.ahead.copy == 0)
        in_time = end = int(np.searchsorted(due, until, side="right"))
        if count is not None:
            missing = max(0, count - self.ready)
            end = min(end, int(np.searchsorted(arrives.cumsum(), missing)) + 1 if missing else 0)
        if step and end:
            end = min(end, int(np.searchsorted(due, due[0], side="right")))
        enough = count is not None and self.ready + int(arrives[:end].sum()) >= count
        in_vain = end == in_time < len(due) and not enough and not (step and end)
        now = until if in_vain else float(due[end - 1]) if end else self.now
        return Clock(max(self.now, now), self.ahead.take(slice(end, None)), self.past.plus(self.ahead.take(slice(0, end))))

    def give_up(self) -> tuple[Events, Clock]:
        """What was still under way, and the clock without it."""
        return self.ahead, replace(self, ahead=Events())

    def taken(self) -> tuple[Events, Clock]:
        """What has happened, and the clock without it."""
        return self.past, replace(self, past=Events())
