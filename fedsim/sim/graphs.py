"""A step along a chain as a CUDA graph: recorded once, then replayed by a single launch where PyTorch would launch two hundred kernels.

What a graph reads and writes has its place in memory: a pass copies its models and batches there. The arithmetic is that of
`fedsim.sim.descent`, kernel by kernel.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedsim.local import Descent, Learner
from fedsim.models import Link, unshared
from fedsim.params import Params
from fedsim.sim.descent import Mover, by_chain
from fedsim.sim.feed import Feed
from fedsim.tree import tree_leaves, tree_map
from fedsim.types import Batch, Draws

MOST = 4
"""Graphs that are kept: each has the memory of a step."""


@dataclass(frozen=True)
class _Recorded:
    """A graph, and the places that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    mover: Mover
    batch: Batch
    draws: Draws
    loss: Tensor
    seen: Tensor


class Graphs:
    """The graphs of one trainer, by what they cannot change: the rule, and the shapes of models and batches."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, _Recorded] = OrderedDict()

    def descend(self, rule: Descent, carry: Learner, feed: Feed, chain: tuple[Link, ...]) -> Learner:
        """`fedsim.sim.descent.descend`, by graphs. Clients that have no step left are set aside, as there."""
        w, received = {name: unshared(value) for name, value in carry.w.items()}, dict(carry.w)
        everyone, loss, seen = Mover.of(rule, w, received), carry.loss.clone(), carry.seen.clone()
        for first, last in _stretches(feed.active):
            now = slice(0, feed.active[first])
            running = everyone.part(now)
            recorded = self._recorded(rule, running, feed.batch(first), feed.draws(first), feed, chain)
            _copy((running, loss[now], seen[now]), (recorded.mover, recorded.loss, recorded.seen))
            for s in range(first, last):
                _copy((feed.batch(s), feed.draws(s)), (recorded.batch, recorded.draws))
                recorded.graph.replay()
            _copy((recorded.mover.w, recorded.mover.v, recorded.loss, recorded.seen), (running.w, running.v, loss[now], seen[now]))
        return replace(carry, w=Params(everyone.w), loss=loss, seen=seen)

    def _recorded(self, rule: Descent, mover: Mover, batch: Batch, draws: Draws, feed: Feed, chain: tuple[Link, ...]) -> _Recorded:
        key = rule, tuple((leaf.shape, leaf.dtype) for leaf in _tensors((mover, batch, draws)))
        if key not in self._kept:
            while len(self._kept) >= MOST:
                self._kept.popitem(last=False)
            self._kept[key] = _record(rule, mover, batch, draws, feed, chain)
        self._kept.move_to_end(key)
        return self._kept[key]


def _stretches(active: list[int]) -> list[tuple[int, int]]:
    """Neighbouring steps that as many clients run: first, and last + 1."""
    starts = [s for s in range(len(active)) if s == 0 or active[s] != active[s - 1]]
    return [(s, e) for s, e in zip(starts, [*starts[1:], len(active)], strict=True) if active[s]]


def _record(rule: Descent, mover: Mover, batch: Batch, draws: Draws, feed: Feed, chain: tuple[Link, ...]) -> _Recorded:
    w, received = ({name: unshared(value) for name, value in values.items()} for values in (mover.w, mover.received))
    v = {name: unshared(value) for name, value in mover.v.items()}
    batch, draws = tree_map(torch.clone, (batch, draws))
    zeros = [torch.zeros(len(mover), device=feed.x.device, dtype=feed.problem.version.dtype) for _ in range(2)]
    place = _Recorded(torch.cuda.CUDAGraph(), Mover(rule, w, v, received), batch, draws, *zeros)
    step = by_chain(feed.problem, chain)

    def once() -> None:
        lost, examples = step(place.mover, place.batch, place.draws)
        place.loss.add_(lost)
        place.seen.add_(examples)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # libraries make themselves ready
        once()
    torch.cuda.current_stream().wait_stream(aside)
    with torch.cuda.graph(place.graph):
        once()
    return place


def _copy(source: Any, target: Any) -> None:
    """The numbers of one tree, into the tensors of another of its form."""
    for new, old in zip(_tensors(source), _tensors(target), strict=True):
        old.copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Mover):
        return [*tree.w.values(), *tree.v.values(), *tree.received.values()]
    if isinstance(tree, tuple):
        return [leaf for part in tree for leaf in _tensors(part)]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
