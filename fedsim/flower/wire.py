"""Pytrees as Flower's records, and back, with every check that an update from somebody else's machine has to pass.

Tensors are named by their path in the tree, and travel as one array in the format of safetensors: Flower sends each array by requests of
its own, which for a small model take longer than everything else in a round. What is left of the tree, its *outline*, is JSON. An order
carries its outline, and only `Params` and records that this installation knows can come out of it. An update carries none: the server knows
which form is due (`like`), so a reply can be nothing but numbers in that form. Nothing is pickled.

Where an app has arrays of its own (`from_fedsim`), they are NumPy's; bfloat16, which NumPy does not have, travels as its bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord
from safetensors import SafetensorError
from safetensors.torch import load as load_packed
from safetensors.torch import save as save_packed
from torch import Tensor

from fedsim.errors import FedsimError
from fedsim.tree import device_of, dump, finite, load, tree_leaves

NUMPY = "numpy.ndarray"
"""Flower's name for arrays in NumPy's own format."""

PACKED = "safetensors"
"""The name, and the kind, of the one array that holds tensors by name."""

ROOT = "value"
"""The name of a tensor that is the whole tree."""


class Malformed(FedsimError):
    """What arrived is not what was due; the message is the reason."""


def encode(tensor: Tensor) -> Array:
    """A tensor as Flower's array. Inverse: `decode`."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype != torch.bfloat16:
        return Array(tensor.numpy())
    bits = Array(tensor.view(torch.uint16).numpy())
    return Array("bfloat16", tuple(tensor.shape), NUMPY, bits.data)


def decode(array: Array, name: str) -> Tensor:
    """Flower's array as a tensor of its own memory. Raises `Malformed` unless it is whole, and plain numbers."""
    if array.stype != NUMPY:
        raise Malformed(f"array {name} is a {array.stype!r}, not a {NUMPY}")
    stream = BytesIO(array.data)
    try:
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[np.lib.format.read_magic(stream)]
        shape, by_column, dtype = read(stream)
    except (ValueError, KeyError, EOFError) as error:
        raise Malformed(f"array {name} is not in NumPy's format") from error
    body = memoryview(array.data)[stream.tell() :]
    if dtype.kind not in "biuf" or not dtype.isnative or math.prod(shape) * dtype.itemsize != len(body):
        raise Malformed(f"array {name} holds {len(body)} bytes, which are no {dtype}{list(shape)}")
    if array.dtype not in (str(dtype), "bfloat16") or tuple(array.shape) != shape:
        raise Malformed(f"array {name} says it is {array.dtype}{list(array.shape)}, but holds {dtype}{list(shape)}")
    values = np.frombuffer(body, dtype=dtype).reshape(shape, order="F" if by_column else "C")
    try:
        tensor = torch.from_numpy(np.array(values, order="C"))
    except TypeError as error:
        raise Malformed(f"array {name} is a {dtype}, which a tensor cannot be") from error
    if array.dtype != "bfloat16":
        return tensor
    if tensor.dtype != torch.uint16:
        raise Malformed(f"array {name} says it is bfloat16, but holds {dtype}")
    return tensor.view(torch.bfloat16)


