"""F3. Networks whose gradient can be written down: a chain of linear layers, activations and dropouts, for a stack of clients at once.

The gradient of a linear layer's weight is one matrix product, `d^T x`. Written out, it is added to the weight in the product itself
(`baddbmm_`), so no gradient is ever stored: on a CPU that halves the time of a step of a perceptron.

C = clients, B = batch. Tensors carry the C axis here, unlike anywhere in a module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim.models.dropout import Dropout
from fedsim.types import Draws

Tensors = dict[str, Tensor]

Move = Callable[[str, Tensor, Tensor | None], None]
"""Take a step along the gradient of a stacked parameter: `move(name, a, b)` along the product `a @ b`, or along `a` where `b` is None."""


class Link(ABC):
    """A layer of a chain, for a stack of clients `[C, B, ...]`."""

    @abstractmethod
    def forward(self, w: Tensors, x: Tensor, draws: Draws) -> Tensor:
        """The output, from the input."""

    @abstractmethod
    def backward(self, w: Tensors, x: Tensor, y: Tensor, d: Tensor, draws: Draws, first: bool, move: Move) -> Tensor:
        """The loss's derivative in the input `x`, from that in the output `y`; moves this layer's parameters. `first`: nobody needs it."""


@dataclass(frozen=True)
class Dense(Link):
    """`y = x W^T + b`, with `W [C, out, in]` and `b [C, out]` under their names."""

    weight: str
    bias: str | None

    def forward(self, w: Tensors, x: Tensor, draws: Draws) -> Tensor:
        transposed = w[self.weight].transpose(1, 2)
        return torch.bmm(x, transposed) if self.bias is None else torch.baddbmm(w[self.bias][:, None], x, transposed)

    def backward(self, w: Tensors, x: Tensor, y: Tensor, d: Tensor, draws: Draws, first: bool, move: Move) -> Tensor:
        below = d if first else torch.bmm(d, w[self.weight])  # before the weight moves
        move(self.weight, d.transpose(1, 2), x)  # [C, out, B] @ [C, B, in]
        if self.bias is not None:
            move(self.bias, d.sum(1), None)
        return below


@dataclass(frozen=True)
class Pointwise(Link):
    """An activation, and its derivative as a function of (the derivative in its output, its output)."""

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor], Tensor]

    def forward(self, w: Tensors, x: Tensor, draws: Draws) -> Tensor:
        return self.function(x)

    def backward(self, w: Tensors, x: Tensor, y: Tensor, d: Tensor, draws: Draws, first: bool, move: Move) -> Tensor:
        return self.derivative(d, y)


@dataclass(frozen=True)
class Masked(Link):
    """Dropout with the uniform numbers of a step, `[C, B, ...]` under `name`."""

    layer: Dropout
    name: str

    def forward(self, w: Tensors, x: Tensor, draws: Draws) -> Tensor:
        return x * self._mask(x, draws)

    def backward(self, w: Tensors, x: Tensor, y: Tensor, d: Tensor, draws: Draws, first: bool, move: Move) -> Tensor:
        return d * self._mask(x, draws)

    def _mask(self, x: Tensor, draws: Draws) -> Tensor:
        return (draws[self.name] >= self.layer.p).to(x.dtype) / (1 - self.layer.p)


def _relu_backward(d: Tensor, y: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(d, y, 0)


_ACTIVATIONS: dict[type[nn.Module], Pointwise] = {
    nn.ReLU: Pointwise(torch.relu, _relu_backward),
    nn.Tanh: Pointwise(torch.tanh, torch.ops.aten.tanh_backward),
    nn.Sigmoid: Pointwise(torch.sigmoid, torch.ops.aten.sigmoid_backward),
}


def chain_of(module: nn.Module, shape: tuple[int, ...]) -> tuple[Link, ...] | None:
    """The links of a network that is a chain on examples of `shape`, or None. Inputs are to be flattened first, `[C, B, features]`.

    A chain is an `nn.Sequential`, nested or not, of plain `Linear`, `ReLU`, `Tanh`, `Sigmoid`, `Identity` and dropout layers, none of them
    used twice or hooked into, with a `Flatten` in front where examples have several dimensions.
    """
    parts = _parts(module)
    if parts and _flattens(parts[0][1]):
        parts = parts[1:]
    elif len(shape) > 1:
        return None
    links = [_link(path, part) for path, part in parts if not isinstance(part, nn.Identity)]
    once = len({id(part) for _, part in parts}) == len(parts)
    if not once or None in links or not any(isinstance(link, Dense) for link in links):
        return None
    return tuple(link for link in links if link is not None)


def _parts(module: nn.Module, path: str = "") -> list[tuple[str, nn.Module]]:
    """The layers of nested sequences in the order in which they run, each with the prefix of its parameters' names."""
    if type(module) is not nn.Sequential or _hooked(module):
        return [(path, module)]
    return [each for name, part in module._modules.items() if part is not None for each in _parts(part, f"{path}{name}.")]


def _link(path: str, part: nn.Module) -> Link | None:
    """A layer as a link, or None where it is none."""
    if _hooked(part):
        return None
    if type(part) is nn.Linear:
        return Dense(f"{path}weight", None if part.bias is None else f"{path}bias")
    if type(part) is Dropout:
        return Masked(part, f"{path}uniform")
    return _ACTIVATIONS.get(type(part))


def _flattens(part: nn.Module) -> bool:
    return type(part) is nn.Flatten and (part.start_dim, part.end_dim) == (1, -1) and not _hooked(part)


def _hooked(part: nn.Module) -> bool:
    return bool(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks)
