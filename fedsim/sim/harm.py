"""What happens to messages and payloads on their way: a noisy channel, clients that send something else, updates that arrive broken.

Drawn by key for each client, so it does not depend on how clients are grouped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim import rng
from fedsim.tree import misfit, record, rows, tree_leaves, tree_map

_DOWN, _UP, _ATTACK = range(3)


@record
class Harm:
    """What befalls the messages of some clients, `[C]`.

    Attributes:
        factor: what a payload is multiplied by.
        attack: standard deviation of noise on it, in units of its root mean square.
        nan, bent: whether it arrives with numbers that are not numbers, or in another shape.
        down, up: standard deviation of the channel's noise, the same for all.
        keys: one each.
    """

    factor: Tensor
    attack: Tensor
    nan: Tensor
    bent: Tensor
    down: float
    up: float
    keys: np.ndarray

    def take(self, index: Any) -> Harm:
        """The chosen clients."""
        factor, attack, nan, bent = (field[index] for field in (self.factor, self.attack, self.nan, self.bent))
        return Harm(factor, attack, nan, bent, self.down, self.up, self.keys[index])


def received(message: Any, harm: Harm) -> Any:
    """The message as each client receives it, stacked `[C, ...]`."""
    count = len(harm.keys)
    copies = tree_map(lambda leaf: leaf.expand(count, *leaf.shape), message)
    return _noisy(copies, torch.full((count,), harm.down), harm.keys, _DOWN)


def sent(payload: Any, harm: Harm) -> Any:
    """Payloads `[C, ...]` as they arrive, but for their shape."""
    count = len(harm.keys)
    if bool((harm.factor != 1).any()):
        payload = tree_map(lambda leaf: leaf * _column(harm.factor, leaf) if leaf.is_floating_point() else leaf, payload)
    if bool(harm.attack.any()):
        leaves = [leaf.flatten(1).double() for leaf in tree_leaves(payload) if leaf.is_floating_point()]
        squares, width = sum(leaf.square().sum(1) for leaf in leaves), sum(leaf.shape[1] for leaf in leaves)
        payload = _noisy(payload, harm.attack * (squares / width).sqrt().cpu(), harm.keys, _ATTACK)
    if harm.up:
        payload = _noisy(payload, torch.full((count,), harm.up), harm.keys, _UP)
    if bool(harm.nan.any()):
        broken = torch.where(harm.nan, torch.nan, 0.0)
        payload = tree_map(lambda leaf: leaf + _column(broken, leaf) if leaf.is_floating_point() else leaf, payload)
    return payload


def refused(payload: Any, harm: Harm) -> dict[int, str]:
    """Rows that arrive in another shape, `{row: why they are refused}`: as from a client whose model is one number short."""
    out = {}
    for c in torch.nonzero(harm.bent)[:, 0].tolist():
        due = rows(payload, c)
        arrived = tree_map(lambda leaf: leaf.reshape(-1)[1:], due)
        out[c] = misfit(arrived, due) or ""
    return {c: why for c, why in out.items() if why}


def _noisy(stack: Any, std: Tensor, keys: rng.Keys, purpose: int) -> Any:
    """Independent Gaussian noise of `std` `[C]` on every number of each row."""
    some = np.flatnonzero(std.numpy() > 0)
    if not len(some):
        return stack
    purposes = rng.fold_each(keys[some], np.array([purpose]))
    number = -1

    def add(leaf: Tensor) -> Tensor:
        nonlocal number
        number += 1
        if not leaf.is_floating_point():
            return leaf
        z = torch.from_numpy(rng.normal(rng.fold_each(purposes, np.array([number])), leaf.shape[1:])).to(leaf)
        noisy = leaf.clone()
        noisy[torch.from_numpy(some)] += z * _column(std[torch.from_numpy(some)], z)
        return noisy

    return tree_map(add, stack)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """`[C]` as `[C, 1, ...]`, to multiply rows."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))
