"""TensorBoard: event files in the run folder. `tensorboard --logdir runs` shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsim.trackers import Row, Tracker, needs, numbers


class TensorBoard:
    """Scalars under `<run folder>/tensorboard`, with the round as the step."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise needs("tensorboard", "tensorboard") from None
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, row: Row) -> None:
        for name, value in numbers(row).items():
            self._writer.add_scalar(name.replace(".", "/", 1), value, row["round"])
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()


def start(values: dict[str, Any], folder: Path) -> Tracker:
    """The tracker of a run."""
    return TensorBoard(folder)
