"""F3. The scenario's `data:` section, and what it builds: a federation, resident in memory, with each client's examples as positions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from fedsim import rng
from fedsim.data.flower_partition import Iid
from fedsim.data.partition import Partition, Split
from fedsim.data.source import Dataset, Examples, Source, resolve_root
from fedsim.errors import DataError
from fedsim.problem import Classification, Task
from fedsim.types import Batch

# Folded after `rng.DATA`, so that no two of these draws share a stream.
SOURCE, PROXY, PARTITION, CLIENT_TEST, VALIDATION, CALIBRATION = range(6)


@dataclass(frozen=True)
class Proxy:
    """The server's own examples: how many (`size`, or a `fraction`), from `train` or from `test`; `balanced` over the classes.

    They are taken out first. From train, whole blocks are taken, and the rest of a block that had to be cut belongs to nobody.
    """

    source: Literal["train", "test"] = "train"
    size: Annotated[int, Gt(0)] | None = None
    fraction: Annotated[float, Gt(0), Lt(1)] | None = None
    balanced: bool = True

    def __post_init__(self) -> None:
        if (self.size is None) == (self.fraction is None):
            raise ValueError("give either `size` or `fraction`")

    def choose(self, y: np.ndarray, task: Task, blocks: np.ndarray | None, key: rng.Key) -> np.ndarray:
        """Positions of the proxy examples among labels `y` `[M, ...]`, sorted."""
        size = self.size if self.size is not None else round((self.fraction or 0) * len(y))
        if not 0 < size < len(y):
            raise DataError("data.proxy", f"{size} examples cannot be taken out of {len(y)} in {self.source}")
        unit = np.arange(len(y)) if blocks is None else np.unique(blocks, return_inverse=True)[1]
        order = np.argsort(rng.generator(key).permutation(int(unit.max()) + 1)[unit], kind="stable")  # blocks in random order
        if not (self.balanced and isinstance(task, Classification)):
            return np.sort(order[:size])
        # The r-th example of every class comes before the (r+1)-th of any: an equal number of each, until a class has run out.
        rank = np.empty(len(y), dtype=np.int64)
        by_class = order[np.argsort(y[order], kind="stable")]
        counts = np.bincount(y, minlength=task.outputs)
        rank[by_class] = np.arange(len(y)) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.sort(order[np.argsort(rank[order], kind="stable")[:size]])


@dataclass(frozen=True, eq=False)
class Lists:
    """The index lists of all clients, end to end: client `i` owns `index[offset[i]:offset[i + 1]]`.

    Attributes:
        index: positions, `[sum n]` int64.
        offset: where each client's list starts, and the end, `[N + 1]` int64.
    """

    index: np.ndarray
    offset: np.ndarray

    @classmethod
    def of_clients(cls, parts: list[np.ndarray]) -> Lists:
        """From one array of positions for each client, each sorted."""
        offset = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)
        return cls(np.concatenate([np.sort(p) for p in parts]).astype(np.int64), offset)

    @property
    def sizes(self) -> np.ndarray:
        """Examples of each client, `[N]` int64."""
        return np.diff(self.offset)

    def count(self, ids: np.ndarray) -> np.ndarray:
        """Examples of some clients, `[C]` int64."""
        return self.offset[ids + 1] - self.offset[ids]

    def of(self, client: int) -> np.ndarray:
        """The positions of one client, `[n_i]` int64."""
        return self.index[self.offset[client] : self.offset[client + 1]]

    def owners(self) -> np.ndarray:
        """The client of each entry of `index`, `[sum n]` int64."""
        return np.repeat(np.arange(len(self.offset) - 1), self.sizes)


@dataclass(frozen=True, eq=False)
class Federation:
    """The data of a run. `x` and `y` hold all train examples; clients own positions in them, the server tests on `test_x`, `test_y`.

    Attributes:
        task: what the targets mean.
        x, y: train examples, `[M, ...]`.
        train: what each client trains on.
        client_test: what each client is tested on; empty lists without `client_test`.
        calibration: what each client calibrates prediction sets on: neither trained nor tested on; empty lists without `calibration`.
        test_x, test_y: the server's test examples, `[M', ...]`.
        proxy: the server's own examples, or None.
        names: the clients' names.
        optimum: minimiser of the mean loss over all clients' train examples, where known, `[D, features]` float64.
        vocabulary: the tokens, for text.
        columns: what each column of an input means, for tables.
    """

    task: Task
    x: Tensor
    y: Tensor
    train: Lists
    client_test: Lists
    calibration: Lists
    test_x: Tensor
    test_y: Tensor
    proxy: Batch | None
    names: tuple[str, ...]
    optimum: Tensor | None
    vocabulary: tuple[str, ...]
    columns: tuple[str, ...] = ()

    @property
    def clients(self) -> int:
        """N, the number of clients."""
        return len(self.names)

    @property
    def sizes(self) -> Tensor:
        """Training examples of each client, `[N]` float32."""
        return torch.from_numpy(self.train.sizes.astype(np.float32))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.x.shape[1:])

    def label_counts(self, lists: Lists | None = None) -> np.ndarray | None:
        """Examples of each client and class, `[N, K]` int64, in `lists` (default: in training); None where there are no classes."""
        if not isinstance(self.task, Classification):
            return None
        lists = self.train if lists is None else lists
        cell = lists.owners() * self.task.outputs + self.y.cpu().numpy()[lists.index]
        return np.bincount(cell, minlength=self.clients * self.task.outputs).reshape(self.clients, self.task.outputs)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over index lists and labels: equal for two runs that share a partition."""
        digest = hashlib.sha256()
        lists = [self.train, self.client_test, *([self.calibration] if len(self.calibration.index) else [])]
        for array in (*(a for part in lists for a in (part.index, part.offset)), self.y.cpu().numpy()):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Data:
    """What is learned from, and who owns it: the scenario's `data:` section.

    Attributes:
        source: where examples come from.
        partition: how they are divided.
        clients: number of clients; null with `partition: natural` means all there are.
        client_test: fraction of each client's examples kept for testing on that client; its last block always stays in training.
        calibration: fraction of these that is kept for calibrating prediction sets instead, and neither trained nor tested on; a client's
            last block is always for testing.
        proxy: the server's own examples.
        validation: fraction of each client's remaining training examples that the run is evaluated on, and never trained on, in the place
            of all test examples: to choose a learning rate without a look at them. The next run, without it, trains on all.
        root: folder of the data sets; default `$FEDSIM_DATA`, then `~/.cache/fedsim`.
    """

    source: Source
    partition: Partition = Iid()
    clients: Annotated[int, Gt(0)] | None = None
    client_test: Annotated[float, Ge(0), Lt(1)] = 0.0
    proxy: Proxy | None = None
    validation: Annotated[float, Ge(0), Lt(1)] = 0.0
    root: str | None = None
    calibration: Annotated[float, Ge(0), Lt(1)] = 0.0

    def load(self, key: rng.Key) -> Federation:
        """Read, divide and make resident. Every draw is a function of `key`."""
        key = rng.fold(key, rng.DATA)
        dataset = self.source.load(resolve_root(self.root), rng.fold(key, SOURCE))
        proxy, free, test = self._take_proxy(dataset, rng.fold(key, PROXY))
        split = self.partition.split(dataset, free, self.clients, rng.fold(key, PARTITION))
        train, client_test = _divide_clients(Lists.of_clients(split.clients), dataset.blocks, self.client_test, rng.fold(key, CLIENT_TEST))
        if self.client_test and not len(client_test.index):
            advice = "raise it or have fewer clients; examples that overlap form a block, and a client's last block stays in training"
            raise DataError("data.client_test", f"a fraction of {self.client_test} leaves every client without a test example; {advice}")
        client_test, calibration = _divide_clients(client_test, dataset.blocks, self.calibration, rng.fold(key, CALIBRATION))
        if self.calibration and not len(calibration.index):
            advice = "raise it, or data.client_test, of which it is a part"
            raise DataError(
                "data.calibration", f"a fraction of {self.calibration} leaves every client without a calibration example; {advice}"
            )
        if self.validation:
            train, client_test = _divide_clients(train, dataset.blocks, self.validation, rng.fold(key, VALIDATION))
            if not len(client_test.index):
                raise DataError("data.validation", f"a fraction of {self.validation} leaves every client without an example; raise it")
            y = dataset.train.y if split.y is None else split.y
            test = Examples(dataset.train.x[client_test.index], y[client_test.index])
        return _resident(dataset, split, train, client_test, calibration, test, proxy)

    def _take_proxy(self, dataset: Dataset, key: rng.Key) -> tuple[Batch | None, np.ndarray, Examples]:
        """The proxy batch, the train positions that are free, and the test examples that are left."""
        everything = np.arange(len(dataset.train))
        if self.proxy is None:
            return None, everything, dataset.test
        part = dataset.train if self.proxy.source == "train" else dataset.test
        blocks = dataset.blocks if self.proxy.source == "train" else None
        chosen = self.proxy.choose(part.y, dataset.task, blocks, key)
        taken = np.zeros(len(part), dtype=bool)
        taken[chosen] = True
        batch = Batch(torch.from_numpy(part.x[chosen]), torch.from_numpy(part.y[chosen]))
        if self.proxy.source == "test":
            return batch, everything, Examples(part.x[~taken], part.y[~taken])
        if blocks is not None:
            taken = np.isin(blocks, blocks[chosen])
        if taken.all():
            raise DataError("data.proxy", "the proxy set's blocks are all there is; lower its size")
        return batch, everything[~taken], dataset.test


def _divide_clients(lists: Lists, blocks: np.ndarray | None, fraction: float, key: rng.Key) -> tuple[Lists, Lists]:
    """Each client's examples divided into train and test, by whole blocks in random order; the last block is always train."""
    owner, sizes = lists.owners(), lists.sizes
    block = lists.index if blocks is None else blocks[lists.index]
    words = rng.fold_each(rng.fold_each(key, owner), block)  # one for each client and block
    order = np.lexsort((lists.index, block, words, owner))
    fresh = np.diff(words[order], prepend=words[order][:1] + np.uint64(1)).astype(bool) | (np.diff(owner[order], prepend=-1) != 0)
    start = np.flatnonzero(fresh)
    end = np.append(start[1:], len(order))
    inside = owner[order][start]
    middle = (start + end) / 2 - lists.offset[inside]
    # A block whose middle lies within the client's fraction is test, so the sizes are right to half a block.
    tested = (middle <= np.round(fraction * sizes)[inside]) & (end < lists.offset[inside + 1])
    mask = np.zeros(len(order), dtype=bool)
    mask[order] = np.repeat(tested, end - start)
    kept, held = (np.concatenate([[0], np.cumsum(np.bincount(owner[m], minlength=len(sizes)))]) for m in (~mask, mask))
    return Lists(lists.index[~mask], kept), Lists(lists.index[mask], held)


def _resident(
    dataset: Dataset, split: Split, train: Lists, client_test: Lists, calibration: Lists, test: Examples, proxy: Batch | None
) -> Federation:
    complete = len(train.index) == len(dataset.train)  # the optimum is that of all train examples
    return Federation(
        task=dataset.task,
        x=torch.from_numpy(np.ascontiguousarray(dataset.train.x)),
        y=torch.from_numpy(np.ascontiguousarray(dataset.train.y if split.y is None else split.y)),
        train=train,
        client_test=client_test,
        calibration=calibration,
        test_x=torch.from_numpy(np.ascontiguousarray(test.x)),
        test_y=torch.from_numpy(np.ascontiguousarray(test.y)),
        proxy=proxy,
        names=split.names or tuple(f"client {i}" for i in range(len(split.clients))),
        optimum=torch.from_numpy(dataset.optimum) if dataset.optimum is not None and complete else None,
        vocabulary=dataset.vocabulary,
        columns=dataset.columns,
    )
