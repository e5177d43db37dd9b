"""F3. Plug-ins beside a vision transformer's attention, made to be each client's own: FedPerfix.

    [P_k, P_v] = W_up tanh(W_down Z)          Z: the block's normed input, dim -> mid -> 2 dim
    K = Z W_k + scale P_k ;  V = Z W_v + scale P_v ;  Q as it was

Sun, Mendieta, Luo, Wu, Chen, "FedPerfix: Towards Partial Model Personalization of Vision Transformers in Federated Learning", ICCV 2023
(arXiv 2308.09160). The paper writes a concatenation, [scale P_k, W_k]; the authors' code adds, and so does this: sequences do not grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Gt
from torch import Tensor, nn

from fedsim.models.attention import Attention, Count, VisionTransformer, Vit
from fedsim.models.model import Model
from fedsim.registry import register


class PrefixedAttention(Attention):
    """Self-attention whose keys and values are moved by `prefix`, a network `[B, T, D] -> [B, T, 2 D]`."""

    def __init__(self, plain: Attention, prefix: nn.Module, scale: float):
        nn.Module.__init__(self)
        self.heads, self.scale = plain.heads, scale
        self.query, self.key, self.value, self.out = plain.query, plain.key, plain.value, plain.out
        self.prefix = prefix

    def forward(self, x: Tensor, blocked: Tensor | None) -> Tensor:
        p_k, p_v = self.prefix(x).chunk(2, dim=-1)  # [B, T, D] each
        return self.attend(self.query(x), self.key(x) + self.scale * p_k, self.value(x) + self.scale * p_v, blocked)


@register("prefix-vit")
@dataclass(frozen=True)
class PrefixVit(Model):
    """Vision transformer with a plug-in beside the attention of each block, which `own: adapters` means. Sun et al., ICCV 2023 (FedPerfix).

    vit: the transformer, e.g. {name: vit, patch: 8, dim: 48}. mid: width of the plug-in. scale: how much it counts.
    form: adapter = as in the paper; linear = one layer and no tanh, its ablation.
    start: random = PyTorch's own, as in the paper; zero = the last layer of a plug-in is zero, so the network starts as the plain one.
    What is not in a plug-in starts with the weights of a `vit` of the same sizes and seed.
    """

    inputs: ClassVar[frozenset[str]] = frozenset({"image"})
    vit: Vit = Vit()
    mid: Count = 40
    scale: Annotated[float, Gt(0)] = 1.5
    form: Literal["adapter", "linear"] = "adapter"
    start: Literal["random", "zero"] = "random"

    def build(self, shape: tuple[int, ...], outputs: int, vocabulary: int | None) -> nn.Module:
        module = self.vit.build(shape, outputs, vocabulary)
        assert isinstance(module, VisionTransformer)
        for layer in module.encoder.layers:
            assert isinstance(layer.attention, Attention)
            layer.attention = PrefixedAttention(layer.attention, self._prefix(), self.scale)
        return module

    def _prefix(self) -> nn.Module:
        dim = self.vit.dim
        last = nn.Linear(dim if self.form == "linear" else self.mid, 2 * dim)
        if self.start == "zero":
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        return last if self.form == "linear" else nn.Sequential(nn.Linear(dim, self.mid), nn.Tanh(), last)
