"""The uniform numbers of `fedsim.rng`, bit for bit, made on a GPU: it would otherwise wait for a CPU to draw the masks of dropouts.

NumPy's `Generator(Philox(key))` is Philox4x64-10 (Salmon et al., SC 2011) with a counter that begins at 1. Of each 64-bit word it takes the
lower half first, and of a half the upper 24 bits. Importing this needs Triton, which comes with PyTorch for GPUs.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fedsim import rng

ROUNDS = 10
STEPS = np.array([0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B], dtype=np.uint64)
BLOCK = 256


def uniform(keys: rng.Keys, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """`rng.uniform(keys, shape)` on a GPU: float32 in [0, 1) for each key, `[C] -> [C, *shape]`."""
    n = math.prod(shape)
    first = np.stack([keys, np.zeros_like(keys)])  # a key is 64 bits of 128
    schedule = np.arange(ROUNDS, dtype=np.uint64)[:, None, None] * STEPS[:, None] + first  # [rounds, 2, C]
    out = torch.empty(len(keys), n, device=device)
    with torch.cuda.device(device):
        grid = (len(keys), triton.cdiv(triton.cdiv(n, 8), BLOCK))
        _kernel[grid](torch.from_numpy(schedule.view(np.int64)).to(device), out, len(keys), n, ROUNDS, BLOCK)
    return out.view(len(keys), *shape)


@triton.jit
def _kernel(schedule, out, clients, n, rounds: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Eight numbers for each key (first axis) and value of the counter (second)."""
    row = tl.program_id(0)
    place = tl.program_id(1) * block + tl.arange(0, block)
    factor_a = tl.full([block], 0xD2E7470EE14C6C93, tl.uint64)
    factor_c = tl.full([block], 0xCA5A826395121157, tl.uint64)
    a = (place + 1).to(tl.uint64)
    b = tl.zeros([block], tl.uint64)
    c = tl.zeros([block], tl.uint64)
    d = tl.zeros([block], tl.uint64)
    for i in tl.static_range(rounds):
        key = tl.load(schedule + 2 * i * clients + row).to(tl.uint64)
        other = tl.load(schedule + (2 * i + 1) * clients + row).to(tl.uint64)
        high_a, high_c = tl.umulhi(a, factor_a), tl.umulhi(c, factor_c)
        low_a, low_c = a * factor_a, c * factor_c
        a = high_c ^ b ^ key
        b = low_c
        c = high_a ^ d ^ other
        d = low_a
    for j in tl.static_range(4):
        word = a if j == 0 else (b if j == 1 else (c if j == 2 else d))
        for half in tl.static_range(2):
            bits = (word >> (32 * half + 8)) & 0xFFFFFF
            at = 8 * place + 2 * j + half
            tl.store(out + row * n + at, bits.to(tl.int32).to(tl.float32) * 5.9604644775390625e-08, mask=at < n)  # 2^-24
