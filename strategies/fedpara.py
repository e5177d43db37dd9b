"""pFedPara: clients share one factor of each weight's Hadamard product, and keep the other.

Hyeon-Woo, Ye-Bin, Oh, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", ICLR 2022 (arXiv 2108.06098):

    W_i = W1 (.) (W2_i + 1)          W1 = X1 Y1' and W2_i = X2_i Y2_i', or their counterparts of convolutions: `model.factors`
    client i:  (X1, Y1, X2_i, Y2_i) <- local training of all of them ;  sends the change of what is shared, keeps the rest
    server:    X1 <- the mean of X1, Y1 <- the mean of Y1

So it is partial personalisation in one pass (`fedsim`, strategies/fedalt.py) whose own part is the second factors, and it halves what a
factored layer sends. FedPara itself is no strategy: with `model.factors` any server trains it.

Differs: what has no factors (biases, the last layer) is shared, unless `own` names it, too. In Flower's baseline pFedPara does not converge
on MNIST; here it does on digits (scenarios/papers/pfedpara.yaml).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from fedsim.local import Sgd
from fedsim.registry import register
from fedsim.split import Own, SplitStrategy
from fedsim.staleness import Staleness
from fedsim.strategy import FRESH, LocalProgram, Weighting

SECOND = "t2|x2|y2"
"""The factors of W2, by name."""


@register("pfedpara")
@dataclass(frozen=True)
class PFedPara(SplitStrategy):
    """FedPara whose clients keep the second factor of each weight, and average the first (Hyeon-Woo et al., ICLR 2022)."""

    local: LocalProgram = Sgd()
    own: Own = SECOND
    weights: Weighting = "samples"
    server_lr: Annotated[float, Gt(0)] = 1.0
    staleness: Staleness = FRESH
