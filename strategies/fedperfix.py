"""FedPerfix: of a vision transformer, plug-ins beside attention and the head stay with their client.

Sun, Mendieta, Luo, Wu, Chen, "FedPerfix: Towards Partial Model Personalization of Vision Transformers in Federated Learning", ICCV 2023
(arXiv 2308.09160). The network is the model `prefix-vit`; theta is all of it but the plug-ins and the head, which are client i's own phi_i:

    server sends theta
    client i:  (theta_i, phi_i) <- (theta_i, phi_i) - lr * grad f_i(theta_i, phi_i)      several epochs of SGD, everything together
               keeps phi_i, sends theta_i - theta
    server:    theta <- theta + sum_{i in S} n_i (theta_i - theta) / sum_{i in S} n_i

So it is `fedsim` with own: [adapters, output]; `also` adds to that (the authors keep the last block, too, on CIFAR-100). Ablations:
`fedsim` with own: output (FedRep trains it in turns: `fedalt`), own: attention or own: [attention, output]; `model.form` and `model.start`.

Differs: clients join by the scenario's participation. Sizes are those of a laptop: the paper has ViT-S/16 on 224 x 224.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from fedsim.local import Sgd
from fedsim.registry import register
from fedsim.split import Own, SplitStrategy, patterns
from fedsim.staleness import Staleness
from fedsim.strategy import FRESH, LocalProgram, Weighting


@register("fedperfix")
@dataclass(frozen=True)
class FedPerfix(SplitStrategy):
    """Plug-ins beside a vision transformer's attention, and its head, stay with their client (Sun et al., ICCV 2023)."""

    local: LocalProgram = Sgd()
    also: Own = ()
    weights: Weighting = "samples"
    server_lr: Annotated[float, Gt(0)] = 1.0
    staleness: Staleness = FRESH

    @property
    def own(self) -> Own:  # type: ignore[override]
        return ("adapters", "output", *patterns(self.also))
