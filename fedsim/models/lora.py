"""F3. LoRA: low-rank adapters beside linear, embedding and convolution layers.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv 2106.09685):

    y = W x + scale * B A x        A [r, in], B [out, r], B = 0 at the start; scale = alpha / r

Convolutions: A is a convolution to r channels, B one of kernel 1. Embeddings: A is a table of r numbers a token. Rank-stabilised scaling,
alpha / sqrt(r), is Kalajdzievski's (arXiv 2312.03732). DoRA (Liu et al., ICML 2024, arXiv 2402.09353, eq. 5, with the norm held constant in
the gradient as in its section 4.3) trains the length of each row of the weight besides:

    y = m / ||W + scale B A||_row * (W + scale B A) x        m = ||W||_row at the start

An adapted layer keeps the names of its parameters (`x.weight`) and adds `x.lora_A`, `x.lora_B`, `x.lora_magnitude`: empty buffers, which a
step fills like any parameter, so that base weights are one tensor for all clients of a stack, and the layer without them is as before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.errors import ScenarioError, did_you_mean
from fedsim.lowrank import MAGNITUDE, A, B
from fedsim.models.adapt import Adapt, Fitted
from fedsim.models.dropout import Dropout, draws_of
from fedsim.models.interop import load_adapter, save_adapter
from fedsim.params import Params
from fedsim.registry import register
from fedsim.rng import Key

CONVOLUTIONS: dict[type[nn.Module], Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
KINDS: dict[type[nn.Module], str] = {nn.Linear: "linear", nn.Embedding: "embedding", **dict.fromkeys(CONVOLUTIONS, "convolution")}
OPAQUE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Layers that read the weights of layers inside of them without running those: an adapter there would be passed by."""


