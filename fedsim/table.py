"""F0. A table with a row for each client, for what a server or a device remembers of each: N x P numbers, in RAM or in a file.

A `Table` is a value: `put` gives a new one and leaves the old as it was, so a state that holds a table is still a state that can be used
twice, kept, or gone back to. Tables that came from one another share a store. `put` writes into places of the store that no table refers
to, and a place is free again when the last table that refers to it is gone, so a run needs N rows and a cohort or two. Only clients
that were written to take up space.

Beyond `LIMIT` the store is a file, read and written row by row. (It is not mapped into memory: resident pages of a mapping count as the
process's own, and a disk that is full would kill it.) A checkpoint then does not copy the rows: it says which place is whose, and keeps
those places from being overwritten for as long as it is kept itself.
"""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fedsim.errors import FedsimError
from fedsim.tree import Leaf, tree_leaves

LIMIT = 512 << 20
"""Bytes of N rows beyond which a table is a file. A checkpoint of a table in RAM needs a few copies of it."""

FOLDER = "tables"
"""Where in a run folder the files are."""


@dataclass(frozen=True)
class Storage:
    """Where tables are kept. limit: bytes in RAM; folder: the run folder, or None for a temporary file that dies with the process."""

    limit: int = LIMIT
    folder: Path | None = None


IN_RAM = Storage()


class Table(Leaf):
    """An immutable map from client ids 0 to N-1 to rows, pytrees like `blank`. A client never written to reads as `blank`."""

    def __init__(self, blank: Any, store: _Store, place: np.ndarray):
        self._blank, self._store, self._place = blank, store, place
        self._leaves: list[Tensor] = tree_leaves(blank)
        taken = place[place >= 0]
        store.references[taken] += 1
        weakref.finalize(self, _release, store, taken).atexit = False

    @staticmethod
    def of(blank: Any, clients: int, storage: Storage = IN_RAM) -> Table:
        """A table in which every client's row is `blank`."""
        leaves: list[Tensor] = tree_leaves(blank)
        size = clients * sum(leaf.numel() * leaf.element_size() for leaf in leaves)
        store: _Store = _Ram(leaves) if size <= storage.limit else _File(leaves, storage.folder)
        return Table(blank, store, np.full(clients, -1, dtype=np.int64))

    def get(self, ids: Tensor | np.ndarray) -> Any:
        """Rows of the clients `ids`, stacked: leaves `[C, ...]`, on the device of `blank`."""
        place = self._place[np.asarray(ids)]
        known = place >= 0
        if known.all():
            stacked = self._store.read(place)
        else:
            stacked = [leaf.detach().cpu().expand(len(place), *leaf.shape).clone() for leaf in self._leaves]
            for rows, written in zip(stacked, self._store.read(place[known]), strict=True):
                rows[torch.from_numpy(known)] = written
        rows_there = [rows.to(blank.device) for rows, blank in zip(stacked, self._leaves, strict=True)]
        return pytree.tree_unflatten(rows_there, pytree.tree_structure(self._blank))

    def put(self, ids: Tensor | np.ndarray, rows: Any) -> Table:
        """The table in which the distinct clients `ids` have these rows, stacked `[C, ...]`."""
        if not self._leaves:
            return self
        place = self._place.copy()
        place[np.asarray(ids)] = self._store.write([leaf.detach().cpu() for leaf in tree_leaves(rows)], len(ids))
        return Table(self._blank, self._store, place)

    @property
    def blank(self) -> Any:
        """The row of a client never written to."""
        return self._blank

    @property
    def written(self) -> np.ndarray:
        """Which clients have a row of their own, `[N]` bool."""
        return np.asarray(self._place >= 0)

    @property
    def on_disk(self) -> bool:
        """Whether the rows are in a file."""
        return isinstance(self._store, _File)

    def save(self) -> Any:
        ids = np.flatnonzero(self.written)
        saved = {"blank": self._blank, "clients": len(self._place), "ids": torch.from_numpy(ids)}
        if isinstance(self._store, _File) and (file := self._store.sync()):
            return saved | {"places": torch.from_numpy(self._place[ids]), "file": file}
        return saved | {"rows": self.get(ids)}

    @classmethod
    def load(cls, saved: Any, folder: Path | None) -> Table:
        ids, blank = saved["ids"].numpy(), saved["blank"]
        if "rows" in saved:
            return Table.of(blank, saved["clients"], Storage(folder=folder)).put(ids, saved["rows"])
        if folder is None:
            raise FedsimError(f"a table lies in the file {saved['file']}, and there is no folder to look for it")
        place = np.full(saved["clients"], -1, dtype=np.int64)
        place[ids] = saved["places"].numpy()
        return Table(blank, _reopen(folder, saved["file"], tree_leaves(blank), int(place.max(initial=-1)) + 1), place)


