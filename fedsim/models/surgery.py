"""F3. What a module is made of, as far as it decides how a chunk of clients is executed."""

from torch import nn
from torch.nn.modules.conv import _ConvNd

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def has(module: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether `module` is, or contains, a layer of one of these types."""
    return any(isinstance(part, types) for part in module.modules())


def vmappable(module: nn.Module) -> bool:
    """False where torch cannot batch a layer over clients: recurrent layers are one fused kernel without a batching rule."""
    return not has(module, *_RECURRENT)


def loops(module: nn.Module) -> bool:
    """True where one client after the other is faster on a CPU, or the only way.

    Convolutions batched over clients become grouped convolutions, which are slower there; recurrent layers and `nn.MultiheadAttention`
    (through `scaled_dot_product_attention`) have no batching rule.
    """
    convolves = any(getattr(part, "convolves", False) for part in module.modules())  # with a weight that it makes of factors
    return convolves or has(module, _ConvNd, nn.MultiheadAttention, *_RECURRENT)
