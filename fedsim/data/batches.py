"""F3. Which examples a client sees in which step: epochs, shuffling and padding are decided here, for a chunk of clients at a time."""

from __future__ import annotations

import numpy as np

from fedsim import rng
from fedsim.data.federation import Lists
from fedsim.steps import Plan, count_batches, count_steps
from fedsim.types import Work


def plan(program: Plan, lists: Lists, ids: np.ndarray, keys: rng.Keys) -> Work:
    """The steps of a chunk of clients in one pass.

    Step `s` of a client with `nb` batches an epoch is batch `s % nb` of epoch `s // nb`; an epoch is a permutation of the client's
    examples that depends on its key and the epoch's number only, so a client's work does not depend on its chunk.

    Args:
        program: has `epochs`, `steps`, `batch_size`.
        lists: all clients' positions.
        ids: the chunk's clients `[C]`, with numbers of steps that do not increase.
        keys: one for each client, with round and pass folded in, `[C]` uint64.
    """
    sizes = lists.count(ids)
    steps, batches = count_steps(program, sizes), count_batches(program, sizes)
    if (np.diff(steps) > 0).any():
        raise ValueError("the clients of a chunk must come by decreasing number of steps")
    widest = int(sizes.max(initial=1))
    width = widest if program.batch_size is None else min(program.batch_size, widest)
    index = np.zeros((len(sizes), int(steps.max(initial=0)), width), dtype=np.int64)  # [C, S, B]
    mask = np.zeros(index.shape, dtype=np.float32)
    epochs = -(-steps // np.maximum(batches, 1))
    for epoch in range(int(epochs.max(initial=0))):
        rows = np.flatnonzero(epochs > epoch)
        batch = np.arange(batches[rows].max())  # [nb]
        taken, real = _epoch(lists, ids[rows], rng.fold_each(keys[rows], np.full(len(rows), epoch)), len(batch) * width)
        step = epoch * batches[rows, None] + batch  # [A, nb]
        runs = (batch < batches[rows, None]) & (step < steps[rows, None])
        client = np.broadcast_to(rows[:, None], runs.shape)[runs]
        index[client, step[runs]] = taken.reshape(*runs.shape, width)[runs]
        mask[client, step[runs]] = real.reshape(*runs.shape, width)[runs]
    return Work(index, mask, steps, sizes.astype(np.float32))


def _epoch(lists: Lists, ids: np.ndarray, keys: rng.Keys, places: int) -> tuple[np.ndarray, np.ndarray]:
    """All examples of each client in random order, in a row of `places`; and which places are real. `[A] -> [A, places]` twice."""
    sizes = lists.count(ids)
    order = rng.permutations(keys, sizes)  # [A, largest size]
    order = np.pad(order, ((0, 0), (0, places - order.shape[1])))
    real = np.arange(places) < sizes[:, None]
    return np.where(real, lists.index[np.where(real, lists.offset[ids, None] + order, 0)], 0), real
