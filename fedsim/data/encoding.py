"""F3. How examples are written as numbers: what data from elsewhere must share with a scenario's for one model to mean the same on both."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedsim import rng
from fedsim.data.federation import Federation
from fedsim.data.source import FIELD, Dataset, Examples, Source
from fedsim.errors import DataError
from fedsim.problem import Classification


@dataclass(frozen=True)
class Encoding:
    """Of inputs and targets.

    Attributes:
        task: the kind of task.
        outputs: of the model.
        classes: the names of the classes, in order; empty where labels are numbers.
        shape: of an input.
        columns: what each column of an input means, for tables that name theirs.
        vocabulary: SHA-256 (hex) of the tokens in their order, for text; else empty.
    """

    task: str
    outputs: int
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    columns: tuple[str, ...]
    vocabulary: str

    @staticmethod
    def of(data: Dataset | Federation) -> Encoding:
        """That of a data set, or of the data of a run."""
        task = data.task
        classes = task.names if isinstance(task, Classification) else ()
        shape = tuple(data.train.x.shape[1:]) if isinstance(data, Dataset) else data.input_shape
        tokens = hashlib.sha256(json.dumps(data.vocabulary).encode()).hexdigest() if data.vocabulary else ""
        return Encoding(type(task).__name__, task.outputs, classes, shape, data.columns, tokens)

    def written(self) -> str:
        """As JSON. Inverse: `read`."""
        return json.dumps(asdict(self))

    @staticmethod
    def read(text: str) -> Encoding:
        """The encoding in a text. Raises `ValueError` or `TypeError`."""
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(text).items()}
        return Encoding(**fields)

    def adopt(self, data: Dataset) -> Dataset:
        """A data set in this encoding: classes are known by their names, else by their numbers. Raises `DataError` where it differs."""
        its = Encoding.of(data)
        for what in ("task", "shape", "columns", "vocabulary"):
            mine, due = getattr(its, what), getattr(self, what)
            if mine != due:
                raise DataError(FIELD, f"{what} differs from that of the scenario's data: {_differ(mine, due)}")
        if not isinstance(data.task, Classification):
            if its.outputs != self.outputs:
                raise DataError(FIELD, f"has {its.outputs} targets, the scenario's data have {self.outputs}")
            return data
        numbers = tuple(map(str, range(max(its.outputs, self.outputs))))
        due = (self.classes if its.classes else ()) or numbers[: self.outputs]
        has = its.classes or numbers[: its.outputs]
        if unknown := [name for name in has if name not in due]:
            raise DataError(FIELD, f"has the class '{unknown[0]}', which is none of the scenario's: {', '.join(due[:20])}")
        place = np.array([due.index(name) for name in has], dtype=np.int64)
        train, test = (Examples(part.x, place[part.y]) for part in (data.train, data.test))
        return replace(data, task=Classification(self.outputs, self.classes), train=train, test=test)


@dataclass(frozen=True)
class Adopting(Source):
    """Another source, in an encoding."""

    inner: Source
    encoding: Encoding

    def load(self, root: Path, key: rng.Key) -> Dataset:
        return self.encoding.adopt(self.inner.load(root, key))


def _differ(one: object, other: object) -> str:
    """Two values that differ, in short."""
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other) and isinstance(one[0], str):
        one, other = next((a, b) for a, b in zip(one, other, strict=True) if a != b)
    return f"{str(one or 'none')[:60]} instead of {str(other or 'none')[:60]}"