class _Store(ABC):
    """Numbered places for rows, and how many tables refer to each."""

    def __init__(self, leaves: list[Tensor]):
        self.shapes, self.dtypes = [leaf.shape for leaf in leaves], [leaf.dtype for leaf in leaves]
        self.references = np.zeros(0, dtype=np.int32)

    @property
    def size(self) -> int:
        return len(self.references)

    @abstractmethod
    def read(self, places: np.ndarray) -> list[Tensor]:
        """The rows there, stacked, one tensor for each leaf."""

    def write(self, rows: list[Tensor], count: int) -> np.ndarray:
        """Put `count` rows where nothing else is, and say where."""
        places = np.flatnonzero(self.references == 0)[:count]
        if len(places) < count:
            self.resize(max(2 * self.size, self.size + count))
            places = np.flatnonzero(self.references == 0)[:count]
        self.fill(places, rows)
        return places

    def resize(self, size: int) -> None:
        self.references = np.concatenate([self.references, np.zeros(size - self.size, dtype=np.int32)])

    @abstractmethod
    def fill(self, places: np.ndarray, rows: list[Tensor]) -> None:
        """Overwrite the rows there."""


class _Ram(_Store):
    def __init__(self, leaves: list[Tensor]):
        super().__init__(leaves)
        self._columns = [torch.zeros(0, *leaf.shape, dtype=leaf.dtype) for leaf in leaves]

    def read(self, places: np.ndarray) -> list[Tensor]:
        return [column[torch.from_numpy(places)] for column in self._columns]

    def resize(self, size: int) -> None:
        larger = [torch.zeros(size, *shape, dtype=dtype) for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]
        for new, old in zip(larger, self._columns, strict=True):
            new[: self.size] = old
        self._columns = larger
        super().resize(size)

    def fill(self, places: np.ndarray, rows: list[Tensor]) -> None:
        for column, values in zip(self._columns, rows, strict=True):
            column[torch.from_numpy(places)] = values.to(column.dtype)


class _File(_Store):
    """One row after the other in a file, which is made when a row is written and grows as far as rows are."""

    def __init__(self, leaves: list[Tensor], folder: Path | None):
        super().__init__(leaves)
        self._bytes = sum(leaf.numel() * leaf.element_size() for leaf in leaves)  # of a row
        self._folder = folder
        self._name: str | None = None  # in `folder`
        self._handle: int | None = None

    def open(self, name: str) -> None:
        """Use this file of the run folder."""
        assert self._folder is not None
        path = self._folder / FOLDER / name
        path.parent.mkdir(exist_ok=True)
        self._keep(os.open(path, os.O_RDWR | os.O_CREAT, 0o644))
        self._name = name
        _OPEN[path.resolve()] = self

    def _keep(self, handle: int) -> None:
        self._handle = handle
        weakref.finalize(self, os.close, handle)

    def _create(self) -> int:
        if self._folder is not None:
            self.open(f"{len(list((self._folder / FOLDER).glob('*'))):04d}")
        else:
            handle, name = tempfile.mkstemp(prefix="fedsim-table-")
            os.unlink(name)  # the name goes at once, the content with the process
            self._keep(handle)
        assert self._handle is not None
        return self._handle

    def read(self, places: np.ndarray) -> list[Tensor]:
        out = [torch.empty(len(places), *shape, dtype=dtype) for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]
        for k, place in enumerate(places.tolist()):
            assert self._handle is not None
            if os.preadv(self._handle, [_buffer(column[k]) for column in out], place * self._bytes) != self._bytes:
                raise FedsimError(f"{self}: the file is shorter than the rows that were written to it")
        return out

    def fill(self, places: np.ndarray, rows: list[Tensor]) -> None:
        rows = [values.to(dtype).contiguous() for values, dtype in zip(rows, self.dtypes, strict=True)]
        try:
            handle = self._create() if self._handle is None else self._handle
            for k, place in enumerate(places.tolist()):
                if os.pwritev(handle, [_buffer(column[k]) for column in rows], place * self._bytes) != self._bytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise FedsimError(f"{self}: a client's row of {self._bytes:,} bytes cannot be written: {error.strerror}") from error

    def sync(self) -> str | None:
        """Wait until the rows are on the disk. Returns the file's name in the run folder, or None where it has none."""
        if self._handle is not None:
            os.fsync(self._handle)
        return self._name

    def __str__(self) -> str:
        return str(self._folder / FOLDER / (self._name or "?") if self._folder else tempfile.gettempdir())


_OPEN: weakref.WeakValueDictionary[Path, _File] = weakref.WeakValueDictionary()
"""Files in use: two checkpoints of one run must share the places of one file."""


def _reopen(folder: Path, name: str, leaves: list[Tensor], size: int) -> _File:
    path = folder / FOLDER / name
    if not path.is_file():
        raise FedsimError(f"{path}: missing, and the checkpoint needs it")
    store = _OPEN.get(path.resolve())
    if store is None:
        store = _File(leaves, folder)
        store.open(name)
    if store.size < size:
        store.resize(size)
    return store


def _release(store: _Store, places: np.ndarray) -> None:
    store.references[places] -= 1


def _buffer(row: Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    array: Any = row.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
