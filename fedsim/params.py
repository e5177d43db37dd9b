"""F0. `Params`: a named vector with arithmetic, so that equations never loop over names.

    w + eta * d          a.dot(b)          (w - v).norm()          shared | personal

One client's parameters, or a stack of them `[C, ...]`; a tensor of shape `[C]` scales the rows of a stack.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Union

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Operand = Union["Params", Tensor, float, int]


class Params(Mapping[str, Tensor]):
    """An immutable mapping from names to tensors, with the arithmetic of a vector space (and elementwise `*`, `/`, `sqrt`)."""

    __slots__ = ("_tensors",)
    __array_ufunc__ = None  # `numpy.float64(2) * w` is ours to compute

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return "Params(" + ", ".join(f"{k}: {list(v.shape)}" for k, v in self._tensors.items()) + ")"

    def map(self, f: Callable[..., Tensor], *others: "Params") -> "Params":
        """`f` of each tensor, together with its namesakes in `others`. Names must agree."""
        for other in others:
            if self._tensors.keys() != other._tensors.keys():
                differ = sorted(self._tensors.keys() ^ other._tensors.keys())
                raise KeyError(f"these parameters are in one operand only: {', '.join(differ)}")
        return Params({k: f(v, *(o._tensors[k] for o in others)) for k, v in self._tensors.items()})

    def _binary(self, op: Callable[[Any, Any], Any], other: Operand) -> "Params":
        if isinstance(other, Params):
            return self.map(op, other)
        if isinstance(other, Tensor) and other.ndim == 1:  # one factor a row: [C] against [C, ...]
            return self.map(lambda v: op(v, other.reshape(-1, *[1] * (v.ndim - 1))))
        return self.map(lambda v: op(v, other))

    def __add__(self, other: Operand) -> "Params":
        return self._binary(operator.add, other)

    def __sub__(self, other: Operand) -> "Params":
        return self._binary(operator.sub, other)

    def __mul__(self, other: Operand) -> "Params":
        return self._binary(operator.mul, other)

    def __truediv__(self, other: Operand) -> "Params":
        return self._binary(operator.truediv, other)

    def __neg__(self) -> "Params":
        return self.map(operator.neg)

    __radd__ = __add__
    __rmul__ = __mul__

    def plus(self, other: "Params", scale: Tensor | float) -> "Params":
        """`self + scale * other`, in one pass where `scale` is a number."""
        if isinstance(scale, Tensor):
            return self + other * scale
        return self.map(lambda v, u: torch.add(v, u, alpha=scale), other)

    def __or__(self, other: "Params") -> "Params":
        """Names of both; where a name is in both, `other` wins: `shared | personal`."""
        return Params({**self._tensors, **other._tensors})

    def sqrt(self) -> "Params":
        return self.map(torch.sqrt)

    def sign(self) -> "Params":
        return self.map(torch.sign)

    def zeros(self) -> "Params":
        """The zero vector of this space."""
        return self.map(torch.zeros_like)

    def detach(self) -> "Params":
        return self.map(Tensor.detach)

    def to(self, *args: Any) -> "Params":
        return self.map(lambda v: v.to(*args))

    def dot(self, other: "Params") -> Tensor:
        """Inner product over all names: a scalar."""
        return torch.stack(list(self.map(lambda a, b: (a * b).sum(), other).values())).sum()

    def norm(self) -> Tensor:
        """Euclidean length: a scalar. Of a stack, see `row_norms`."""
        return self.dot(self).sqrt()

    def row_norms(self) -> Tensor:
        """Euclidean length of each row of a stack. `[C, ...] -> [C]`."""
        return self.flat().norm(dim=1)

    def flat(self) -> Tensor:
        """A stack as a matrix, names side by side. `[C, ...] -> [C, P]`."""
        return torch.cat([v[:, None].flatten(1) for v in self.values()], dim=1)

    def vector(self) -> Tensor:
        """All entries as a vector `[P]`, names side by side. Inverse: `from_flat`."""
        return torch.cat([v.reshape(-1) for v in self.values()])

    def from_flat(self, vector: Tensor) -> "Params":
        """A vector `[P]` cut into tensors of this (unstacked) shape."""
        parts = vector.split([v.numel() for v in self.values()])
        return Params({k: p.view(v.shape) for (k, v), p in zip(self.items(), parts, strict=True)})

    @property
    def size(self) -> int:
        """Number of entries."""
        return sum(v.numel() for v in self.values())


pytree.register_pytree_node(
    Params,
    lambda p: (list(p._tensors.values()), tuple(p._tensors)),
    lambda values, names: Params(dict(zip(names, values, strict=True))),
    serialized_type_name="fedsim.params.Params",
    flatten_with_keys_fn=lambda p: ([(pytree.MappingKey(name), value) for name, value in p.items()], tuple(p._tensors)),
)
