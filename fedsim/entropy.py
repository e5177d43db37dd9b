"""F0. Where random numbers that protect somebody come from: keys in a simulation, the operating system in a deployment.

A simulation must repeat itself, so its noise is a function of keys, and whoever knows the seed can take the noise away again. A deployed
client therefore draws Poisson samples and noise from `SYSTEM`, which no seed decides. A problem carries the source (`Problem.entropy`):
simulated and deployed code differ by that one value.
"""

from __future__ import annotations

import math
import secrets
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from fedsim import rng

PARTS = 4
"""Normal numbers that make up one from the operating system."""


class Entropy(ABC):
    """A source of random numbers, one stream for each key."""

    @abstractmethod
    def uniform(self, keys: rng.Keys, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """float32 in [0, 1) for each key. `[C] -> [C, *shape]`."""

    @abstractmethod
    def normal(self, keys: rng.Keys, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Standard normal float32 for each key. `[C] -> [C, *shape]`."""

    @abstractmethod
    def chance(self, keys: rng.Keys, p: NDArray[np.float64], n: int) -> NDArray[np.bool_]:
        """`n` coins for each key, true with probability `p` `[C]`, to 53 bits. `[C] -> [C, n]`."""


class Keyed(Entropy):
    """Numbers are a function of the key: what a simulation uses."""

    def uniform(self, keys: rng.Keys, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return rng.uniform(keys, shape)

    def normal(self, keys: rng.Keys, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return rng.normal(keys, shape)

    def chance(self, keys: rng.Keys, p: NDArray[np.float64], n: int) -> NDArray[np.bool_]:
        return _below(rng.bits(keys, n), p)


class System(Entropy):
    """Numbers come from the operating system's generator, whatever the keys.

    A normal number is half the sum of four: its last bits then tell little of how it was rounded (Holohan and Braghin, ESORICS 2021,
    arXiv 2107.10138, against the attack of Mironov, CCS 2012). It is a float all the same, not a sample of a discrete mechanism.
    """

    def uniform(self, keys: rng.Keys, shape: tuple[int, ...]) -> NDArray[np.float32]:
        words = _words(len(keys) * math.prod(shape)) >> np.uint64(40)  # 24 bits: all that a float32 below 1 holds
        return (words.astype(np.float32) * np.float32(2.0**-24)).reshape(len(keys), *shape)

    def normal(self, keys: rng.Keys, shape: tuple[int, ...]) -> NDArray[np.float32]:
        count = len(keys) * math.prod(shape)
        u, v = ((_words(PARTS // 2 * count) >> np.uint64(11)).astype(np.float64) * 2.0**-53 for _ in range(2))
        radius, angle = np.sqrt(-2 * np.log1p(-u)), 2 * np.pi * v  # Box and Muller, 1958
        parts = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).reshape(PARTS, count)
        return (parts.sum(0) / math.sqrt(PARTS)).astype(np.float32).reshape(len(keys), *shape)

    def chance(self, keys: rng.Keys, p: NDArray[np.float64], n: int) -> NDArray[np.bool_]:
        return _below(_words(len(keys) * n).reshape(len(keys), n), p)

    def __reduce__(self) -> str:
        return "SYSTEM"


def _below(words: NDArray[np.uint64], p: NDArray[np.float64]) -> NDArray[np.bool_]:
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53 < p[:, None]


def _words(n: int) -> NDArray[np.uint64]:
    return np.frombuffer(secrets.token_bytes(8 * n), dtype=np.uint64)


KEYED, SYSTEM = Keyed(), System()
