"""What training takes, measured: bytes, by a chunk of clients that trains for a single step, and operations, by one example."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fedsim.sim.chunk import Chunk
from fedsim.sim.cohort import Trainer
from fedsim.strategy import LocalProgram


def footprint(trainer: Trainer, program: LocalProgram, message: Any, chunk: Chunk) -> int:
    """The most bytes that are allocated at a time, beyond data and message, while `chunk` takes one step of `program`."""
    single: Any = replace(program, steps=1)  # type: ignore[type-var]
    plain = replace(trainer, compile=False)
    if (device := trainer.x.device).type != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        plain.train((single, message), chunk)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        plain.train((single, message), chunk)
    now = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


class Flops(TorchDispatchMode):
    """Counts floating-point operations by PyTorch's own rules, in `total`: its `FlopCounterMode`, without a second of imports for it."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what it would be skipped by is imported for it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (rule := flop_registry.get(func._overloadpacket)) is not None:
            self.total += rule(*args, **(kwargs or {}), out_val=out)
        return out
