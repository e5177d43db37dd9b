"""F0. Pytrees: frozen records that nest, and their form as named arrays plus JSON.

A `@record` is a frozen dataclass that torch treats as a container (`vmap`, `tree_map` go through it). `dump` turns any pytree of
tensors, numbers and strings into `(arrays, outline)`, `load` turns it back; only classes that were declared with `@record` (or
are `Params`) can come out, so nothing is ever unpickled.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar, dataclass_transform

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fedsim.errors import FedsimError
from fedsim.params import Params

C = TypeVar("C", bound=type)

_RECORDS: dict[str, type] = {}

tree_map = pytree.tree_map
tree_leaves = pytree.tree_leaves


@dataclass_transform(frozen_default=True)
def record(cls: C) -> C:
    """Make a class a frozen dataclass whose fields are the children of a pytree node."""
    cls = dataclasses.dataclass(frozen=True)(cls)  # type: ignore[assignment]
    names = tuple(f.name for f in dataclasses.fields(cls))
    key = f"{cls.__module__}.{cls.__qualname__}"
    pytree.register_pytree_node(
        cls,
        lambda value: ([getattr(value, n) for n in names], None),
        lambda children, _: cls(*children),
        serialized_type_name=key,
        flatten_with_keys_fn=lambda value: ([(pytree.GetAttrKey(n), getattr(value, n)) for n in names], None),
    )
    _RECORDS[key] = cls
    return cls


class Leaf(ABC):
    """A leaf of a pytree that is neither a tensor nor a number, and says itself how it is kept in a checkpoint."""

    _known: ClassVar[dict[str, type["Leaf"]]] = {}

    def __init_subclass__(cls) -> None:
        cls._known[f"{cls.__module__}.{cls.__qualname__}"] = cls

    @abstractmethod
    def save(self) -> Any:
        """A pytree of what `load` needs. May leave large things in files of the run folder."""

    @classmethod
    @abstractmethod
    def load(cls, saved: Any, folder: Path | None) -> "Leaf":
        """Inverse of `save`; `folder` is the run folder."""


def dump(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Named tensors and a JSON outline of a pytree. Inverse: `load`."""
    arrays: dict[str, Tensor] = {}

    def outline(node: Any, path: str) -> Any:
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        if isinstance(node, Tensor):
            while path in arrays:
                path += "'"
            arrays[path] = node.detach().cpu().contiguous()
            return {"tensor": path} if node.device.type == "cpu" else {"tensor": path, "accelerated": True}
        if isinstance(node, Leaf):
            return {"leaf": f"{type(node).__module__}.{type(node).__qualname__}", "saved": outline(node.save(), path)}
        if isinstance(node, Params):
            return {"params": [[k, outline(v, f"{path}/{k}")] for k, v in node.items()]}
        if dataclasses.is_dataclass(node):
            kind = f"{type(node).__module__}.{type(node).__qualname__}"
            if kind not in _RECORDS:
                raise FedsimError(f"{kind} cannot be saved: declare it with @record")
            fields = {f.name: outline(getattr(node, f.name), f"{path}/{f.name}") for f in dataclasses.fields(node)}
            return {"record": kind, "fields": fields}
        if type(node) in (tuple, list):
            return {type(node).__name__: [outline(v, f"{path}/{i}") for i, v in enumerate(node)]}
        if isinstance(node, dict):
            return {"dict": [[k, outline(v, f"{path}/{k}")] for k, v in node.items()]}
        raise FedsimError(f"a {type(node).__name__} cannot be saved (at {path})")

    return arrays, outline(tree, "")


_BUILD: dict[str, Callable[[Any, Callable[[Any], Any]], Any]] = {
    "params": lambda body, build: Params({k: build(v) for k, v in body}),
    "tuple": lambda body, build: tuple(build(v) for v in body),
    "list": lambda body, build: [build(v) for v in body],
    "dict": lambda body, build: {k: build(v) for k, v in body},
}


