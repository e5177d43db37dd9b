"""F3. Networks whose gradient can be written down: chains of linear layers, convolutions, activations and dropouts, for a stack of clients.

The gradient of a linear layer's weight is one matrix product, `d^T x`. Written out, it is added to the weight in the product itself
(`baddbmm_`), so no gradient is ever stored: on a CPU that halves the time of a step of a perceptron. A convolution is the same product, of
patches; clients that each have kernels of their own would otherwise be groups of one convolution, which libraries for GPUs do slowly.

C = clients, B = batch. Tensors carry the C axis here, unlike anywhere in a module.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsim.models.dropout import Dropout
from fedsim.types import Draws

Tensors = dict[str, Tensor]

Move = Callable[[str, Tensor, Tensor | None], None]
"""Take a step along the gradient of a stacked parameter: `move(name, a, b)` along the product `a @ b`, or along `a` where `b` is None."""


def matrix(parameter: Tensor) -> Tensor:
    """A stacked parameter as what a chain multiplies by: kernels `[C, out, ch, kh, kw]` as `[C, out, kh kw ch]`, all else as it is.

    Of one that came from `unshared`, a view.
    """
    return parameter if parameter.ndim < 5 else parameter.permute(0, 1, 3, 4, 2).flatten(2)


def unshared(parameter: Tensor) -> Tensor:
    """A copy of a stacked parameter, in the order in which `matrix` reads it."""
    if parameter.ndim < 5:
        return parameter.clone(memory_format=torch.contiguous_format)
    return parameter.permute(0, 1, 3, 4, 2).clone(memory_format=torch.contiguous_format).permute(0, 1, 4, 2, 3)


class Link(ABC):
    """A layer of a chain, for a stack of clients `[C, B, ...]`."""

    learns: ClassVar[bool] = False
    """Whether it has parameters."""

    @abstractmethod
    def forward(self, w: Tensors, x: Tensor, draws: Draws) -> tuple[Tensor, Any]:
        """The output, from the input, and what `backward` will want again."""

    @abstractmethod
    def backward(self, w: Tensors, x: Tensor, y: Tensor, kept: Any, d: Tensor, first: bool, move: Move) -> Tensor:
        """The loss's derivative in the input `x`, from that in the output `y`; moves this layer's parameters. `first`: nobody needs it."""


@dataclass(frozen=True)
class Dense(Link):
    """`y = x W^T + b`, with `W [C, out, in]` and `b [C, out]` under their names."""

    learns: ClassVar[bool] = True
    weight: str
    bias: str | None

    def forward(self, w: Tensors, x: Tensor, draws: Draws) -> tuple[Tensor, Any]:
        transposed = w[self.weight].transpose(1, 2)
        return (torch.bmm(x, transposed) if self.bias is None else torch.baddbmm(w[self.bias][:, None], x, transposed)), None

    def backward(self, w: Tensors, x: Tensor, y: Tensor, kept: Any, d: Tensor, first: bool, move: Move) -> Tensor:
        below = d if first else torch.bmm(d, w[self.weight])  # before the weight moves
        move(self.weight, d.transpose(1, 2), x)  # [C, out, B] @ [C, B, in]
        if self.bias is not None:
            move(self.bias, d.sum(1), None)
        return below


@dataclass(frozen=True)
class Convolution(Link):
    """A convolution in two dimensions of stride 1: each output is a product with a patch of the input. Channels are kept last in memory.

    `weight` names `[C, out, ch, kh, kw]`, `bias` `[C, out]`; `kernel` is `(kh, kw)`.
    """

    learns: ClassVar[bool] = True
    weight: str
    bias: str | None
    kernel: tuple[int, int]
    padding: tuple[int, int]

    def forward(self, w: Tensors, x: Tensor, draws: Draws) -> tuple[Tensor, Any]:
        patches, kernels = self._patches(x), matrix(w[self.weight]).transpose(1, 2)
        y = torch.bmm(patches, kernels) if self.bias is None else torch.baddbmm(w[self.bias][:, None], patches, kernels)
        return y.view(*x.shape[:2], *self._size(x), -1).permute(0, 1, 4, 2, 3), patches

    def backward(self, w: Tensors, x: Tensor, y: Tensor, kept: Any, d: Tensor, first: bool, move: Move) -> Tensor:
        flat = d.permute(0, 1, 3, 4, 2).reshape(len(d), -1, d.shape[2])  # [C, B h w, out]
        below = d if first else self._folded(torch.bmm(flat, matrix(w[self.weight])), x)
        move(self.weight, flat.transpose(1, 2), kept)
        if self.bias is not None:
            move(self.bias, flat.sum(1), None)
        return below

    def _size(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of the output."""
        rows, columns = (side + 2 * p - k + 1 for side, p, k in zip(x.shape[3:], self.padding, self.kernel, strict=True))
        return rows, columns

    def _windows(self, x: Tensor) -> Iterator[tuple[slice, slice]]:
        """Which part of the padded input each entry of a kernel sees."""
        rows, columns = self._size(x)
        return ((slice(i, i + rows), slice(j, j + columns)) for i in range(self.kernel[0]) for j in range(self.kernel[1]))

    def _patches(self, x: Tensor) -> Tensor:
        """`[C, B, ch, H, W] -> [C, B h w, kh kw ch]`."""
        (top, left), last = self.padding, x.permute(0, 1, 3, 4, 2)
        padded = functional.pad(last, (0, 0, left, left, top, top)) if top or left else last
        windows = padded.unfold(2, self.kernel[0], 1).unfold(3, self.kernel[1], 1)  # [C, B, h, w, ch, kh, kw]
        return windows.permute(0, 1, 2, 3, 5, 6, 4).reshape(len(x), -1, math.prod(self.kernel) * x.shape[2])

    def _folded(self, patches: Tensor, x: Tensor) -> Tensor:
        """Each patch added to where it came from: `[C, B h w, kh kw ch] -> [C, B, ch, H, W]`."""
        (c, b, channels, height, width), (top, left) = x.shape, self.padding
        padded = patches.new_zeros(c, b, height + 2 * top, width + 2 * left, channels)
        parts = patches.view(c, b, *self._size(x), -1, channels).unbind(4)
        for part, (rows, columns) in zip(parts, self._windows(x), strict=True):
            padded[:, :, rows, columns] += part
        return padded[:, :, top : top + height, left : left + width].permute(0, 1, 4, 2, 3)


