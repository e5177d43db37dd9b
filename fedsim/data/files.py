"""F3. Your own files: NumPy archives, CSV tables, JSON lines of texts. A relative path is looked up in the data root, then right here."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from annotated_types import Gt, Lt

from fedsim import rng
from fedsim.data.source import FIELD, TEST_FRACTION, Dataset, Examples, Source, archive, find, finite, held_out, named, reading, standardise
from fedsim.data.text import read_lines
from fedsim.data.tokens import TextSource
from fedsim.errors import DataError
from fedsim.problem import Classification, MultiLabel, Regression, Task
from fedsim.registry import register

TaskName = Literal["classification", "regression", "multi-label"]
Fraction = Annotated[float, Gt(0), Lt(1)]
_YOURS = "This is a file of yours: `data.source.path` names it"


def _task(name: TaskName, y: np.ndarray) -> Task:
    """The task that targets `[M]` int64 or `[M, D]` float32 belong to."""
    if name == "classification":
        return Classification(int(y.max(initial=0)) + 1)
    return Regression(y.shape[1]) if name == "regression" else MultiLabel(y.shape[1])


@register("npz")
@dataclass(frozen=True)
class Npz(Source):
    """A NumPy archive of yours: `x` and `y`, with or without `x_test`, `y_test` and the `client` of each train example.

    Every field but `path`, `task` and `test_fraction` is the name of an array in the archive; `x_test`, `y_test` and `client` may be
    null. Without a test set, `test_fraction` of the examples is held out (of each class, for classification). Floating inputs are taken as
    they are, bytes are scaled to [0, 1], other whole numbers are tokens. Labels are whole numbers from 0. Pictures are `[M, C, H, W]`.
    """

    path: str
    x: str = "x"
    y: str = "y"
    x_test: str | None = None
    y_test: str | None = None
    client: str | None = None
    task: TaskName = "classification"
    test_fraction: Fraction = TEST_FRACTION

    def load(self, root: Path, key: rng.Key) -> Dataset:
        path = find(root, (self.path,), _YOURS, here=True)
        with archive(path) as held:
            wanted = [k for k in (self.x, self.y, self.x_test, self.y_test, self.client) if k is not None]
            missing = [k for k in wanted if k not in held.files]
            if missing:
                raise DataError(FIELD, f"{path} has no array {', '.join(missing)}; it has {', '.join(held.files)}")
            arrays = {k: held[k] for k in wanted}
        train = Examples(self._inputs(arrays, self.x), self._targets(arrays, self.y))
        groups, names = (None, ()) if self.client is None else named([str(c) for c in arrays[self.client]])
        if self.x_test is not None and self.y_test is not None:
            test = Examples(self._inputs(arrays, self.x_test), self._targets(arrays, self.y_test))
            both = np.concatenate([train.y, test.y])
            return Dataset(_task(self.task, both), train, test, groups=groups, group_names=names)
        if len(train.x) != len(train.y):
            raise DataError(FIELD, f"{path}: {self.x} has {len(train.x)} rows and {self.y} {len(train.y)}")
        return _hold_out(self.task, train, groups, names, self.test_fraction)

    def _inputs(self, arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
        x = arrays[name]
        if x.dtype.kind not in "fiub":
            raise DataError(FIELD, f"{name} is of type {x.dtype}; inputs are numbers")
        if x.dtype == np.uint8:
            return x.astype(np.float32) / np.float32(255)
        with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, and is then refused
            x = x.astype(np.float32 if x.dtype.kind in "fb" else np.int64)
        finite(x, name)
        return x

    def _targets(self, arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
        y = arrays[name]
        finite(y, name)
        if self.task != "classification":
            return y.astype(np.float32).reshape(len(y), -1)
        if y.dtype.kind not in "iub":
            raise DataError(FIELD, f"{name} is of type {y.dtype}; labels are whole numbers from 0")
        return y.astype(np.int64).reshape(-1)


def _hold_out(task: TaskName, all_: Examples, groups: np.ndarray | None, names: tuple[str, ...], fraction: float) -> Dataset:
    test = held_out(all_.y if task == "classification" else np.zeros(len(all_.y), dtype=np.int64), fraction=fraction)
    left = None if groups is None else groups[~test]
    return Dataset(
        _task(task, all_.y), Examples(all_.x[~test], all_.y[~test]), Examples(all_.x[test], all_.y[test]), groups=left, group_names=names
    )


@register("csv")
@dataclass(frozen=True)
class Csv(Source):
    """A CSV table of yours, with a header: `target` column(s), an optional `client` column, everything else is input.

    A column of numbers is one input (standardised by the train rows, if `normalize`); any other column is one input for each value it
    takes. A class is any string or number; `regression` and `multi-label` take one or several numeric `target` columns. An empty cell
    or a NaN in a column of numbers is an error. `test_fraction` of the rows is held out (of each class, for classification).
    """

    path: str
    target: str | tuple[str, ...]
    client: str | None = None
    task: TaskName = "classification"
    normalize: bool = True
    test_fraction: Fraction = TEST_FRACTION

    def load(self, root: Path, key: rng.Key) -> Dataset:
        path = find(root, (self.path,), _YOURS, here=True)
        targets = (self.target,) if isinstance(self.target, str) else self.target
        if self.task == "classification" and len(targets) != 1:
            raise DataError(f"{FIELD}.target", "classification has one target column")
        columns = self._columns(path, targets)
        class_names: tuple[str, ...] = ()
        if self.task == "classification":
            y, class_names = named(columns[targets[0]])
        else:
            numeric = [_numbers(columns[t], t, path) for t in targets]
            if any(n is None for n in numeric):
                raise DataError(FIELD, f"{path}: the target columns {', '.join(targets)} must hold numbers for {self.task}")
            y = np.stack([n for n in numeric if n is not None], axis=1).astype(np.float32)
        x, scaled, titles = _design(columns, [c for c in columns if c not in (*targets, self.client)], path)
        groups, names = (None, ()) if self.client is None else named(columns[self.client])
        dataset = _hold_out(self.task, Examples(x, y), groups, names, self.test_fraction)
        if self.normalize and scaled.any():
            parts = dataset.train.x, dataset.test.x
            for part, values in zip(parts, standardise(*(part[:, scaled] for part in parts)), strict=True):
                part[:, scaled] = values
        dataset = replace(dataset, columns=titles)
        return replace(dataset, task=Classification(len(class_names), class_names)) if class_names else dataset

    def _columns(self, path: Path, targets: tuple[str, ...]) -> dict[str, list[str]]:
        with reading(path), path.open(newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file) if row]
            for number, row in enumerate(rows, start=2):
                if len(row) != len(header):
                    raise ValueError(f"row {number} has {len(row)} cells, the header has {len(header)}")
            columns = {name.strip(): [row[i].strip() for row in rows] for i, name in enumerate(header)}
        absent = [c for c in (*targets, self.client) if c is not None and c not in columns]
        if absent or not rows:
            problem = f"column {', '.join(absent)}" if absent else "rows"
            raise DataError(FIELD, f"{path} has no {problem}; its columns are {', '.join(columns)}")
        return columns


def _numbers(cells: list[str], name: str, path: Path) -> np.ndarray | None:
    """A column as float64, or None where it is not one of numbers. An empty or non-finite cell among numbers is an error."""
    values = np.empty(len(cells))
    for i, cell in enumerate(cells):
        try:
            values[i] = float(cell or "nan")
        except ValueError:
            return None
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad) == len(cells):
        return None
    if len(bad):
        place = f"row {bad[0] + 2} (the header is row 1), column '{name}'"
        raise DataError(FIELD, f"{path} has '{cells[bad[0]]}' in {place}, where a number is needed")
    return values


def _design(columns: dict[str, list[str]], inputs: list[str], path: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Input columns `[M, D]` float32, which of them are numbers `[D]` bool, and what each means."""
    parts: list[np.ndarray] = []
    numeric: list[bool] = []
    titles: list[str] = []
    for name in inputs:
        values = _numbers(columns[name], name, path)
        if values is None:
            code, kinds = named(columns[name])
            parts.append(np.eye(len(kinds))[code])
            numeric += [False] * len(kinds)
            titles += [f"{name}={kind}" for kind in kinds]
        else:
            parts.append(values[:, None])
            numeric.append(True)
            titles.append(name)
    if not parts:
        raise DataError(FIELD, f"{path} has no column besides target and client")
    with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, and is then refused
        return np.concatenate(parts, axis=1).astype(np.float32), np.array(numeric), tuple(titles)


@register("jsonl")
@dataclass(frozen=True, kw_only=True)
class Jsonl(TextSource):
    """JSON lines of yours (.gz or not): the fields `text` and `label`, and an optional `client`; text classification.

    `text`, `label` and `client` are the names of the fields. `test_fraction` of each label is held out, copies of a text together.
    """

    path: str
    text: str = "text"
    label: str = "label"
    client: str | None = None
    test_fraction: Fraction = TEST_FRACTION

    def load(self, root: Path, key: rng.Key) -> Dataset:
        path = find(root, (self.path,), _YOURS, here=True)
        wanted = [k for k in (self.text, self.label, self.client) if k is not None]
        cells: dict[str, list[str]] = {k: [] for k in wanted}
        with reading(path):
            for number, line in enumerate(read_lines(path), start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not (isinstance(row, dict) and all(row.get(k) is not None for k in wanted)):
                    raise ValueError(f"line {number} lacks one of the fields {', '.join(wanted)}")
                for k in wanted:
                    cells[k].append(str(row[k]))
        groups = None if self.client is None else cells[self.client]
        return self.classify_held_out(cells[self.text], cells[self.label], groups, self.test_fraction)
