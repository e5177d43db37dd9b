"""Conformal calibration by sketches: each client sends a t-digest of its scores of each class, once; the server merges them.

Lu, Yu, Karimireddy, Jordan, Raskar, "Federated Conformal Predictors for Distributed Uncertainty Quantification", ICML 2023
(arXiv 2305.17564) find pooled quantiles with T-Digests; t-digest: Dunning and Ertl, 2019 (arXiv 1902.04023), here Apache DataSketches'.

    client i:  D_iy = t-digest of its scores of class y, with its number M_iy
    server:    D_y = merge of D_iy over i, in order of i;  F_y(q): share of D_y at or below q
               Q(y) = inf { q : sum_y' w_y' M_y' F_y'(q) >= (1 - alpha) (w_y + sum_y' w_y' M_y') },  w as in `conformal`

One round serves any number of targets, also later ones, because class-conditional distributions are what label shift leaves alone. With
`target: pooled` it is FCP.

Differs: one digest for each class (FCP: one in all), so that the server can weigh them (ours). FCP puts mass K (clients) at infinity, here
it is the candidate's own w_y. F_y is looked at on a grid of `POINTS` quantiles of each D_y; Q is rounded up to the next of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.conformal import Alpha, Calibration, Heard, OneShot, Pooled, Scored, Target, class_count, importance, room
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.strategy import NOTHING, Report
from fedsim.tree import record
from fedsim.types import Reply

POINTS = 1001


def places(compression: int, scores: int) -> int:
    """Bytes that a digest of so many scores may take: a header, and 16 for each of at most 2 k + 30 centroids (observed: 1.1 k)."""
    return 32 + 16 * min(2 * compression + 30, scores)


def digest(values: np.ndarray, compression: int) -> bytes:
    """A t-digest of some numbers, as bytes; none of no numbers."""
    from datasketches import tdigest_double

    sketch = tdigest_double(compression)
    sketch.update(np.sort(values.astype(np.float64)))
    return bytes(sketch.serialize()) if len(values) else b""


@torch.library.custom_op("fedsim::digests", mutates_args=())
def digests(v: Tensor, y: Tensor, n: Tensor, classes: int, compression: int) -> Tensor:
    """A digest of the first `n` scores of each class, padded with zeros. `[C, room], [C, room], [C] -> [C, K, places]` uint8."""
    out = np.zeros((len(v), classes, places(compression, v.shape[1])), dtype=np.uint8)
    for c, (scores, labels, count) in enumerate(zip(v.cpu().numpy(), y.cpu().numpy(), n.tolist(), strict=True)):  # once a phase
        for k in range(classes):
            packed = digest(scores[:count][labels[:count] == k], compression)
            out[c, k, : len(packed)] = np.frombuffer(packed, dtype=np.uint8)
    return torch.from_numpy(out).to(v.device)


@digests.register_vmap
def _(info: Any, dims: Any, v: Tensor, y: Tensor, n: Tensor, classes: int, compression: int) -> tuple[Tensor, int]:
    v, y, n = (t.movedim(d, 0)[:, 0] for t, d in zip((v, y, n), dims[:3], strict=True))  # a stack of single clients
    return digests(v, y, n, classes, compression)[:, None], 0


@record
class Digests:
    """A client's digests, and how many scores each is of."""

    packed: Tensor  # [K, places] uint8
    counts: Tensor  # [K] int64


@register("send-digests")
@dataclass(frozen=True)
class SendDigests(Calibration):
    """Sends a t-digest of the scores of each class.

    compression: about half the number of centroids that a digest keeps.
    """

    compression: int = 100

    def __post_init__(self) -> None:
        if not 10 <= self.compression <= 10_000:
            raise ValueError(f"compression: should be 10 to 10,000, not {self.compression}")

    def finish(self, problem: Problem, message: Tensor, carry: Scored, n: Tensor) -> Reply:
        k = class_count(problem)
        there = torch.arange(len(carry.v), device=carry.v.device) < carry.n
        counts = torch.zeros(k, dtype=torch.int64, device=carry.v.device).scatter_add(0, carry.y, there.long())
        packed = digests(carry.v[None, :-1], carry.y[None, :-1], carry.n[None], k, self.compression)[0]
        return Reply(Digests(packed, counts), NOTHING, {})


def unpack(row: np.ndarray) -> Any:
    """The digest in a place."""
    from datasketches import tdigest_double

    return tdigest_double.deserialize(row.tobytes())


def merged(packed: np.ndarray, counts: np.ndarray) -> Any:
    """One digest of many `[N, places]`, or None where there are no numbers in any."""
    total = None
    for row in packed[counts > 0]:
        part = unpack(row)
        total = part if total is None else (total.merge(part), total)[1]
    return total


def ranks(sketch: Any, grid: np.ndarray) -> np.ndarray:
    """F_y on a grid. The digest counts half of what lies at a point itself; at its largest number all is counted."""
    return np.where(grid >= sketch.get_max_value(), 1.0, np.array([sketch.get_rank(q) for q in grid]))


@register("conformal-sketch")
@dataclass(frozen=True)
class SketchConformal(OneShot):
    """Conformal thresholds, weighted for label shift, from merged t-digests of the clients' scores: one round (Lu et al., ICML 2023)."""

    alpha: Alpha = 0.1
    target: Target = Pooled()
    local: SendDigests = SendDigests()

    def blank(self, problem: Problem) -> Digests:
        k = class_count(problem)
        size = places(self.local.compression, room(problem))
        return Digests(problem.version.new_zeros(k, size).byte(), problem.version.new_zeros(k).long())

    def more(self, state: Heard) -> Report:
        """What the digests weigh without the zeros that fill up their places."""
        packed = state.answers.packed.cpu().numpy()[state.answers.counts.cpu().numpy() > 0]
        return {"digest_bytes": float(sum(unpack(row).get_serialized_size_bytes() for row in packed))}

    def thresholds(self, problem: Problem, state: Heard) -> Tensor:
        counts, packed = state.answers.counts.cpu(), state.answers.packed.cpu().numpy()
        weights, lacking = importance(self.target.laws(counts), counts.sum(0))  # [R, K]
        mass = weights * counts.sum(0)
        found = [merged(packed[:, k], counts[:, k].numpy()) for k in range(counts.shape[1])]
        levels = np.linspace(0, 1, POINTS)
        grid = np.unique([[d.get_quantile(level) for level in levels] for d in found if d is not None])
        if not len(grid):
            return torch.full_like(weights, torch.inf)
        share = [np.zeros(len(grid)) if d is None else ranks(d, grid) for d in found]  # [K, G]
        reached = (mass @ torch.from_numpy(np.array(share))).cummax(1).values  # [R, G]
        goal = (1 - self.alpha) * (mass.sum(1, keepdim=True) + weights) * (1 - 1e-12)
        place = torch.searchsorted(reached, goal)
        q = torch.cat([torch.from_numpy(grid), torch.tensor([torch.inf], dtype=torch.float64)])[place]
        return q.masked_fill(lacking | (mass.sum(1, keepdim=True) <= 0), torch.inf)
