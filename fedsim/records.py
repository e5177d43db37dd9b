"""F1. What crosses between us and Flower's classes: models as `ArrayRecord`s, and objects whose memory becomes a value.

Flower is imported where it is used, because it is slow to import.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import FedsimError
from fedsim.params import Params
from fedsim.rng import Key, fold
from fedsim.tree import record


@record
class Held:
    """Arrays by name, as Flower's `ArrayRecord` holds them."""

    arrays: dict[str, Tensor]


def to_arrays(w: Params) -> Any:
    """A model as Flower's `ArrayRecord`; bfloat16, which NumPy does not know, as float32."""
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({name: Array(as_numpy(value)) for name, value in w.items()})


def from_arrays(arrays: Any, like: Params) -> Params:
    """A model in Flower's terms as one of ours, in the types and on the device of `like`."""
    return Params({name: torch.from_numpy(np.array(arrays[name].numpy())).to(value).view(value.shape) for name, value in like.items()})


def as_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor as an array on the CPU."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def remembered(stock: Any, fresh: Any) -> dict[str, Any]:
    """What an object keeps on itself that it was not made with, as a pytree."""
    made = {name: value for name, value in vars(fresh).items() if _plain(value)}
    kept = {name: value for name, value in vars(stock).items() if not callable(value)}
    changed = {name for name, value in kept.items() if name not in made or not _plain(value) or value != made[name]}
    return {name: _freeze(kept[name], name) for name in sorted(changed)}


def _plain(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float, str)


def _freeze(value: Any, name: str) -> Any:
    from flwr.app import ArrayRecord

    if _plain(value):
        return value
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.array(value))
    if isinstance(value, ArrayRecord):
        return Held({key: torch.from_numpy(np.array(array.numpy())) for key, array in value.items()})
    if type(value) in (list, tuple):
        return type(value)(_freeze(each, name) for each in value)
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {key: _freeze(each, name) for key, each in value.items()}
    raise FedsimError(f"a Flower strategy keeps a {type(value).__name__} in `{name}`, which cannot be checkpointed; arrays and numbers can")


def thaw(value: Any) -> Any:
    """What an object kept, from its value: the inverse of `remembered`, for one attribute."""
    from flwr.app import Array, ArrayRecord

    if isinstance(value, Tensor):
        return value.numpy().copy()
    if isinstance(value, Held):
        return ArrayRecord({key: Array(tensor.numpy()) for key, tensor in value.arrays.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(thaw(each) for each in value)
    return {key: thaw(each) for key, each in value.items()} if isinstance(value, dict) else value


@contextmanager
def in_flower(key: Key, quiet: bool = True) -> Iterator[None]:
    """A place in which Flower's classes find what they look for, in any process.

    Messages can be made, as if by a server; Python's and NumPy's own generators start at `key`, and are afterwards where they were.
    `quiet`: Flower's log of every round is left out, but for errors.
    """
    from flwr.common.constant import SUPERLINK_NODE_ID
    from flwr.supercore.task_identity import TaskIdentity

    logger, who = logging.getLogger("flwr"), ("_task_id", "_run_id", "_node_id")
    before = logger.level, random.getstate(), np.random.get_state(), [getattr(TaskIdentity, name) for name in who]  # noqa: NPY002
    if quiet:
        logger.setLevel(logging.ERROR)
    random.seed(fold(key, 1))
    np.random.seed(fold(key, 2) & 0xFFFFFFFF)  # noqa: NPY002  (what Flower's classes draw from)
    for name, value, known in zip(who, (1, 1, SUPERLINK_NODE_ID), before[3], strict=True):
        setattr(TaskIdentity, name, value if known is None else known)
    try:
        yield
    finally:
        logger.setLevel(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])  # noqa: NPY002
        for name, known in zip(who, before[3], strict=True):
            setattr(TaskIdentity, name, known)
