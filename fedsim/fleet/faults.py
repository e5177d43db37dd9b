"""F3. What goes wrong, declared in the scenario and the same in every run of it.

What befalls a job is a function of the run's key, the round and the client: two strategies under one seed meet the same faults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Le
from numpy.typing import NDArray

from fedsim.registry import section
from fedsim.rng import Key, Keys, generator, units

Chance = Annotated[float, Ge(0), Le(1)]

ARRIVES = 0
LOST = (
    "",
    "dropped out before the download",
    "dropped out during training",
    "dropped out during the upload",
    "message lost on the downlink",
    "update lost on the uplink",
)
"""What a fate means: 0 = the update arrives."""


@section
@dataclass(frozen=True)
class Drops:
    """Chances that a client drops out of a job: before the download, during training, during the upload."""

    download: Chance = 0.0
    training: Chance = 0.0
    upload: Chance = 0.0

    def __post_init__(self) -> None:
        if self.download + self.training + self.upload > 1:
            raise ValueError("download, training and upload are chances of one job; together they are more than 1")


@section
@dataclass(frozen=True)
class Corruption:
    """Chances that an update arrives broken: with numbers that are not numbers, or with tensors of another shape."""

    nan: Chance = 0.0
    shape: Chance = 0.0


@section
@dataclass(frozen=True)
class Straggle:
    """With chance `rate` a job takes `factor` times as long."""

    rate: Chance = 0.1
    factor: Annotated[float, Ge(1)] = 10.0


@section
@dataclass(frozen=True)
class Byzantine:
    """Clients that send something else than they should, always the same ones: round(fraction * N), drawn at random.

    sign-flip: -strength times the update; scale: strength times the update; noise: the update and Gaussian noise of `strength` times its
    root mean square.
    """

    fraction: Chance = 0.2
    attack: Literal["sign-flip", "scale", "noise"] = "sign-flip"
    strength: Annotated[float, Gt(0)] = 1.0

    def draw(self, clients: int, key: Key) -> NDArray[np.bool_]:
        """Who they are, `[N]`."""
        chosen = np.zeros(clients, dtype=np.bool_)
        chosen[generator(key).permutation(clients)[: round(self.fraction * clients)]] = True
        return chosen


@dataclass(frozen=True)
class Fates:
    """What becomes of some jobs, `[C]`.

    Attributes:
        fate: ARRIVES, or an index into LOST.
        when: how far into the phase in which it is lost, in (0, 1).
        slower: what its time is multiplied by.
        twice: whether the update arrives a second time.
        nan, bent: whether it arrives broken: not finite, or of another shape.
    """

    fate: NDArray[np.int64]
    when: NDArray[np.float64]
    slower: NDArray[np.float64]
    twice: NDArray[np.bool_]
    nan: NDArray[np.bool_]
    bent: NDArray[np.bool_]

    @staticmethod
    def harmless(count: int) -> Fates:
        """All arrive as they should."""
        no = np.zeros(count, dtype=np.bool_)
        return Fates(np.zeros(count, dtype=np.int64), np.ones(count), np.ones(count), no, no, no)


@section
@dataclass(frozen=True)
class Faults:
    """What goes wrong with clients. Nothing, unless it is said.

    drop: chances to drop out of a job.
    duplicate: chance that an update arrives twice.
    corrupt: chances that it arrives broken.
    straggle: jobs that take much longer.
    byzantine: clients that send something else.
    """

    drop: Drops = field(default_factory=Drops)
    duplicate: Chance = 0.0
    corrupt: Corruption = field(default_factory=Corruption)
    straggle: Straggle | None = None
    byzantine: Byzantine | None = None

    def draw(self, keys: Keys, down: float, up: float) -> Fates:
        """The fates of jobs, one key each; `down` and `up` are the channel's chances to lose a message. `[C]`."""
        drop, corrupt = self.drop, self.corrupt
        if self.straggle is None and not any(
            (drop.download, drop.training, drop.upload, self.duplicate, corrupt.nan, corrupt.shape, down, up)
        ):
            return Fates.harmless(len(keys))
        u = units(keys, 8).T  # [8, C]
        fate = np.searchsorted(np.cumsum([drop.download, drop.training, drop.upload]), u[0], side="right") + 1
        fate = np.where(fate > len(LOST) - 3, ARRIVES, fate)  # beyond the last of three: not dropped
        fate = np.where((fate != 1) & (u[1] < down), 4, fate)  # a message that is lost is not trained on
        fate = np.where((fate == ARRIVES) & (u[2] < up), 5, fate)
        slower = np.ones(len(keys))
        if self.straggle is not None:
            slower[u[3] < self.straggle.rate] = self.straggle.factor
        return Fates(fate, u[4], slower, u[5] < self.duplicate, u[6] < corrupt.nan, u[7] < corrupt.shape)