def pack(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors by name as one array, or none where there are no tensors. Inverse: `unpack`."""
    if not tensors:
        return ArrayRecord()
    data = save_packed({name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()})
    return ArrayRecord({PACKED: Array("uint8", (len(data),), PACKED, data)})


def unpack(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors in a record, by name, in memory of their own. Raises `Malformed` unless it is what `pack` makes."""
    if not record:
        return {}
    if list(record) != [PACKED] or record[PACKED].stype != PACKED:
        kinds = sorted({f"{name} ({array.stype})" for name, array in record.items()})
        raise Malformed(f"message has the arrays {_some(kinds)}, not one of {PACKED}")
    try:
        return load_packed(record[PACKED].data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise Malformed(f"message is not in the format of {PACKED}: {error}") from error


def arrays(tree: Any) -> tuple[ArrayRecord, str]:
    """The tensors of a pytree, and its outline. Inverse: `tree_of`."""
    tensors, outline = dump(tree)
    if _has_leaf(outline):
        raise FedsimError("a message holds a table with a row for each client, which cannot be sent; send the rows that clients need")
    return pack({_name(path): tensor for path, tensor in tensors.items()}), json.dumps(outline)


def tree_of(record: ArrayRecord, outline: str) -> Any:
    """The pytree of an order. Raises `Malformed` where arrays and outline do not go together, or values are not finite."""
    try:
        plan = json.loads(outline)
        if _has_leaf(plan):
            raise Malformed("message refers to files")
        tensors = _Named(unpack(record))
        tree = load(tensors, plan)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Malformed(f"message cannot be read: {type(error).__name__}: {error}") from error
    if left := sorted(set(tensors) - tensors.used):
        raise Malformed(f"message has arrays that its outline does not name: {_some(left)}")
    if not all(bool(torch.isfinite(leaf).all()) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()):
        raise Malformed("message is not finite")
    return tree


class _Named(dict[str, Tensor]):
    """Tensors by the names they have on the wire, looked up by their paths."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__(tensors)
        self.used: set[str] = set()

    def __getitem__(self, path: str) -> Tensor:
        self.used.add(_name(path))
        return super().__getitem__(_name(path))


def read(tensors: Mapping[str, Tensor], like: Any, count: int | None = None) -> Any:
    """The pytree in the form of `like` that tensors by name make up; with `count`, a stack `[count, ...]` of such. Raises `Malformed`.

    Names, dtypes and shapes are checked here; see `faults` for the values.
    """
    due, outline = dump(like)
    names = {_name(path): tensor for path, tensor in due.items()}
    if missing := sorted(names.keys() - tensors.keys()):
        raise Malformed(f"update lacks {_some(missing)}")
    if foreign := sorted(tensors.keys() - names.keys()):
        raise Malformed(f"update has {_some(foreign)}, which the model has not")
    ahead = () if count is None else (count,)
    for name, want in names.items():
        found, shape = tensors[name], (*ahead, *want.shape)
        if found.dtype != want.dtype or tuple(found.shape) != shape:
            raise Malformed(f"update has {_kind(found.dtype)}{list(found.shape)} at {name}, not {_kind(want.dtype)}{list(shape)}")
    return load(_Named(tensors), outline, device=device_of(like))


def faults(stack: Any, most: float | None = None) -> dict[int, str]:
    """Which rows of a stack of updates `[C, ...]` are refused, and why: not finite, or longer than `most` (None: any length will do)."""
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(stack)):
        return {}
    refused = {int(c): "update is not finite" for c in torch.nonzero(~finite(stack))[:, 0]}
    if most is not None:
        leaves = [leaf for leaf in tree_leaves(stack) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        norms = torch.stack([leaf[:, None].flatten(1).double().norm(dim=1) for leaf in leaves]).norm(dim=0)  # [C]
        refused = {int(c): f"update is longer than {most:g}" for c in torch.nonzero(norms > most)[:, 0]} | refused
    return refused


def metrics_record(metrics: Mapping[str, tuple[Tensor, Tensor]]) -> MetricRecord:
    """Metrics of some clients, `{name: (sum [C], weight [C])}`. Inverse: `metrics_of`."""
    lists = {name: (value.double().flatten().tolist(), weight.double().flatten().tolist()) for name, (value, weight) in metrics.items()}
    return MetricRecord({f"{name}.{part}": both[i] for name, both in lists.items() for i, part in enumerate(("sum", "weight"))})


def metrics_of(record: MetricRecord, count: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Inverse of `metrics_record`, for `count` clients. Raises `Malformed`."""
    out = {}
    names = {key.rpartition(".")[0] for key in record}
    for name in sorted(names):
        pair = [record.get(f"{name}.{part}") for part in ("sum", "weight")]
        if any(not isinstance(each, list) or len(each) != count for each in pair):
            raise Malformed(f"metric {name} is not a sum and a weight for each of {count} clients")
        out[name] = (torch.tensor(pair[0], dtype=torch.float64), torch.tensor(pair[1], dtype=torch.float64))
        if not bool(torch.isfinite(torch.stack(out[name])).all()):
            raise Malformed(f"metric {name} is not finite")
    if len(record) != 2 * len(names):
        raise Malformed("metrics are not sums and weights")
    return out


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _name(path: str) -> str:
    return path.removeprefix("/") or ROOT


def _has_leaf(outline: Any) -> bool:
    if isinstance(outline, dict):
        return "leaf" in outline or any(map(_has_leaf, outline.values()))
    return isinstance(outline, list) and any(map(_has_leaf, outline))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