class Adapted(nn.Module):
    """A layer with a place for adapters. Its parameters keep their names; `layer` is only asked for its sizes and settings."""

    lora_A: Tensor
    lora_B: Tensor
    lora_magnitude: Tensor
    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Module, scale: float, dropout: float):
        super().__init__()
        self.scale = scale
        self.settings: dict[str, Any] = {k: getattr(layer, k) for k in ("stride", "padding", "dilation") if hasattr(layer, k)}
        self.function = CONVOLUTIONS.get(type(layer))
        self.tokens = isinstance(layer, nn.Embedding)
        self.drop = Dropout(dropout)
        for name, parameter in layer._parameters.items():
            self.register_parameter(name, parameter)
        for name in (A, B, MAGNITUDE):
            self.register_buffer(name, torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.lora_B.numel() == 0:
            return self._own(x)
        if self.lora_magnitude.numel() == 0:
            return self._own(x) + self.scale * self._low(x)
        stretch = self.lora_magnitude / row_norms(self.weight, self.lora_A, self.lora_B, self.scale).detach()
        y = self._own(x)
        straight = y if self.bias is None else y - self.bias
        return y + (stretch - 1) * straight + stretch * self.scale * self._low(x)  # exactly y where the adapter is zero

    def _own(self, x: Tensor) -> Tensor:
        """The layer as it was."""
        if self.tokens:
            return F.embedding(x, self.weight)
        if self.function is None:
            return F.linear(x, self.weight, self.bias)
        return self.function(x, self.weight, self.bias, **self.settings)

    def _low(self, x: Tensor) -> Tensor:
        """`B A x`."""
        if self.tokens:
            return F.linear(F.embedding(x, self.lora_A.T), self.lora_B)
        x = self.drop(x)
        if self.function is None:
            return F.linear(F.linear(x, self.lora_A), self.lora_B)
        narrow = self.function(x, self.lora_A, **self.settings)
        return self.function(narrow, self.lora_B.reshape(*self.lora_B.shape, *[1] * (narrow.ndim - 2)))

    def matrix(self) -> Tensor:
        """The weight as a matrix `[out, in]`."""
        return self.weight.T if self.tokens else self.weight.flatten(1)


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`||W + scale B A||` of each row, without the product. `[out, in], [r, in], [out, r] -> [out]`."""
    cross = ((weight @ a.T) * b).sum(1)
    return (weight.square().sum(1) + 2 * scale * cross + scale**2 * ((b @ (a @ a.T)) * b).sum(1)).clamp(min=0).sqrt()


@register("lora")
@dataclass(frozen=True)
class Lora(Adapt):
    """Low-rank adapters, trained in the place of the layers they sit on (Hu et al., ICLR 2022).

    rank: r; alpha: the adapter's output counts `alpha / rank`, or `alpha / sqrt(rank)` with `scaling: rank-stabilised`.
    targets: layers to adapt: names, last parts of names, patterns (`encoder.*.query`), or kinds: linear, embedding, convolution.
    also: layers trained whole instead, by name or pattern, e.g. the last one.
    train: both, or b: A stays as drawn and is never sent (FFA-LoRA, Sun et al., ICLR 2024).
    init: how A starts: kaiming = uniform, as in Hu's code; gaussian = deviation 1/r; orthogonal = orthonormal rows.
    dropout: of the adapters' inputs. dora: train the length of each weight row, too (linear layers).
    start: folder of an adapter to begin with, as a run or PEFT leaves it.
    merge: whether the model at the end is the network without adapters that answers the same; else both are kept apart.
    """

    rank: Annotated[int, Gt(0)] = 8
    alpha: Annotated[float, Gt(0)] = 8.0
    targets: tuple[str, ...] = ("linear",)
    also: tuple[str, ...] = ()
    scaling: Literal["standard", "rank-stabilised"] = "standard"
    train: Literal["both", "b"] = "both"
    init: Literal["kaiming", "gaussian", "orthogonal"] = "kaiming"
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    dora: bool = False
    start: str | None = None
    merge: bool = False

    @property
    def scale(self) -> float:
        """What the adapters' output is multiplied by."""
        return self.alpha / (self.rank if self.scaling == "standard" else math.sqrt(self.rank))

    def fit(self, module: nn.Module, w: Params, x: Tensor, key: Key) -> Fitted:
        found = list(places(module))
        wholly = self.wholly(module)
        chosen = [n for n in matching(self.targets, {name: kind for name, kind, *_ in found}, "model.adapt.targets") if n not in wholly]
        if not chosen:
            raise ScenarioError("model.adapt.also", "trains every layer of `targets` whole, so that nothing is left to adapt")
        also = [f"{name}.{p}" for name in wholly for p, _ in module.get_submodule(name).named_parameters(recurse=False)]
        tied = shared_weights(module)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(key & (2**63 - 1))
            added: dict[str, Tensor] = {}
            adapted: dict[nn.Module, Adapted] = {}
            for name, _, parent, child in found:
                if name not in chosen:
                    continue
                layer = parent._modules[child]
                assert layer is not None
                if layer not in adapted:  # one that is shared stays shared
                    adapted[layer] = self._layer(name, layer, tied)
                    added |= {f"{name}.{k}": v for k, v in self._start(adapted[layer]).items()}
                parent._modules[child] = adapted[layer]
            whole = w | Params(added)
            draws = _try(module, whole, x, set(chosen))
            if self.start is not None:
                whole = load_adapter(Path(self.start).expanduser(), self, module, whole)
        still = {f"{name}.{A}" for name in chosen} if self.train == "b" else set()
        return Fitted(whole, (*(name for name in added if name not in still), *also), draws)

    def begin(self, module: nn.Module, whole: Params) -> Params:
        if not self.dora:
            return whole
        layers = [name for name, part in module.named_modules() if isinstance(part, Adapted)]
        lengths = {n: row_norms(whole[f"{n}.weight"], whole[f"{n}.{A}"], whole[f"{n}.{B}"], self.scale) for n in layers}
        return whole | Params({f"{name}.{MAGNITUDE}": v for name, v in lengths.items()})

    def export(self, folder: Path, module: nn.Module, whole: Params) -> None:
        save_adapter(folder, self, module, whole)

    def merged(self, module: nn.Module, whole: Params) -> Params:
        merged = {name: v for name, v in whole.items() if not name.endswith((f".{A}", f".{B}", f".{MAGNITUDE}"))}
        for name, layer in module.named_modules():
            if isinstance(layer, Adapted):
                a, b, weight = whole[f"{name}.{A}"].flatten(1), whole[f"{name}.{B}"], whole[f"{name}.weight"]
                change = self.scale * (b @ a)
                new = weight + (change.T if layer.tokens else change.view(weight.shape))
                if self.dora:
                    new = (whole[f"{name}.{MAGNITUDE}"] / row_norms(weight, a, b, self.scale))[:, None] * new
                merged[f"{name}.weight"] = new
        return Params(merged)

    def wholly(self, module: nn.Module) -> list[str]:
        """Layers trained whole: what matches and has parameters."""
        owners = {name: "layer" for name, part in module.named_modules() if name and any(True for _ in part.parameters(recurse=False))}
        return matching(self.also, owners, "model.adapt.also") if self.also else []

    def _layer(self, name: str, layer: nn.Module, tied: set[str]) -> Adapted:
        """The adapted layer, once its rank and settings have been checked."""
        out = Adapted(layer, self.scale, self.dropout)
        if name in tied:
            message = f"the weight of '{name}' is another layer's, too, which an adapter would not change; leave it out"
            raise ScenarioError("model.adapt.targets", message)
        smallest = min(out.matrix().shape)
        if self.rank > smallest:
            message = f"rank {self.rank} is larger than layer '{name}' allows, a matrix of {' x '.join(map(str, out.matrix().shape))}"
            raise ScenarioError("model.adapt.rank", f"{message}; take at most {smallest}, or leave the layer out of `targets`")
        if self.dora and (out.tokens or out.function):
            raise ScenarioError("model.adapt.dora", f"'{name}' is no linear layer; choose linear layers only with `targets`")
        return out

    def _start(self, layer: Adapted) -> dict[str, Tensor]:
        """Adapters that change nothing yet."""
        out, inside = layer.matrix().shape
        a = layer.weight.new_empty((self.rank, inside))
        if self.init == "orthogonal":
            nn.init.orthogonal_(a)
        elif self.init == "gaussian":
            nn.init.normal_(a, std=1 / self.rank)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        b = a.new_zeros((out, self.rank))
        magnitude = {MAGNITUDE: row_norms(layer.weight.detach(), a, b, self.scale)} if self.dora else {}
        return {A: a.view(self.rank, *layer.weight.shape[1:]) if layer.function else a, B: b} | magnitude


def places(module: nn.Module) -> Iterator[tuple[str, str, nn.Module, str]]:
    """Layers that an adapter fits: name, kind, and where they hang."""
    closed = [name for name, part in module.named_modules() if isinstance(part, OPAQUE)]
    for path, parent in module.named_modules():
        for child, layer in parent._modules.items():
            name = f"{path}.{child}" if path else child
            if type(layer) not in KINDS or any(not c or name.startswith(f"{c}.") for c in closed):
                continue
            plain = getattr(layer, "groups", 1) == 1 and getattr(layer, "padding_mode", "zeros") == "zeros"
            if plain and getattr(layer, "max_norm", None) is None:
                yield name, KINDS[type(layer)], parent, child


def shared_weights(module: nn.Module) -> set[str]:
    """Layers whose weight is also another layer's."""
    owners: dict[int, list[nn.Module]] = {}
    for part in module.modules():
        if isinstance(weight := part._parameters.get("weight"), Tensor):
            owners.setdefault(id(weight), []).append(part)
    return {name for name, part in module.named_modules() if len(owners.get(id(part._parameters.get("weight")), [])) > 1}


def matching(patterns: tuple[str, ...], kinds: dict[str, str], field: str) -> list[str]:
    """The names that a pattern means. Raises where one means none."""
    found: list[str] = []
    for pattern in patterns:
        hits = [n for n, kind in kinds.items() if pattern == kind or fnmatchcase(n, pattern) or fnmatchcase(n.rsplit(".", 1)[-1], pattern)]
        if not hits:
            have = ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "none"
            raise ScenarioError(field, f"'{pattern}' matches no layer{did_you_mean(pattern, kinds)}; there are: {have}")
        found += hits
    return list(dict.fromkeys(found))


def _try(module: nn.Module, whole: Params, x: Tensor, chosen: set[str]) -> dict[str, Any]:
    """Run the adapted network once. What it draws; raises where an adapter is passed by."""
    ran: set[str] = set()
    handles = [
        part.register_forward_hook(lambda *_, name=name: ran.add(name))
        for name, part in module.named_modules()
        if isinstance(part, Adapted)
    ]
    try:
        draws = draws_of(module, lambda: torch.func.functional_call(module, dict(whole), (x,)))
    finally:
        for handle in handles:
            handle.remove()
    passed = sorted(name for name in chosen if name not in ran and isinstance(module.get_submodule(name), Adapted))
    shared = {id(module.get_submodule(name)) for name in ran}
    passed = [name for name in passed if id(module.get_submodule(name)) not in shared]
    if passed:
        message = f"layer '{passed[0]}' is never run as a layer: the network reads its weight, and an adapter would be passed by"
        raise ScenarioError("model.adapt.targets", f"{message}; leave it out")
    return draws
