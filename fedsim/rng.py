"""F0. Counter-based random numbers: every draw is a function of a key, and a key is folded from (seed, domain, round, client, step).

There is no generator to carry around, so a draw does not depend on what was drawn before it, on the chunk that a client shares,
or on the worker that it landed on. Keys are 64-bit unsigned integers: a Python int, or a NumPy `uint64` array with one key a client.
Hashing is SplitMix64 (Steele, Lea, Flood, OOPSLA 2014); bulk draws are Philox (Salmon et al., SC 2011) seeded by the key.
"""

import math

import numpy as np
from numpy.typing import NDArray

Key = int
Keys = NDArray[np.uint64]

# Domains, folded first, so that no two uses of randomness can share a stream.
PLAN, CLIENT, SERVER, FLEET, DATA, MODEL = range(1, 7)

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix(x: Keys) -> Keys:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_M1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_M2)
    return x ^ (x >> np.uint64(31))


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * _M1) & _MASK
    x = ((x ^ (x >> 27)) * _M2) & _MASK
    return x ^ (x >> 31)


def fold(key: Key, *data: int) -> Key:
    """A new key from `key` and integers, in order: `fold(seed, CLIENT, round, step)`."""
    for d in data:
        key = _mix_int(_mix_int((key + _GOLDEN) & _MASK) ^ _mix_int((int(d) + 0x632BE59BD9B4E019) & _MASK))
    return key


def fold_each(key: Key | Keys, data: NDArray) -> Keys:
    """`fold(key, d)` for each `d` of an integer array; `key` is one key, or one for each `d`."""
    keys = np.atleast_1d(np.asarray(key, dtype=np.uint64))
    d = np.asarray(data).astype(np.uint64)
    return _mix(_mix(keys + np.uint64(_GOLDEN)) ^ _mix(d + np.uint64(0x632BE59BD9B4E019)))


def bits(keys: Keys, n: int) -> Keys:
    """`n` random words for each key: the SplitMix64 stream. `[C] -> [C, n]`."""
    counter = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return _mix(keys[:, None] + counter)


def units(keys: Keys, n: int) -> NDArray[np.float64]:
    """`n` uniform numbers in (0, 1) for each key, without a generator for each. `[C] -> [C, n]`."""
    return ((bits(keys, n) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def generator(key: Key) -> np.random.Generator:
    """A NumPy generator that starts at `key`, for draws of any distribution."""
    return np.random.Generator(np.random.Philox(key=int(key)))


def uniform(keys: Keys, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """float32 in [0, 1) for each key. `[C] -> [C, *shape]`."""
    out = np.empty((len(keys), math.prod(shape)), dtype=np.float32)
    for row, key in zip(out, keys, strict=True):
        generator(key).random(out=row, dtype=np.float32)
    return out.reshape(len(keys), *shape)


def normal(keys: Keys, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal float32 for each key. `[C] -> [C, *shape]`."""
    out = np.empty((len(keys), math.prod(shape)), dtype=np.float32)
    for row, key in zip(out, keys, strict=True):
        generator(key).standard_normal(out=row, dtype=np.float32)
    return out.reshape(len(keys), *shape)


def permutations(keys: Keys, sizes: NDArray) -> NDArray[np.int64]:
    """For each key a permutation of `range(size)`. `[C], [C] -> [C, max(sizes)]`; entries from `size` on are padding."""
    width = int(sizes.max(initial=0))
    words = bits(keys, width) >> np.uint64(1)
    words[np.arange(width) >= np.asarray(sizes)[:, None]] = np.iinfo(np.uint64).max  # padding sorts last
    return words.argsort(axis=1)
