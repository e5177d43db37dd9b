"""F0. How many steps a program means for a client of some size."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Plan(Protocol):
    """What a program says about its steps; see `fedsim.strategy.LocalProgram`."""

    @property
    def epochs(self) -> int: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def batch_size(self) -> int | None: ...

    def chances(self, sizes: np.ndarray) -> np.ndarray | None: ...


def count_batches(program: Plan, sizes: np.ndarray) -> np.ndarray:
    """Batches in an epoch of each client, `[C]` int64: the last one may be partial."""
    return -(-sizes // program.batch_size) if program.batch_size is not None else (sizes > 0).astype(np.int64)


def count_steps(program: Plan, sizes: np.ndarray) -> np.ndarray:
    """Steps of each client in one pass, `[C]` int64. A client without examples has none."""
    batches = count_batches(program, np.asarray(sizes, dtype=np.int64))
    return np.where(batches > 0, program.steps, 0) if program.steps is not None else program.epochs * batches


def count_examples(program: Plan, sizes: np.ndarray) -> np.ndarray:
    """Examples that each client processes in one pass, each epoch anew, `[C]` int64."""
    sizes = np.asarray(sizes, dtype=np.int64)
    if program.steps is None or program.batch_size is None:
        return count_steps(program, sizes) * sizes if program.steps is not None else program.epochs * sizes
    full, rest = np.divmod(program.steps, np.maximum(count_batches(program, sizes), 1))
    return np.where(sizes > 0, full * sizes + np.minimum(rest * program.batch_size, sizes), 0)