def load(arrays: dict[str, Tensor], outline: Any, folder: Path | None = None, device: torch.device | str = "cpu") -> Any:
    """The pytree that `dump` described.

    `folder` is the run folder, for leaves that left something in it; tensors that were not in RAM come to `device`.
    """

    def build(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if "record" in node:
            if node["record"] not in _RECORDS:
                raise FedsimError(f"the checkpoint holds a {node['record']}, which this installation does not know")
            return _RECORDS[node["record"]](**{k: build(v) for k, v in node["fields"].items()})
        if "leaf" in node:
            return Leaf._known[node["leaf"]].load(build(node["saved"]), folder)
        if "tensor" in node:
            return arrays[node["tensor"]].to(device if "accelerated" in node else "cpu")
        ((kind, body),) = node.items()
        return _BUILD[kind](body, build)

    return build(outline)


def rows(tree: Any, index: Any) -> Any:
    """Rows of a stacked pytree: `leaf[index]` for each leaf `[C, ...]`. A slice or a number gives a view."""
    if isinstance(index, Tensor) and index.dtype == torch.int64 and index.ndim == 1:  # nearly twice as fast
        return tree_map(lambda leaf: leaf.index_select(0, index.to(leaf.device)) if type(leaf) is Tensor else leaf[index], tree)
    return tree_map(lambda leaf: leaf[index], tree)


def put(tree: Any, index: Tensor, new: Any) -> Any:
    """A stacked pytree in which the rows `index` `[U]` are those of `new`. `[C, ...], [U, ...] -> [C, ...]`."""
    return tree_map(lambda old, value: old.index_copy(0, index.to(old.device), value), tree, new)


def stack(trees: list[Any]) -> Any:
    """Pytrees of one structure, stacked: leaves `[...] -> [C, ...]`."""
    return tree_map(lambda *leaves: torch.stack([torch.as_tensor(leaf) for leaf in leaves]), *trees)


def concat(trees: list[Any]) -> Any:
    """Stacked pytrees of one structure, end to end: leaves `[C_k, ...] -> [sum C_k, ...]`."""
    return tree_map(lambda *leaves: torch.cat(leaves), *trees) if len(trees) > 1 else trees[0]


def add(a: Any, b: Any) -> Any:
    """Leaf by leaf sum of two pytrees of one structure."""
    return tree_map(lambda x, y: x + y, a, b)


def weighted_sum(tree: Any, weight: Tensor) -> Any:
    """`sum_c weight[c] * leaf[c]` for each leaf. `[C, ...], [C] -> [...]`."""
    if len(weight) == 1:  # the same product, four times faster
        return tree_map(lambda leaf: weight.to(leaf) * leaf[0], tree)
    return tree_map(lambda leaf: torch.tensordot(weight.to(leaf), leaf, dims=1), tree)


def device_of(tree: Any) -> torch.device:
    """Where those tensors of a pytree are that are not in RAM; the CPU where all are."""
    return next((leaf.device for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device.type != "cpu"), torch.device("cpu"))


def nbytes(tree: Any) -> int:
    """What the tensors of a pytree weigh, in bytes."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def finite(tree: Any) -> Tensor:
    """Whether each row of a stacked pytree is free of NaN and infinity. `[C, ...] -> [C] bool`."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    leaves = [leaf[:, None].flatten(1) for leaf in tensors if leaf.is_floating_point()]
    if not leaves:
        return tensors[0].new_ones(len(tensors[0]), dtype=torch.bool)
    # NaN and infinity survive a sum. So may an overflow of finite numbers: only then look at each.
    ok = torch.stack([torch.isfinite(leaf.sum(1)) for leaf in leaves]).all(0)
    return ok if bool(ok.all()) else torch.stack([torch.isfinite(leaf).all(1) for leaf in leaves]).all(0)


def misfit(tree: Any, like: Any) -> str | None:
    """What is wrong with the form of a pytree that should be as `like` (names, shapes, dtypes), in words, or None."""
    (leaves, form), (due, expected) = (pytree.tree_flatten_with_path(each) for each in (tree, like))
    if form != expected:
        return "update has other parts than the model"
    for (path, leaf), (_, want) in zip(leaves, due, strict=True):
        if leaf.shape != want.shape or leaf.dtype != want.dtype:
            name = pytree.keystr(path)
            return f"update has {_form(leaf)} at {name}, not {_form(want)}"
    return None


def _form(leaf: Tensor) -> str:
    return f"{str(leaf.dtype).removeprefix('torch.')}[{', '.join(map(str, leaf.shape))}]"


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a tensor was in a tree that `flatten` emptied, and whether it was not in RAM."""

    shape: torch.Size
    dtype: torch.dtype
    accelerated: bool


def flatten(tree: Any) -> tuple[list[Tensor], Any]:
    """One contiguous vector in RAM for each dtype of a pytree, and the tree with a `Slot` in place of each tensor."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    dtypes = dict.fromkeys(leaf.dtype for leaf in tensors)
    empty = tree_map(lambda leaf: Slot(leaf.shape, leaf.dtype, leaf.device.type != "cpu") if isinstance(leaf, Tensor) else leaf, tree)
    return [torch.cat([leaf.detach().cpu().reshape(-1) for leaf in tensors if leaf.dtype == d]) for d in dtypes], empty


def unflatten(vectors: list[Tensor], empty: Any, device: torch.device | str = "cpu") -> Any:
    """Inverse of `flatten`; tensors that were not in RAM come to `device`.

    Leaves are fresh tensors: a view into a vector may be aligned otherwise, and round otherwise.
    """
    by_dtype = {v.dtype: v for v in vectors}
    offset = dict.fromkeys(by_dtype, 0)

    def fill(slot: Any) -> Any:
        if not isinstance(slot, Slot):
            return slot
        start = offset[slot.dtype]
        offset[slot.dtype] = end = start + slot.shape.numel()
        leaf = by_dtype[slot.dtype][start:end].view(slot.shape)
        return leaf.to(device) if slot.accelerated and torch.device(device).type != "cpu" else leaf.clone()

    return tree_map(fill, empty)
