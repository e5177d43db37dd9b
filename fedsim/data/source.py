"""F3. What a source of data is, and what it gives: examples, a task, and who the examples belong to.

A source reads files below a root (`data.root`, else `$FEDSIM_DATA`, else `~/.cache/fedsim`) or makes its examples up. Nothing is ever
downloaded in silence, and nothing is ever unpickled: NumPy archives are read with `allow_pickle=False`.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile

from fedsim import rng
from fedsim.errors import DataError
from fedsim.problem import Classification, NextToken, Task
from fedsim.registry import Kind

FIELD = "data.source"
TEST_FRACTION = 0.2
"""Share of the examples that a data set without a test set of its own holds out."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs and targets. `x [M, ...]` float32, or int64 tokens `[M, T]`; `y [M]` int64, `[M, T]` int64, or `[M, D]` float32."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True, eq=False)
class Dataset:
    """What a source gives. Checked when it is made, so that what a user's own source gets wrong is named.

    Attributes:
        task: what the targets mean.
        train: the examples that clients (and perhaps the server's proxy set) share out, M of them.
        test: the examples kept for evaluating the server's model.
        groups: natural client of each train example, `[M]` int64 into `group_names`, or None.
        group_names: names of the natural clients.
        blocks: units of train examples that must not be divided between what a client trains on and what it is tested on, `[M]`
            int64, or None. Overlapping windows of one recording are a block, and so are copies of one text.
        vocabulary: the tokens, for text.
        columns: what each column of an input means, for tables.
        optimum: the parameters that minimise the mean loss over all train examples, where they are known: `[D, features]`.
    """

    task: Task
    train: Examples
    test: Examples
    groups: np.ndarray | None = None
    group_names: tuple[str, ...] = ()
    blocks: np.ndarray | None = None
    vocabulary: tuple[str, ...] = ()
    optimum: np.ndarray | None = None
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, part in (("train", self.train), ("test", self.test)):
            _check_examples(name, part, self.task)
        if self.train.x.shape[1:] != self.test.x.shape[1:]:
            raise DataError(FIELD, f"train inputs have shape {self.train.x.shape[1:]} and test inputs {self.test.x.shape[1:]}")
        for name, column in (("groups", self.groups), ("blocks", self.blocks)):
            if column is not None and column.shape != (len(self.train),):
                raise DataError(FIELD, f"`{name}` has shape {column.shape} for {len(self.train)} train examples")
        if self.groups is not None and (self.groups.min() < 0 or self.groups.max() >= len(self.group_names)):
            raise DataError(FIELD, f"`groups` must number the {len(self.group_names)} `group_names` from 0")


def _check_examples(name: str, part: Examples, task: Task) -> None:
    if len(part.x) != len(part.y):
        raise DataError(FIELD, f"{name} has {len(part.x)} inputs and {len(part.y)} targets")
    if len(part) == 0:
        raise DataError(FIELD, f"{name} has no examples")
    if part.x.dtype not in (np.float32, np.int64) or part.y.dtype not in (np.float32, np.int64):
        raise DataError(FIELD, f"{name} is {part.x.dtype} -> {part.y.dtype}; inputs and targets are float32 or int64")
    finite(part.x, f"{name} input")
    finite(part.y, f"{name} target")
    if isinstance(task, Classification) and (part.y.ndim != 1 or part.y.min() < 0 or part.y.max() >= task.outputs):
        raise DataError(FIELD, f"{name} labels must be one number in 0..{task.outputs - 1} for each example")
    if isinstance(task, NextToken) and part.y.shape != part.x.shape:
        raise DataError(FIELD, f"{name} has inputs {part.x.shape} and targets {part.y.shape}: a next token is needed at each position")


def finite(x: np.ndarray, what: str) -> None:
    """Refuse NaN and infinity, saying where the first one is."""
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        row, *rest = (int(i) for i in np.argwhere(~np.isfinite(x))[0])
        column = f", column {rest[0] if len(rest) == 1 else rest}" if rest else ""
        raise DataError(FIELD, f"{what} has {x[(row, *rest)]} in row {row}{column} (counted from 0)")


