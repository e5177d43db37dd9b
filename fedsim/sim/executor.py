"""How chunks are run and what is put up with: the `Executor`, and the one that stays in this process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from fedsim.errors import ClientError
from fedsim.params import Params
from fedsim.sim.cohort import Mode, Trainer


@dataclass(frozen=True)
class Failure:
    """What an item came to that failed as often as it may."""

    reason: str


@dataclass(frozen=True)
class Patience:
    """How much is put up with.

    Attributes:
        retries: how often an item is handed to another worker after its worker died, hung or raised.
        timeout: seconds after which a worker that is still busy with an item counts as hung; None = never.
        lose: give a `Failure` for clients whose training failed too often, instead of raising. Other work always raises.
    """

    retries: int = 3
    timeout: float | None = None
    lose: bool = False

    def loses(self, method: str) -> bool:
        """Whether an item of this method may be lost."""
        return self.lose and method == "train"


PATIENT = Patience()

WORK = {
    "train": "training",
    "payload_bytes": "finding out what an update weighs",
    "measure": "evaluation on the test set",
    "score": "evaluation on clients' test data",
    "outputs": "evaluation of prediction sets",
}
"""What the methods of a `Trainer` are for, in words."""


def complaint(method: str, error: BaseException) -> ClientError:
    """What was raised in a method of a `Trainer`, as a `ClientError` that says what was being done."""
    if isinstance(error, ClientError):
        return error
    what = ": ".join(filter(None, (type(error).__name__, str(error))))
    return ClientError(f"{WORK.get(method, method)} failed: {what}")


class Executor(ABC):
    """Runs methods of a `Trainer` over lists of items and returns the results in the order of the items."""

    mode: Mode  # of the trainer
    device: str  # likewise: cpu or cuda

    @abstractmethod
    def map(self, method: str, shared: Any, items: list[Any]) -> list[Any]:
        """`trainer.method(shared, item)` for each item. What raises is a `ClientError`, or in `train` a `Failure` where that is allowed."""

    @abstractmethod
    def freeze(self, frozen: Params | None) -> None:
        """Let programs see the model that an earlier phase deployed, as `problem.frozen`."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back: processes, threads, memory, files."""


class Inline(Executor):
    """Runs items in this process, one after the other, on `threads` threads."""

    def __init__(self, trainer: Trainer, threads: int = 1, patience: Patience = PATIENT):
        self._trainer = trainer
        self.mode, self.device = trainer.mode, trainer.x.device.type
        self._patience = patience
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(threads)

    def map(self, method: str, shared: Any, items: list[Any]) -> list[Any]:
        return [self._one(method, shared, item) for item in items]

    def _one(self, method: str, shared: Any, item: Any) -> Any:
        try:
            return getattr(self._trainer, method)(shared, item)
        except Exception as error:  # no retry: the same process would fail the same way
            told = complaint(method, error)
            if self._patience.loses(method):
                return Failure(str(told))
            if told is error:
                raise
            raise told from error

    def freeze(self, frozen: Params | None) -> None:
        self._trainer = self._trainer.freeze(frozen)

    def close(self) -> None:
        torch.set_num_threads(self._threads_before)
