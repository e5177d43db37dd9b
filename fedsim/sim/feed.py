"""What the steps of a pass see: batches gathered from the resident data, and random numbers drawn by key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim import rng
from fedsim.problem import Problem
from fedsim.strategy import LocalProgram
from fedsim.tree import rows
from fedsim.types import Batch, Draws, Work

_SOURCES: dict[str, Callable[..., np.ndarray]] = {"uniform": rng.uniform, "normal": rng.normal}


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

    @property
    def steps(self) -> int:
        """Steps of the client that has most."""
        return self.work.index.shape[1]

    def active(self, s: int) -> int:
        """How many clients, the first ones, run step `s`."""
        return int((self.work.steps > s).sum())

    def batch(self, active: int, s: int) -> Batch:
        """The examples of step `s` of the first `active` clients: `[active, B, ...]`."""
        index = self.work.index[:active, s]
        mask = torch.from_numpy(self.work.mask[:active, s]).to(self.x.device, self.problem.version.dtype)
        x, y = self._gather(torch.from_numpy(index).flatten())
        return Batch(x.view(*index.shape, *x.shape[1:]), y.view(*index.shape, *y.shape[1:]), mask)

    def draws(self, active: int, s: int) -> Draws:
        """What step `s` of the first `active` clients draws: `{name: [active, ...]}`."""
        return self._draw(self.keys[:active], s, self.work.index.shape[2])

    def single(self, c: int, s: int) -> tuple[Batch, Draws]:
        """Step `s` of client `c` alone, who needs no padding: `[B, ...]`."""
        width = int(self.work.mask[c, s].sum())
        draws = self._draw(self.keys[c : c + 1], s, width)
        return Batch(*self._gather(torch.from_numpy(self.work.index[c, s, :width]))), rows(draws, 0) if draws else draws

    def part(self, own: slice) -> Feed:
        """The pass of some neighbours alone."""
        work, steps = self.work, self.work.steps[own]
        alone = Work(work.index[own, : steps[0]], work.mask[own, : steps[0]], steps, work.n[own])
        return Feed(self.program, self.problem, self.x, self.y, alone, self.keys[own])

    def _gather(self, places: Tensor) -> tuple[Tensor, Tensor]:
        places = places.to(self.x.device)  # a plain row gather is faster than indexing by a matrix
        return self.x.index_select(0, places), self.y.index_select(0, places)

    def _draw(self, keys: rng.Keys, s: int, batch: int) -> Draws:
        out = {}
        for j, (name, draw) in enumerate(sorted(self.program.draws(self.problem, batch).items())):
            step_keys = rng.fold_each(rng.fold_each(keys, np.array([s])), np.array([j]))
            out[name] = torch.from_numpy(_SOURCES[draw.kind](step_keys, draw.shape)).to(self.x.device)
        return out