class Source(Kind, ABC):
    """Where the examples come from."""

    @abstractmethod
    def load(self, root: Path, key: rng.Key) -> Dataset:
        """Read, or draw by `key`, the whole data set. `root` is where data sets lie."""


def resolve_root(root: str | None) -> Path:
    """Where data sets lie: `root`, else `$FEDSIM_DATA`, else `~/.cache/fedsim`."""
    return Path(root or os.environ.get("FEDSIM_DATA") or "~/.cache/fedsim").expanduser()


def find(root: Path, names: tuple[str, ...], home: str, field: str = FIELD, here: bool = False) -> Path:
    """The first existing file among `names` below `root` (and, if `here`, below the current directory); `*` in a name matches anything.

    Raises:
        DataError: none exists. Lists every place, and `home`: where the file is to be had.
    """
    places = [place / name for name in names for place in ((root, Path.cwd()) if here else (root,))]
    for place in places:
        found = sorted(place.parent.glob(place.name)) if "*" in place.name else [place] * place.is_file()
        if found:
            return found[0]
    looked = ", ".join(dict.fromkeys(str(p) for p in places))
    root_rule = "The folder comes from `data.root`, else $FEDSIM_DATA, else ~/.cache/fedsim"
    raise DataError(field, f"no file; looked for {looked}. {home}. {root_rule}")


@contextmanager
def reading(path: Path, home: str = "") -> Iterator[None]:
    """Turn whatever a broken file makes a parser raise into an error that names the file."""
    try:
        yield
    except DataError:
        raise
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as cause:
        raise DataError(FIELD, f"{path} is broken: {type(cause).__name__}: {cause}. {home}".rstrip(" .")) from cause


@contextmanager
def archive(path: Path, home: str = "") -> Iterator[NpzFile]:
    """An open NumPy archive; what goes wrong inside the block is the file's fault. Pickled objects in it are refused."""
    with reading(path, home), path.open("rb") as file:  # opened here, because np.load leaves a broken file open
        if file.read(2) != b"PK":
            raise ValueError("not a NumPy archive (.npz)")
        file.seek(0)
        loaded = np.load(file, allow_pickle=False)
        if not isinstance(loaded, NpzFile):
            raise ValueError("a single array, where an .npz archive is expected")
        with loaded:
            yield loaded


def held_out(strata: np.ndarray, units: np.ndarray | None = None, fraction: float = TEST_FRACTION) -> np.ndarray:
    """Which examples form the test set of a data set that has none: the same ones for every seed. `[M] -> [M]` bool.

    From each stratum `[M]` the same fraction of units `[M]` is taken whole (default: an example is a unit). A unit belongs to the
    stratum of its first example.
    """
    units = np.arange(len(strata)) if units is None else units
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    order = rng.generator(rng.fold(0, rng.DATA)).permutation(len(first))
    taken = np.zeros(len(first), dtype=bool)
    for stratum in np.unique(strata):
        members = order[strata[first[order]] == stratum]
        taken[members[: round(fraction * len(members))]] = True
    return taken[unit]


def named(values: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Numbers for strings, and the string of each number: whole numbers in their order, then the rest by alphabet. `[M] int64`, names."""
    names = sorted(set(values), key=lambda v: (0, int(v), v) if v.isdecimal() else (1, 0, v))
    return numbered(values, tuple(names)), tuple(names)


def numbered(values: list[str], names: tuple[str, ...]) -> np.ndarray:
    """The place of each value among `names`, `[M] int64`."""
    place = {name: i for i, name in enumerate(names)}
    return np.array([place[v] for v in values], dtype=np.int64)


def standardise(train: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Float32 arrays `[M, D]` shifted and scaled so that each column of the first has mean 0 and deviation 1 (a constant column: 0)."""
    mean, deviation = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    deviation[deviation < 1e-12] = 1.0
    return tuple(((part - mean) / deviation).astype(np.float32) for part in (train, *others))
