"""F3. How long a device takes for a job, in virtual seconds.

    T = delay + bytes_down / down + compute * examples * jitter + bytes_up / up

`examples` counts every example processed, each epoch and pass anew; the bytes are those of the message and of the payload, so a small
message really is faster. What a device has is drawn once for the whole run; `jitter` is drawn for every job.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import NDArray
from scipy.special import ndtri

from fedsim.errors import ScenarioError
from fedsim.fleet.rates import Labels
from fedsim.fleet.spread import Spread, Vector
from fedsim.registry import section
from fedsim.rng import Key, Keys, fold, generator, units

FIELD = "fleet.latency"
_DELAY, _COMPUTE, _DOWN, _UP, _ORDER = range(1, 6)


@dataclass(frozen=True)
class Devices:
    """What each device has, `[N]` float64; infinite bandwidth costs nothing.

    Attributes:
        delay: seconds before a job begins.
        compute: seconds an example.
        down, up: bytes a second.
        jitter: standard deviation of the logarithm of a job's own factor on its computing time, whose mean is 1.
    """

    delay: Vector
    compute: Vector
    down: Vector
    up: Vector
    jitter: float

    @property
    def times_uploads(self) -> bool:
        """Whether the size of an answer matters."""
        return bool(np.isfinite(self.up).any())

    def phases(self, ids: NDArray[np.int64], examples: Vector, bytes_down: int, bytes_up: int, keys: Keys) -> NDArray[np.float64]:
        """Seconds before, in the download, in training and in the upload of a job of each client. `[C] -> [C, 4]`."""
        training = self.compute[ids] * examples
        if self.jitter:
            z = ndtri(units(keys, 1)[:, 0])
            training = training * np.exp(self.jitter * z - self.jitter**2 / 2)
        return np.stack([self.delay[ids], bytes_down / self.down[ids], training, bytes_up / self.up[ids]], axis=1)


@section
@dataclass(frozen=True)
class Latency:
    """How long devices take. What is left out takes no time.

    delay: seconds before a job begins (waiting for a charger, starting up).
    compute: seconds an example.
    down, up: bandwidth in bytes a second.
    jitter: how much a job's computing time varies by itself: standard deviation of its logarithm, at an unchanged mean.
    slow_labels: classes whose holders have the slow devices (the "intertwined" heterogeneity of Wang and Gao, AAAI 2025, arXiv 2309.13536):
        devices are handed out so that the larger these classes' share of a client's examples, the slower it is.
    correlation: how strictly: 1 = in exactly that order, 0 = at random.
    """

    delay: Spread | None = None
    compute: Spread | None = None
    down: Spread | None = None
    up: Spread | None = None
    jitter: Annotated[float, Ge(0)] = 0.0
    slow_labels: tuple[Annotated[int, Ge(0)], ...] = ()
    correlation: Annotated[float, Ge(0), Le(1)] = 1.0

    def draw(self, clients: int, labels: Labels | None, key: Key) -> Devices:
        """The devices of a population. `labels` is `[N, K]` examples of each class. Raises ScenarioError where the two do not fit."""
        delay, compute, down, up = (
            np.full(clients, other) if spread is None else spread.draw(clients, fold(key, purpose), f"{FIELD}.{name}")
            for name, spread, purpose, other in (
                ("delay", self.delay, _DELAY, 0.0),
                ("compute", self.compute, _COMPUTE, 0.0),
                ("down", self.down, _DOWN, np.inf),
                ("up", self.up, _UP, np.inf),
            )
        )
        for name, bandwidth in (("down", down), ("up", up)):
            if (bandwidth <= 0).any():
                raise ScenarioError(f"{FIELD}.{name}", f"a bandwidth of 0 bytes a second never ends; leave {name} out for no delay")
        if self.slow_labels:
            slow = self._from_fast_to_slow(clients, labels, fold(key, _ORDER))
            for values, sign in ((delay, 1), (compute, 1), (down, -1), (up, -1)):
                values[slow] = sign * np.sort(sign * values)
        return Devices(delay, compute, down, up, self.jitter)

    def _from_fast_to_slow(self, clients: int, labels: Labels | None, key: Key) -> NDArray[np.int64]:
        """Clients in the order of their devices, `[N]`."""
        if labels is None:
            raise ScenarioError(f"{FIELD}.slow_labels", "only tasks with class labels (classification) have holders of a class")
        unknown = [k for k in self.slow_labels if k >= labels.shape[1]]
        if unknown:
            raise ScenarioError(f"{FIELD}.slow_labels", f"there is no class {unknown[0]}; classes are 0 to {labels.shape[1] - 1}")
        share = labels[:, list(self.slow_labels)].sum(1) / labels.sum(1).clip(min=1)
        chance = generator(key).random(clients)
        rank = np.lexsort((chance, share)).argsort() / clients  # ties in random order
        return np.lexsort((self.correlation * rank + (1 - self.correlation) * chance,))
