"""F3. Which examples a client sees in which step: epochs, shuffling and padding are decided here, for a chunk of clients at a time."""

from __future__ import annotations

import numpy as np

from fedsim import rng
from fedsim.data.federation import Lists
from fedsim.entropy import KEYED, Entropy
from fedsim.steps import Plan, count_batches, count_steps
from fedsim.types import Work


def plan(program: Plan, lists: Lists, ids: np.ndarray, keys: rng.Keys, entropy: Entropy = KEYED) -> Work:
    """The steps of a chunk of clients in one pass.

    Step `s` of a client with `nb` batches an epoch is batch `s % nb` of epoch `s // nb`; an epoch is a permutation of the client's
    examples that depends on its key and the epoch's number only, so a client's work does not depend on its chunk.

    Where the program gives `chances`, each example is in each step with that chance instead (Poisson sampling).

    Args:
        program: has `epochs`, `steps`, `batch_size`, `chances`.
        lists: all clients' positions.
        ids: the chunk's clients `[C]`, with numbers of steps that do not increase.
        keys: one for each client, with round and pass folded in, `[C]` uint64.
        entropy: where Poisson samples come from, which protect examples; the order of an epoch is always a function of the key.
    """
    sizes = lists.count(ids)
    steps, batches = count_steps(program, sizes), count_batches(program, sizes)
    if (np.diff(steps) > 0).any():
        raise ValueError("the clients of a chunk must come by decreasing number of steps")
    chances = program.chances(sizes)
    if chances is not None:
        return _poisson(lists, ids, steps, chances, keys, entropy)
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


WIDTHS = 8
"""Poisson batches are padded to a multiple of this, so that few shapes occur."""


def _poisson(lists: Lists, ids: np.ndarray, steps: np.ndarray, chances: np.ndarray, keys: rng.Keys, entropy: Entropy) -> Work:
    """Steps in which each example is with its client's chance, independently of the others and of other steps."""
    sizes = lists.count(ids)
    widest = int(sizes.max(initial=0))
    drawn: list[np.ndarray] = []  # positions in each client's list, [C, b] a step, real ones first
    width = 1
    for s in range(int(steps.max(initial=0))):
        runs = int((steps > s).sum())
        taken = entropy.chance(rng.fold_each(keys[:runs], np.full(runs, s)), chances[:runs], widest)  # [A, widest]
        taken &= np.arange(widest) < sizes[:runs, None]
        count = taken.sum(1)
        width = max(width, int(count.max(initial=0)))
        order = np.argsort(~taken, axis=1, kind="stable")[:, : count.max(initial=0)]
        drawn.append(np.where(np.arange(order.shape[1]) < count[:, None], order, -1))
    index = np.zeros((len(ids), len(drawn), -(-width // WIDTHS) * WIDTHS), dtype=np.int64)
    mask = np.zeros(index.shape, dtype=np.float32)
    for s, order in enumerate(drawn):
        real = order >= 0
        index[: len(order), s, : order.shape[1]] = np.where(real, lists.index[lists.offset[ids[: len(order)], None] + order * real], 0)
        mask[: len(order), s, : order.shape[1]] = real
    return Work(index, mask, steps, sizes.astype(np.float32))


def _epoch(lists: Lists, ids: np.ndarray, keys: rng.Keys, places: int) -> tuple[np.ndarray, np.ndarray]:
    """All examples of each client in random order, in a row of `places`; and which places are real. `[A] -> [A, places]` twice."""
    sizes = lists.count(ids)
    order = rng.permutations(keys, sizes)  # [A, largest size]
    order = np.pad(order, ((0, 0), (0, places - order.shape[1])))
    real = np.arange(places) < sizes[:, None]
    return np.where(real, lists.index[np.where(real, lists.offset[ids, None] + order, 0)], 0), real
