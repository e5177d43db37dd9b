"""F3. Transformers, for images and for text.

Attention is written in matrix products and a softmax: `scaled_dot_product_attention` has no batching rule on a CPU, so a chunk of
clients would run it one by one. Query, key and value are separate layers, so that adapters can be put on one of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.errors import ScenarioError
from fedsim.models.dropout import Dropout
from fedsim.models.model import Model
from fedsim.registry import register

PADDING = 0  # the token that fills a text up to its fixed length
Count = Annotated[int, Gt(0)]
Rate = Annotated[float, Ge(0), Lt(1)]


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al., NeurIPS 2017). `[B, T, D] -> [B, T, D]`; `blocked` is true where nobody may look."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, blocked: Tensor | None) -> Tensor:
        return self.attend(self.query(x), self.key(x), self.value(x), blocked)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, blocked: Tensor | None) -> Tensor:
        """What queries find among keys: `[B, T, D]` each."""
        q, k, v = (self._split(each) for each in (q, k, v))  # [B, heads, T, D/heads]
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # [B, heads, T, T]
        if blocked is not None:
            scores = scores.masked_fill(blocked, torch.finfo(scores.dtype).min)  # finite: a row that is all blocked stays a number
        mixed = scores.softmax(-1) @ v  # [B, heads, T, D/heads]
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Layer(nn.Module):
    """One pre-norm transformer layer: attention, then two linear layers, each around a shortcut. `[B, T, D] -> [B, T, D]`."""

    def __init__(self, dim: int, heads: int, expansion: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.drop1 = Dropout(dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, expansion * dim)
        self.down = nn.Linear(expansion * dim, dim)
        self.drop2 = Dropout(dropout)

    def forward(self, x: Tensor, blocked: Tensor | None = None) -> Tensor:
        x = x + self.drop1(self.attention(self.norm1(x), blocked))
        return x + self.drop2(self.down(F.gelu(self.up(self.norm2(x)))))


class Encoder(nn.Module):
    """Learned positions, `depth` layers, a final norm. `[B, T, D] -> [B, T, D]`, for T up to `length`."""

    def __init__(self, length: int, dim: int, depth: int, heads: int, expansion: int, dropout: float):
        super().__init__()
        self.position = nn.Parameter(0.02 * torch.randn(length, dim))
        self.drop = Dropout(dropout)
        self.layers = nn.ModuleList(Layer(dim, heads, expansion, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, blocked: Tensor | None = None) -> Tensor:
        x = self.drop(x + self.position[: x.shape[1]])
        for layer in self.layers:
            x = layer(x, blocked)
        return self.norm(x)


class VisionTransformer(nn.Module):
    """Patches as a sequence, with a class token in front. `[B, ch, H, W] -> [B, outputs]`."""

    def __init__(self, shape: tuple[int, ...], outputs: int, sizes: Vit):
        super().__init__()
        ch, height, width = shape
        self.patch = sizes.patch
        self.embed = nn.Linear(ch * sizes.patch**2, sizes.dim)
        self.first = nn.Parameter(0.02 * torch.randn(sizes.dim))  # the class token
        patches = (height // sizes.patch) * (width // sizes.patch)
        self.encoder = Encoder(patches + 1, sizes.dim, sizes.depth, sizes.heads, sizes.expansion, sizes.dropout)
        self.head = nn.Linear(sizes.dim, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))  # [B, ch, h, p, w, p]
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, h w, ch p p]
        x = self.embed(x)  # [B, h w, D]
        x = torch.cat([self.first.expand(len(x), 1, -1), x], dim=1)  # [B, 1 + h w, D]
        return self.head(self.encoder(x)[:, 0])


class CausalTransformer(nn.Module):
    """Logits of the next token at every position, from the tokens up to it. `[B, T] -> [B, T, outputs]`."""

    def __init__(self, length: int, vocabulary: int, outputs: int, sizes: CharTransformer):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, sizes.dim)
        self.encoder = Encoder(length, sizes.dim, sizes.depth, sizes.heads, sizes.expansion, sizes.dropout)
        self.head = nn.Linear(sizes.dim, outputs)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        future = steps[None, :] > steps[:, None]  # [T, T]
        return self.head(self.encoder(self.embed(tokens), future))


class TextTransformer(nn.Module):
    """One answer for a text: the mean of its encoded tokens, padding excluded. `[B, T] -> [B, outputs]`."""

    def __init__(self, length: int, vocabulary: int, outputs: int, sizes: TextClassifier):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, sizes.dim)
        self.encoder = Encoder(length, sizes.dim, sizes.depth, sizes.heads, sizes.expansion, sizes.dropout)
        self.head = nn.Linear(sizes.dim, outputs)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == PADDING  # [B, T]
        x = self.encoder(self.embed(tokens), padding[:, None, None, :])  # [B, T, D]
        real = (~padding).to(x.dtype)[..., None]  # [B, T, 1]
        return self.head((x * real).sum(1) / real.sum(1).clamp(min=1))


def _check_heads(dim: int, heads: int) -> None:
    if dim % heads:
        raise ScenarioError("model.heads", f"dim {dim} cannot be cut into {heads} equal heads; take heads that divide it")


@register("vit")
@dataclass(frozen=True)
class Vit(Model):
    """Small vision transformer: square patches, a class token, learned positions. Dosovitskiy et al., ICLR 2021.

    Differs: sized for small images on a CPU, an MLP `expansion` of 2 and not 4, one linear layer on flattened patches (the same map).
    """

    inputs: ClassVar[frozenset[str]] = frozenset({"image"})
    patch: Count = 4
    dim: Count = 64
    depth: Count = 4
    heads: Count = 4
    expansion: Count = 2
    dropout: Rate = 0.0

    def build(self, shape: tuple[int, ...], outputs: int, vocabulary: int | None) -> nn.Module:
        self.require(shape, vocabulary)
        _check_heads(self.dim, self.heads)
        if any(side % self.patch for side in shape[1:]):
            message = f"patches of {self.patch} do not tile images of {shape[1]} x {shape[2]}; take a patch that divides both"
            raise ScenarioError("model.patch", message)
        return VisionTransformer(shape, outputs, self)


@register("char-transformer")
@dataclass(frozen=True)
class CharTransformer(Model):
    """Causal transformer that predicts the next character. Vaswani et al., NeurIPS 2017, decoder only, with layer norm first."""

    inputs: ClassVar[frozenset[str]] = frozenset({"tokens"})
    per_token: ClassVar[bool] = True
    dim: Count = 64
    depth: Count = 2
    heads: Count = 4
    expansion: Count = 4
    dropout: Rate = 0.0

    def build(self, shape: tuple[int, ...], outputs: int, vocabulary: int | None) -> nn.Module:
        self.require(shape, vocabulary)
        _check_heads(self.dim, self.heads)
        return CausalTransformer(shape[0], vocabulary or outputs, outputs, self)


@register("text-classifier")
@dataclass(frozen=True)
class TextClassifier(Model):
    """Small transformer encoder for texts padded with token 0, then the mean over tokens. Vaswani et al., NeurIPS 2017.

    Differs: layer norm first, learned positions.
    """

    inputs: ClassVar[frozenset[str]] = frozenset({"tokens"})
    dim: Count = 64
    depth: Count = 2
    heads: Count = 4
    expansion: Count = 2
    dropout: Rate = 0.0

    def build(self, shape: tuple[int, ...], outputs: int, vocabulary: int | None) -> nn.Module:
        self.require(shape, vocabulary)
        _check_heads(self.dim, self.heads)
        return TextTransformer(shape[0], vocabulary or outputs, outputs, self)
