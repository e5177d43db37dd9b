"""What the steps of a pass see: batches gathered from the resident data, and random numbers drawn by key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from fedsim import rng
from fedsim.entropy import KEYED
from fedsim.private import NOISE
from fedsim.problem import Problem
from fedsim.strategy import LocalProgram
from fedsim.tree import rows
from fedsim.types import Batch, Draws, Work


@cache
def _uniform_on_gpu() -> Callable[[rng.Keys, tuple[int, ...], torch.device], Tensor] | None:
    """`rng.uniform`, on a GPU; None without Triton."""
    try:
        from fedsim.sim.philox import uniform
    except ImportError:
        return None
    return uniform


@dataclass(frozen=True)
class Feed:
    """One pass of the clients of a chunk, sorted by falling number of steps.

    Attributes:
        program, problem: who asks.
        x, y: the resident data, `[M, ...]`.
        work: the planned steps.
        keys: of each client in this pass, for what its steps draw, `[C]`.
    """

    program: LocalProgram
    problem: Problem
    x: Tensor
    y: Tensor
    work: Work
    keys: rng.Keys

    @cached_property
    def active(self) -> list[int]:
        """How many clients, the first ones, run each step."""
        return [int((self.work.steps > s).sum()) for s in range(self.work.index.shape[1])]

    @cached_property
    def _places(self) -> Tensor:
        return torch.from_numpy(self.work.index.swapaxes(0, 1).copy()).to(self.x.device)  # [S, C, B]

    @cached_property
    def _mask(self) -> Tensor:
        mask = torch.from_numpy(self.work.mask.swapaxes(0, 1).copy())
        return mask.to(self.x.device, self.problem.version.dtype)  # [S, C, B]

    @cached_property
    def _widths(self) -> np.ndarray:
        return self.work.mask.sum(2).astype(np.int64)  # [C, S]

    def batch(self, s: int) -> Batch:
        """The examples of step `s` of the clients that run it: `[active, B, ...]`."""
        return self._batch(s, self.active[s])

    def draws(self, s: int) -> Draws:
        """What step `s` draws for the clients that run it: `{name: [active, ...]}`."""
        return self._draw(self.keys[: self.active[s]], s, self.work.index.shape[2])

    def single(self, c: int, s: int) -> tuple[Batch, Draws]:
        """Step `s` of client `c` alone, who needs no padding: `[B, ...]`."""
        width = int(self._widths[c, s])
        draws = self._draw(self.keys[c : c + 1], s, width)
        return Batch(*self._gather(self._places[s, c, :width])), rows(draws, 0) if draws else draws

    def part(self, own: slice) -> Feed:
        """The pass of some neighbours alone."""
        work, steps = self.work, self.work.steps[own]
        alone = Work(work.index[own, : steps[0]], work.mask[own, : steps[0]], steps, work.n[own])
        return Feed(self.program, self.problem, self.x, self.y, alone, self.keys[own])

    def padded(self, room: int) -> Feed:
        """The same pass with clients added that have no steps, up to `room`, and batches of the program's full size."""
        work, more = self.work, room - len(self.keys)
        width = max(work.index.shape[2], self.program.batch_size or 0)
        wider = ((0, more), (0, 0), (0, width - work.index.shape[2]))
        full = Work(np.pad(work.index, wider), np.pad(work.mask, wider), np.pad(work.steps, (0, more)), np.pad(work.n, (0, more)))
        return replace(self, work=full, keys=np.pad(self.keys, (0, more)))

    def all(self, s: int) -> tuple[Batch, Draws, Tensor]:
        """Step `s` of every client, whether it runs it or not, and which ones do: `[C, ...]`, `[C] bool`."""
        runs = torch.from_numpy(self.work.steps > s).to(self.x.device)
        return self._batch(s, len(self.keys)), self._draw(self.keys, s, self.work.index.shape[2]), runs

    def _batch(self, s: int, clients: int) -> Batch:
        places = self._places[s, :clients]
        x, y = self._gather(places.reshape(-1))
        return Batch(x.view(*places.shape, *x.shape[1:]), y.view(*places.shape, *y.shape[1:]), self._mask[s, :clients])

    def _gather(self, places: Tensor) -> tuple[Tensor, Tensor]:
        # A plain row gather is faster than indexing by a matrix.
        return self.x.index_select(0, places), self.y.index_select(0, places)

    def _draw(self, keys: rng.Keys, s: int, batch: int) -> Draws:
        wanted = self.program.draws(self.problem, batch)
        protected = self.program.protects() is not None
        out = {}
        for j, (name, draw) in enumerate(sorted(wanted.items())):
            step_keys = rng.fold_each(rng.fold_each(keys, np.array([s])), np.array([j]))
            entropy = self.problem.entropy if protected or name == NOISE else KEYED  # noise is nobody's to foresee, epsilon or not
            if draw.kind == "uniform" and entropy is KEYED and self.x.device.type == "cuda" and (on_gpu := _uniform_on_gpu()):
                out[name] = on_gpu(step_keys, draw.shape, self.x.device)
                continue
            source = entropy.normal if draw.kind == "normal" else entropy.uniform
            out[name] = torch.from_numpy(source(step_keys, draw.shape)).to(self.x.device)
        return out
