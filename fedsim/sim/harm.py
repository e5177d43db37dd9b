"""What happens to messages and payloads on their way: a noisy channel, clients that send something else, updates that arrive broken.

Drawn by key for each client and round, so it does not depend on how clients are grouped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim import rng
from fedsim.fleet import Fates, Fleet
from fedsim.tree import misfit, record, rows, tree_leaves, tree_map

_DOWN, _UP, _ATTACK = range(3)

# What is drawn of the port's key, folded after it.
_BYZANTINE, _FATES, _HARM = range(12, 15)


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


@dataclass(frozen=True)
class Mishaps:
    """What befalls the jobs of a fleet.

    Attributes:
        fleet: how often, and of what kind.
        byzantine: who attacks, `[N]` bool.
        key: the port's.
    """

    fleet: Fleet
    byzantine: np.ndarray
    key: rng.Key

    @staticmethod
    def of(fleet: Fleet, clients: int, key: rng.Key) -> Mishaps:
        attack = fleet.faults.byzantine
        who = attack.draw(clients, rng.fold(key, _BYZANTINE)) if attack else np.zeros(clients, dtype=bool)
        return Mishaps(fleet, who, key)

    def fates(self, ids: np.ndarray, t: np.ndarray) -> Fates:
        """How jobs end that clients were given in rounds `t`. `[C], [C] -> [C]`."""
        channel = self.fleet.channel
        return self.fleet.faults.draw(self._keys(_FATES, ids, t), channel.down.erasure, channel.up.erasure)

    def harm(self, ids: np.ndarray, t: np.ndarray) -> Harm | None:
        """What befalls the messages of such jobs; None where nothing can."""
        faults, channel = self.fleet.faults, self.fleet.channel
        attack = faults.byzantine
        if not (attack or faults.corrupt.nan or faults.corrupt.shape or channel.down.noise or channel.up.noise):
            return None
        fates, bad = self.fates(ids, t), torch.from_numpy(self.byzantine[ids])
        factor, noise = torch.ones(len(ids)), torch.zeros(len(ids))
        if attack and attack.attack == "noise":
            noise[bad] = attack.strength
        elif attack:
            factor[bad] = attack.strength * (-1 if attack.attack == "sign-flip" else 1)
        broken = torch.from_numpy(fates.nan), torch.from_numpy(fates.bent)
        return Harm(factor, noise, *broken, channel.down.noise, channel.up.noise, self._keys(_HARM, ids, t))

    def _keys(self, purpose: int, ids: np.ndarray, t: np.ndarray) -> rng.Keys:
        return rng.fold_each(rng.fold_each(rng.fold(self.key, purpose), t), ids)


def received(copies: Any, harm: Harm) -> Any:
    """Messages `[C, ...]` as each client receives them."""
    return _noisy(copies, torch.full((len(harm.keys),), harm.down), harm.keys, _DOWN)


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
