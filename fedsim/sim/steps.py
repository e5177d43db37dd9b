"""Running a program's own `step` through a pass: for a stack of clients under `torch.vmap`, compiled, or for one client alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedsim.sim.feed import Feed
from fedsim.strategy import LocalProgram
from fedsim.tree import concat, rows, tree_map
from fedsim.types import Batch, Draws


def stacked_pass(carry: Any, feed: Feed, name: str) -> Any:
    """All steps of one pass of a stack of clients. Those that have no step left are set aside: a padded step is never run."""
    program, problem = feed.program, feed.problem
    run = torch.vmap(lambda carry, batch, draws: program.step(problem, carry, batch, draws, name))
    finished = []
    running = len(feed.keys)
    for s, active in enumerate(feed.active):
        if active < running:
            finished.append(rows(carry, slice(active, running)))
            carry, running = rows(carry, slice(0, active)), active
        carry = run(carry, feed.batch(s), feed.draws(s))
    return concat([carry, *reversed(finished)])


def single_pass(carry: Any, feed: Feed, c: int, name: str) -> Any:
    """All steps of one pass of client `c` alone."""
    for s in range(int(feed.work.steps[c])):
        batch, draws = feed.single(c, s)
        carry = feed.program.step(feed.problem, carry, batch, draws, name)
    return carry


CompiledStep = Callable[[Any, Batch, Draws, Tensor, Tensor], Any]
CompiledSteps = dict[tuple[LocalProgram, str], CompiledStep]
"""What has been compiled so far, by program and pass."""

TOGETHER = 4
"""A compiled stack has a multiple of this many rows, so that cohorts of all sizes need few compilations."""


def compiled_pass(steps: CompiledSteps, carry: Any, feed: Feed, name: str) -> Any:
    """`stacked_pass` through a compiled step. Shapes never change: a client that has no step left, or that fills up, keeps its carry."""
    key = (feed.program, name)
    if key not in steps:
        steps[key] = _compile(feed, name)
    count = len(feed.keys)
    room = count if count == 1 else -(-count // TOGETHER) * TOGETHER
    padded = feed.padded(room)
    filled = torch.arange(room).clamp(max=count - 1)  # also a copy, whose strides do not change from step to step
    carry = tree_map(lambda leaf: leaf[filled.to(leaf.device)], carry)
    for s in range(len(feed.active)):
        batch, draws, runs = padded.all(s)
        carry = steps[key](carry, batch, draws, runs, feed.problem.version)
    return rows(carry, slice(0, count))


def _compile(feed: Feed, name: str) -> CompiledStep:
    program, problem = feed.program, feed.problem

    def step(carry: Any, batch: Batch, draws: Draws, runs: Tensor, version: Tensor) -> Any:
        after = program.step(replace(problem, version=version), carry, batch, draws, name)
        return tree_map(lambda new, old: torch.where(runs, new, old), after, carry)

    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # of all programs and stacks of a run together
    graphs = "reduce-overhead" if feed.x.device.type == "cuda" else None  # CUDA graphs
    return torch.compile(torch.vmap(step, in_dims=(0, 0, 0, 0, None)), dynamic=False, mode=graphs)
