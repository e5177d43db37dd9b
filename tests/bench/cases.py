"""The workloads: what every contestant trains, on which data, for how many steps. Knows nothing of fedsim, Flower or pfl."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASSES = 10
TESTS = 1000
SEED = 7


@dataclass(frozen=True)
class Case:
    """One workload: a round is `cohort` clients x `steps` steps of `batch` examples, then a mean weighted by examples.

    Client `i` owns the examples `i * examples` to `(i + 1) * examples`. `model` is what a fedsim scenario says; `module` builds the same
    network for the others.
    """

    name: str
    model: dict[str, Any]
    cohort: int
    steps: int
    batch: int
    clients: int = 100
    examples: int = 600
    shape: tuple[int, ...] = (1, 28, 28)
    lr: float = 0.1
    rounds: int = 10  # timed rounds of a run, unless told otherwise


CASES = {
    case.name: case
    for case in (
        Case("logreg-100", {"name": "logreg"}, cohort=100, steps=5, batch=20, rounds=20),
        Case("mlp-10", {"name": "mlp", "hidden": [200]}, cohort=10, steps=30, batch=20, rounds=20),
        Case("mlp-100", {"name": "mlp", "hidden": [200]}, cohort=100, steps=30, batch=20),
        Case("mlp-1000", {"name": "mlp", "hidden": [200]}, cohort=50, steps=5, batch=20, clients=1000, examples=100),
        Case("lenet-10", {"name": "lenet5"}, cohort=10, steps=30, batch=20),
        Case("pfl-cifar10", {"name": "pfl-cnn"}, cohort=50, steps=5, batch=10, clients=1000, examples=50, shape=(3, 32, 32), rounds=5),
    )
}


@dataclass(frozen=True)
class Images:
    """Training examples `x [M, ...]`, `y [M]`, and test examples."""

    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def images(case: Case) -> Images:
    """Noise around one faint pattern a class: the same numbers in every process, and something to learn."""
    draw = np.random.default_rng(SEED)
    count = case.clients * case.examples + TESTS
    patterns = 0.05 * draw.random((CLASSES, *case.shape), dtype=np.float32)
    y = draw.integers(CLASSES, size=count)
    x = draw.random((count, *case.shape), dtype=np.float32)
    x -= 0.5
    x += patterns[y]
    return Images(x[:-TESTS], y[:-TESTS], x[-TESTS:], y[-TESTS:])


def module(case: Case) -> nn.Module:
    """The case's network in plain torch, initialised from one seed."""
    import torch
    from torch import nn

    torch.manual_seed(SEED)
    pixels = int(np.prod(case.shape))
    layers: dict[str, list[nn.Module]] = {
        "logreg": [nn.Flatten(), nn.Linear(pixels, CLASSES)],
        "mlp": [nn.Flatten(), nn.Linear(pixels, 200), nn.ReLU(), nn.Linear(200, CLASSES)],
    }
    if len(case.shape) == 3 and case.shape[1:] == (28, 28):
        layers["lenet5"] = [
            *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, CLASSES)),
        ]
    if case.shape == (3, 32, 32):
        layers["pfl-cnn"] = [
            *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten()),
            *(nn.Linear(12544, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, CLASSES)),
        ]
    return nn.Sequential(*layers[case.model["name"]])


def parameters(net: nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(p.numel() for p in net.parameters())


def held_out_loss(net: nn.Module, data: Images) -> float:
    """Cross-entropy on the test examples: evidence that contestants did the same work, never timed."""
    import torch
    from torch.nn import functional as F

    net.eval()
    with torch.no_grad():
        return float(F.cross_entropy(net(torch.from_numpy(data.test_x)), torch.from_numpy(data.test_y)))


def batches(x: Tensor, y: Tensor, case: Case) -> list[tuple[Tensor, Tensor]]:
    """A client's shuffled batches, `case.steps` of them; every case has them within one epoch."""
    import torch

    order = torch.randperm(len(x))[: case.steps * case.batch].view(case.steps, case.batch)
    return [(x[index], y[index]) for index in order]


def client(case: Case, i: int) -> slice:
    """Which examples client `i` owns."""
    return slice(i * case.examples, (i + 1) * case.examples)


@dataclass
class Clock:
    """When rounds ended. Wall-clock time, because it starts in the process that spawned this one."""

    spawned: float
    ends: list[float] = field(default_factory=list)
    notes: dict[str, float] = field(default_factory=dict)

    def tick(self) -> None:
        """A round has ended."""
        self.ends.append(time.time())

    def note(self, name: str) -> None:
        """Something before the first round has ended."""
        self.notes[name] = time.time() - self.spawned

    def seconds(self) -> tuple[float, list[float]]:
        """From the spawn to the end of round 1, and each later round but the last, in which some contestants also finish up."""
        rounds = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        return self.ends[0] - self.spawned, rounds[:-1]
