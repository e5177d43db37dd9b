"""F4. How like the true pictures reconstructed ones are: optimal matching, PSNR and SSIM.

    PSNR = -10 log10 MSE,  in dB, on the scale [0, 1]
    SSIM = mean of (2 m_x m_y + c1)(2 s_xy + c2) / ((m_x^2 + m_y^2 + c1)(s_x^2 + s_y^2 + c2)),  c1 = 0.01^2, c2 = 0.03^2

SSIM (Wang, Bovik, Sheikh, Simoncelli, IEEE TIP 2004): means, variances and covariance under an 11 x 11 Gaussian window of deviation 1.5, or
the largest odd one that fits; over the places where the whole window fits, each channel for itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.problem import Inputs


@dataclass(frozen=True)
class Likeness:
    """Pictures found, in the order of the true ones that they were matched to, on the scale [0, 1], and how like each is.

    Attributes:
        pictures: `[N, C, H, W]`.
        order: which of those found each is, `[N]`.
        psnr, ssim: of each, `[N]`.
    """

    pictures: Tensor
    order: Tensor
    psnr: Tensor
    ssim: Tensor


def unit(x: Tensor, inputs: Inputs) -> Tensor:
    """Inputs on the scale [0, 1] of what they can be."""
    return (x - inputs.low) / (inputs.high - inputs.low).clamp(min=1e-12)


def compare(found: Tensor, true: Tensor, inputs: Inputs) -> Likeness:
    """Match what was found to the true pictures, so that the squared errors add up to the least, and judge each. `[N, C, H, W]` twice."""
    from scipy.optimize import linear_sum_assignment

    guess, truth = unit(found, inputs), unit(true, inputs)
    _, order = linear_sum_assignment(torch.cdist(truth.flatten(1), guess.flatten(1)).square().double().cpu().numpy())
    chosen = torch.from_numpy(order)
    guess = guess[chosen]
    return Likeness(guess, chosen, psnr(guess, truth), ssim(guess, truth))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal to noise of each pair, dB, at most 100. `[N, C, H, W]` twice -> `[N]`."""
    return -10 * (a - b).square().flatten(1).mean(1).clamp(min=1e-10).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair, at most 1. `[N, C, H, W]` twice -> `[N]`."""
    channels, side = a.shape[1], min(11, *a.shape[2:])
    side -= 1 - side % 2
    line = torch.exp(-0.5 * ((torch.arange(side).to(a) - side // 2) / 1.5).square())
    window = (line[:, None] * line / line.sum().square()).expand(channels, 1, side, side)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=channels)

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    each = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    return each.flatten(1).mean(1)
