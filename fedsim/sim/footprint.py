"""What a chunk of clients takes up while it trains: measured, by training one for a single step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.profiler import ProfilerActivity, profile

from fedsim.sim.cohort import Chunk, Trainer
from fedsim.strategy import LocalProgram


def footprint(trainer: Trainer, program: LocalProgram, message: Any, chunk: Chunk) -> int:
    """The most bytes that are allocated at a time, beyond data and message, while `chunk` takes one step of `program`."""
    single: Any = replace(program, steps=1)  # type: ignore[type-var]
    plain = replace(trainer, compile=False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        plain.train((single, message), chunk)
    now = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
