"""A least-squares federation that fits on a page, and the loop that trains on it: nothing between a test and the mathematics.

The model is `w . x` without bias, the loss half the squared error, and everything is float64 unless a test says otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedsim import rng
from fedsim.data import Lists
from fedsim.engine import Round, run
from fedsim.fleet import Fleet, Full, Participation
from fedsim.pace import Pace, Sync
from fedsim.params import Params
from fedsim.problem import Network, Problem, Regression
from fedsim.sim.cohort import Trainer
from fedsim.sim.executor import Inline
from fedsim.sim.port import SimPort


class Toy(NamedTuple):
    """What `problem_of` gives and `rounds` takes."""

    problem: Problem
    w: Params  # {"weight": [1, d]}
    x: Tensor  # [M, d]
    y: Tensor  # [M, 1]
    lists: Lists


def problem_of(xs: Sequence[Any], ys: Sequence[Any], w: Any = None, dtype: torch.dtype = torch.float64) -> Toy:
    """Client `i` owns the rows `xs[i] [n_i, d]` with targets `ys[i] [n_i]`. Training starts at `w [d]`, by default at zero."""
    xs, ys = [np.asarray(x, dtype=np.float64) for x in xs], [np.asarray(y, dtype=np.float64) for y in ys]
    x, y = torch.from_numpy(np.concatenate(xs)).to(dtype), torch.from_numpy(np.concatenate(ys)).to(dtype)[:, None]
    sizes = np.array([len(part) for part in xs])
    lists = Lists.of_clients(np.split(np.arange(len(x)), sizes.cumsum()[:-1]))
    module = nn.Linear(x.shape[1], 1, bias=False, dtype=dtype)
    start = torch.zeros_like(module.weight) if w is None else torch.tensor(w, dtype=dtype)[None]
    version = torch.zeros((), dtype=dtype)  # its dtype is also the masks'
    problem = Problem(Network(module), Regression(outputs=1), torch.from_numpy(sizes.astype(np.float32)), version=version)
    return Toy(problem, Params({"weight": start.detach()}), x, y, lists)


def jumpers(targets: Any, **more: Any) -> Toy:
    """A federation whose client `i`, after ONE full-batch step with rate `d`, is exactly at `targets[i] [d]`: updates made to order.

    It owns the rows of the identity with its target as labels, so its gradient is `(w - target) / d`.
    """
    targets = np.asarray(targets, dtype=np.float64)
    return problem_of([np.eye(targets.shape[1])] * len(targets), targets, **more)


EVERYONE, FULL, SYNC = Fleet(), Full(), Sync()


@dataclass(frozen=True)
class Listed(Participation):
    """The clients `rounds[t]` in round `t`; the last entry stays in force."""

    rounds: tuple[tuple[int, ...], ...]

    def start(self, clients: int, labels: Any, key: rng.Key) -> dict[str, Any]:
        return {"clients": np.array(clients)}

    def active(self, state: dict[str, Any], t: int, key: rng.Key) -> tuple[Any, dict[str, Any]]:
        mask = np.zeros(int(state["clients"]), dtype=bool)
        mask[list(self.rounds[min(t, len(self.rounds) - 1)])] = True
        return mask, state

    def probability(self, state: dict[str, Any], t: int) -> None:
        return None


def rounds_of(
    strategy: Any,
    toy: Toy,
    count: int,
    fleet: Fleet = EVERYONE,
    pace: Pace = SYNC,
    mode: str = "vmap",
    chunk: int | None = None,
    seed: int = 0,
) -> list[Round]:
    """The first `count` rounds: the engine's own loop over a simulated fleet in this process."""
    executor = Inline(Trainer(toy.problem, toy.x, toy.y, toy.lists, mode, calibration=toy.lists))
    try:
        blank = strategy.memory(toy.problem, toy.w)
        port = SimPort(executor, fleet, None, toy.problem.sizes, blank, chunk, rng.fold(seed, rng.FLEET))
        return list(islice(run(strategy, toy.problem, toy.w, port, pace, rng.fold(seed, 1000)), count))
    finally:
        executor.close()


def rounds(
    strategy: Any,
    toy: Toy,
    count: int,
    participation: Participation = FULL,
    mode: str = "vmap",
    chunk: int | None = None,
    seed: int = 0,
) -> list[Any]:
    """The strategy's states after each of `count` synchronous rounds."""
    return [each.state for each in rounds_of(strategy, toy, count, Fleet(participation), SYNC, mode, chunk, seed)]


def vector(w: Params) -> np.ndarray:
    """A model of this file as a NumPy vector `[d]`."""
    return w["weight"].flatten().numpy()


def path(strategy: Any, toy: Toy, count: int, **more: Any) -> np.ndarray:
    """The models after each round, `[count, d]`."""
    return np.stack([vector(state.w) for state in rounds(strategy, toy, count, **more)])


def close(actual: Any, expected: Any, within: float = 1e-6) -> None:
    """Fail unless two arrays have one shape and agree entry by entry."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=within)