@dataclass(frozen=True)
class Pool(Link):
    """The largest of each window of `size` x `size`, which do not overlap."""

    size: int

    def forward(self, w: Tensors, x: Tensor, draws: Draws) -> tuple[Tensor, Any]:
        y, place = functional.max_pool2d(x.flatten(0, 1), self.size, return_indices=True)
        return y.unflatten(0, x.shape[:2]), place.unflatten(0, x.shape[:2])

    def backward(self, w: Tensors, x: Tensor, y: Tensor, kept: Any, d: Tensor, first: bool, move: Move) -> Tensor:
        side, (height, width) = self.size, x.shape[3:]
        rows, columns = y.shape[3] * side, y.shape[4] * side
        here = torch.arange(height * width, device=x.device).view(height, width)[:rows, :columns]
        here = here.unflatten(1, (-1, side)).unflatten(0, (-1, side))  # [h, side, w, side]
        below = torch.zeros_like(x)
        inner = below[..., :rows, :columns].unflatten(4, (-1, side)).unflatten(3, (-1, side))
        inner.copy_(torch.where(kept[..., None, :, None] == here, d[..., None, :, None], 0))
        return below


@dataclass(frozen=True)
class Flat(Link):
    """All dimensions of an example in one."""

    def forward(self, w: Tensors, x: Tensor, draws: Draws) -> tuple[Tensor, Any]:
        return x.flatten(2), None

    def backward(self, w: Tensors, x: Tensor, y: Tensor, kept: Any, d: Tensor, first: bool, move: Move) -> Tensor:
        return torch.empty_like(x).copy_(d.view(x.shape))  # in the order of x


