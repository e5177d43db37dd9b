"""F1. Low-rank adapters as pairs of tensors: what a server may do with them, whatever layer they sit on.

A layer `x` adapted at rank r has `x.lora_A`, `[r, in]` (a convolution's `[r, in, *kernel]`), and `x.lora_B`, `[out, r]`; its weight, as a
matrix `[out, in]`, changes by `scale * B @ A`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.params import Params

A, B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude"


def layers(w: Params) -> list[str]:
    """The layers of which both factors are in `w`."""
    names = (name.removesuffix(f".{B}") for name in w if name.endswith(f".{B}"))
    return [name for name in names if f"{name}.{A}" in w]


def factors(w: Params, layer: str) -> tuple[Tensor, Tensor]:
    """`(A [..., r, in], B [..., out, r])` of a layer, A as a matrix; a stack stays a stack."""
    a, b = w[f"{layer}.{A}"], w[f"{layer}.{B}"]
    return a.flatten(b.ndim - 1), b


def bias(models: Params, by: Tensor) -> Tensor:
    """How far the mean of factors is from the mean of products: `||mean(B) mean(A) - mean(B A)|| / ||mean(B A)||` over all layers.

    `models` `[C, ...]`, weights `by` `[C]` that add up to 1. A scalar; 0 where no layer has both factors. Products are never formed:
    `mean(B) mean(A) - mean(B A) = L R`, with L and R the factors side by side, and `||L R||^2 = <L^T L, R R^T>`.
    """
    off, size = by.new_zeros(()), by.new_zeros(())
    for layer in layers(models):
        a, b = factors(models, layer)
        weights = by.to(a.dtype)
        left, right = _side_by_side(a, b, weights)  # mean(B A) = left @ right
        mean_a, mean_b = torch.tensordot(weights, a, dims=1), torch.tensordot(weights, b, dims=1)
        size = size + _square(left, right)
        off = off + _square(torch.cat([left, -mean_b], 1), torch.cat([right, mean_a], 0))
    return torch.where(size > 0, (off / size.clamp(min=1e-30)).clamp(min=0).sqrt(), 0.0)


def mean_of_products(models: Params, by: Tensor) -> Params:
    """Factors of the best approximation of rank r to `sum_c by_c B_c A_c`, for each layer. Models `[C, ...]`, by `[C]`.

        U S V = svd(sum_c by_c B_c A_c) ;  A = V[:r] ;  B = U[:, :r] S[:r]

    Rows of A are orthonormal, so A moves the output as much where B is still zero as anywhere. By QR of the factors side by side: the
    decomposed matrix is `[C r, C r]`, whatever the layer's size.
    """
    out = {name: torch.tensordot(by.to(v.dtype), v, dims=1) for name, v in models.items()}
    for layer in layers(models):
        a, b = factors(models, layer)
        left, right = _side_by_side(a, b, by.to(a.dtype))
        q_left, r_left = torch.linalg.qr(left)  # [out, k], [k, C r]
        q_right, r_right = torch.linalg.qr(right.mT)  # [in, k'], [k', C r]
        u, s, v = torch.linalg.svd(r_left @ r_right.mT)
        r = min(a.shape[-2], len(s))
        new_a, new_b = torch.zeros_like(a[0]), torch.zeros_like(b[0])
        new_a[:r], new_b[:, :r] = (q_right @ v[:r].mT).mT, (q_left @ u[:, :r]) * s[:r]
        out[f"{layer}.{A}"], out[f"{layer}.{B}"] = new_a.view(models[f"{layer}.{A}"].shape[1:]), new_b
    return Params(out)


def _side_by_side(a: Tensor, b: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """`[out, C r]` and `[C r, in]` whose product is `sum_c by_c B_c A_c`."""
    return (b * by[:, None, None]).permute(1, 0, 2).flatten(1), a.flatten(0, 1)


def _square(left: Tensor, right: Tensor) -> Tensor:
    """`||left @ right||^2` without the product."""
    return ((left.mT @ left) * (right @ right.mT)).sum()
