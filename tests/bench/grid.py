"""The code of `flower.py`, client and strategy, on fedsim's `SimGrid` instead of Flower's simulation: one process, no Ray."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import FedAvg

from fedsim.flower.grid import SimGrid
from tests.bench.cases import Case, Clock, held_out_loss, images, module
from tests.bench.flower import client_app


def measure(case: Case, rounds: int, workers: int, clock: Clock, settings: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run `rounds` rounds; the server's `evaluate_fn` tells the clock when each one ends."""
    clock.note("imports")
    torch.set_num_threads(1)
    final = {}

    def ended(number: int, arrays: ArrayRecord) -> None:
        if number:
            clock.tick()
        final["arrays"] = arrays

    strategy = FedAvg(fraction_train=case.cohort / case.clients, fraction_evaluate=0.0)
    first = ArrayRecord(module(case).state_dict())
    grid = SimGrid(client_app, case.clients, seed=1)
    grid.start(strategy, first, num_rounds=rounds, train_config=ConfigRecord({"case": case.name}), evaluate_fn=ended)
    net = module(case)
    net.load_state_dict(final["arrays"].to_torch_state_dict())
    return {"cores": 1, "loss": held_out_loss(net, images(case))}