@dataclass(frozen=True)
class Pointwise(Link):
    """An activation, and its derivative as a function of (the derivative in its output, its output)."""

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor], Tensor]

    def forward(self, w: Tensors, x: Tensor, draws: Draws) -> tuple[Tensor, Any]:
        return self.function(x), None

    def backward(self, w: Tensors, x: Tensor, y: Tensor, kept: Any, d: Tensor, first: bool, move: Move) -> Tensor:
        return self.derivative(d, y)


@dataclass(frozen=True)
class Masked(Link):
    """Dropout with the uniform numbers of a step, `[C, B, ...]` under `name`."""

    layer: Dropout
    name: str

    def forward(self, w: Tensors, x: Tensor, draws: Draws) -> tuple[Tensor, Any]:
        mask = (draws[self.name] >= self.layer.p).to(x.dtype) / (1 - self.layer.p)
        return x * mask, mask

    def backward(self, w: Tensors, x: Tensor, y: Tensor, kept: Any, d: Tensor, first: bool, move: Move) -> Tensor:
        return d * kept


def _relu_backward(d: Tensor, y: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(d, y, 0)


_ACTIVATIONS: dict[type[nn.Module], Pointwise] = {
    nn.ReLU: Pointwise(torch.relu, _relu_backward),
    nn.Tanh: Pointwise(torch.tanh, torch.ops.aten.tanh_backward),
    nn.Sigmoid: Pointwise(torch.sigmoid, torch.ops.aten.sigmoid_backward),
}


def chain_of(module: nn.Module, shape: tuple[int, ...], convolutions: bool = False) -> tuple[Link, ...] | None:
    """The links of a network that is a chain on examples of `shape`, or None.

    A chain is an `nn.Sequential`, nested or not, of plain `Linear`, `ReLU`, `Tanh`, `Sigmoid`, `Identity` and dropout layers, none of them
    used twice or hooked into, with a `Flatten` in front where examples have several dimensions; or, for images and with `convolutions`,
    of `Conv2d` of stride 1, `MaxPool2d` and such activations before that `Flatten`.
    """
    parts = _parts(module)
    links = [_link(path, part) for path, part in parts if not isinstance(part, nn.Identity)]
    chain = tuple(link for link in links if link is not None)
    once = len({id(part) for _, part in parts}) == len(parts)
    if not once or None in links or not any(isinstance(link, Dense) for link in chain):
        return None
    flat = [i for i, link in enumerate(chain) if isinstance(link, Flat)]
    front, rest = (chain[: flat[0]], chain[flat[0] + 1 :]) if flat else ((), chain)
    images = convolutions and len(shape) == 3 and not any(isinstance(link, Dense) for link in front)
    if (
        len(flat) > 1
        or any(isinstance(link, (Convolution, Pool)) for link in rest)
        or (front and not images)
        or (len(shape) > 1 and not flat)
    ):
        return None
    return chain


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
    if _flattens(part):
        return Flat()
    if type(part) is nn.Conv2d and _is_plain(part):
        return Convolution(f"{path}weight", None if part.bias is None else f"{path}bias", _pair(part.kernel_size), _pair(part.padding))
    if type(part) is nn.MaxPool2d and (size := _window(part)):
        return Pool(size)
    if type(part) is Dropout:
        return Masked(part, f"{path}uniform")
    return _ACTIVATIONS.get(type(part))


def _flattens(part: nn.Module) -> bool:
    return type(part) is nn.Flatten and (part.start_dim, part.end_dim) == (1, -1)


def _is_plain(part: nn.Conv2d) -> bool:
    usual = (_pair(part.stride), _pair(part.dilation), part.groups, part.padding_mode) == ((1, 1), (1, 1), 1, "zeros")
    return usual and not isinstance(part.padding, str)


def _window(part: nn.MaxPool2d) -> int | None:
    """The side of square windows that do not overlap, or None."""
    usual = (_pair(part.padding), _pair(part.dilation), part.ceil_mode, part.return_indices) == ((0, 0), (1, 1), False, False)
    side, other = _pair(part.kernel_size)
    return side if usual and side == other and _pair(part.stride) == (side, side) else None


def _pair(value: Any) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _hooked(part: nn.Module) -> bool:
    return bool(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks)
