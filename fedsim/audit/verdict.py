"""F4. An audit: both attacks on one update, beside the blindest of guesses, on one budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedsim import rng
from fedsim.audit.likeness import Likeness, compare, unit
from fedsim.audit.sme import Attack, Found, Seen, attack
from fedsim.inversion import inputs_of
from fedsim.problem import Problem

METHODS = {"blind": "mean picture", "baseline": "gradient inversion", "sme": "SME"}
"""What is compared, in words. The mean picture is that of examples which are not the client's: what one guesses without any update."""


@dataclass(frozen=True)
class Audit:
    """What attacks read out of an update.

    Attributes:
        truth: the true pictures on the scale [0, 1], `[N, C, H, W]`.
        y: their labels.
        likeness: of what each of METHODS came to.
        found: what the two attacks came to.
    """

    truth: Tensor
    y: Tensor
    likeness: dict[str, Likeness]
    found: dict[str, Found]

    def figures(self) -> dict[str, dict[str, Any]]:
        """The figures of each method, for a table: means over pictures."""
        out: dict[str, dict[str, Any]] = {}
        for name, like in self.likeness.items():
            out[name] = {"psnr": float(like.psnr.mean()), "ssim": float(like.ssim.mean())}
            if name in self.found:
                found = self.found[name]
                out[name] |= {"objective": found.objective, "a": found.a, "seconds": found.seconds}
        return out


def audit(problem: Problem, seen: Seen, true: Tensor, others: Tensor, how: Attack, key: rng.Key) -> Audit:
    """Attack with and without the surrogate, from the same start. `true` `[N, ...]` only judges; `others` are what anyone has."""
    inputs = inputs_of(problem)
    found = {name: attack(problem, seen, each, key) for name, each in (("baseline", replace(how, start=0.0)), ("sme", how))}
    guess = others.mean(0, keepdim=True).expand_as(true)
    likeness = {"blind": compare(guess, true, inputs)} | {name: compare(each.x, true, inputs) for name, each in found.items()}
    with torch.no_grad():
        return Audit(unit(true, inputs), seen.y, likeness, found)
