"""Weights & Biases: a run with the scenario as its configuration. Project and mode are `WANDB_PROJECT` and `WANDB_MODE`."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any

from fedsim.trackers import Row, Tracker, needs, numbers


class WandB:
    """One W&B run for each run folder: it goes on when the run does."""

    def __init__(self, values: dict[str, Any], folder: Path):
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError:
            raise needs("wandb", "wandb") from None
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self._run: Any = wandb.init(name=values["name"], config=values, dir=str(folder), id=identity, resume="allow")

    def log(self, row: Row) -> None:
        self._run.log(numbers(row), step=row["round"])

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


def start(values: dict[str, Any], folder: Path) -> Tracker:
    """The tracker of a run."""
    return WandB(values, folder)
