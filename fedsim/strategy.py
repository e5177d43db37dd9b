"""F1. The protocols a paper fills in: `Strategy` (the server), `WeightedStrategy` (a server that only sums), `LocalProgram` (a client).

Concrete classes are frozen dataclasses: fields are the paper's hyper-parameters, methods are the boxes of its algorithm, and
nothing is remembered on `self`. State goes in and comes out, so the state is the checkpoint.

A complete strategy:

    @register("plain-mean")
    @dataclass(frozen=True)
    class PlainMean(WeightedStrategy):
        '''Every client that took part counts the same.'''

        local: LocalProgram = Sgd()

        def init(self, problem, w):
            return ModelState(w)

        def weigh(self, problem, state, arrivals):
            return torch.ones(len(arrivals))

        def apply(self, problem, state, total, arrivals, key):
            return ModelState(state.w + total.mean())
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from annotated_types import Gt, Le
from torch import Tensor

from fedsim.params import Params
from fedsim.privacy import Protection
from fedsim.problem import Problem
from fedsim.registry import Kind
from fedsim.rng import Key
from fedsim.staleness import Indifferent, Staleness
from fedsim.tree import record
from fedsim.types import Arrivals, Batch, Draw, Draws, Job, Reply, Total, Updates

Report = dict[str, float | Tensor]
"""What is to be said of a round: numbers, and tensors `[C]` with one value for each arrival."""

NOTHING: dict[str, Any] = {}
"""The memory of a client that remembers nothing: an empty pytree."""


class State(Protocol):
    """A server's state: a `@record` that has at least the model `w`."""

    @property
    def w(self) -> Params: ...


@record
class ModelState:
    """The state of a server that remembers only the model."""

    w: Params


@dataclass(frozen=True)
class Descent:
    """Constants of a program whose step is nothing but this, on a carry that is a `fedsim.local.Learner`:

    v = momentum * v + grad f(w; batch) + decay * w + proximal * (w - w_received) ;  w = w - rate * v
    """

    rate: float
    momentum: float = 0.0
    decay: float = 0.0
    proximal: float = 0.0


class LocalProgram(Kind, ABC):
    """What a client does, written for ONE client: there is no C axis in here. The platform owns the loop over steps and clients.

    `carry` is a pytree of tensors. `step` is pure, never sees a padded step, and draws no random numbers: it receives what `draws`
    asks for, drawn by key outside, so that results do not depend on how clients are grouped.

    Every program has these fields, which the platform reads to plan its steps:
        epochs: passes over the client's data.
        steps: number of local steps instead of epochs (batches then run through as many epochs as it takes), or None.
        batch_size: examples a step, or None for all of the client's data at once. The last batch of an epoch may be smaller.
    """

    passes: ClassVar[tuple[str, ...]] = ("train",)  # named passes over the data, each of `epochs` or `steps`
    reads: ClassVar[Literal["train", "calibration"]] = "train"  # which of a client's data
    receives: ClassVar[type] = Params  # the type of message it begins with; a strategy that sends another cannot run it
    joins: ClassVar[bool] = False  # whether it trains what memory holds of a model that is split, and keeps it there: see `fedsim.split`
    remembers: ClassVar[bool] = False  # whether it runs only under a strategy whose clients have (a part of) a model of their own
    epochs: int
    steps: int | None
    batch_size: int | None

    @abstractmethod
    def begin(self, problem: Problem, message: Any, memory: Any) -> Any:
        """The carry before the first step."""

    @abstractmethod
    def step(self, problem: Problem, carry: Any, batch: Batch, draws: Draws, passname: str) -> Any:
        """The carry after one step on `batch`."""

    @abstractmethod
    def finish(self, problem: Problem, message: Any, carry: Any, n: Tensor) -> Reply:
        """The reply after the last step; `n` is the client's number of examples, a scalar."""

    def chances(self, sizes: np.ndarray) -> np.ndarray | None:
        """Poisson sampling: the chance with which each example of a client is in a step, for clients of `sizes` `[C]`; `[C]` float64.

        None (the default) means shuffled epochs. With it, `batch_size` is only what is expected, and a step may be empty: its batch then
        has no examples, or a mask that is all zero.
        """
        return None

    def protects(self) -> Protection | None:
        """What protects each example in a reply, on its own and whatever the server does with it. Default: nothing does."""
        return None

    def draws(self, problem: Problem, batch: int) -> dict[str, Draw]:
        """Random numbers that one step needs, by name. Default: what the network needs (dropout)."""
        return problem.draws(batch)

    def ages(self) -> bool:
        """Whether it reads `problem.version`. Where it does not, jobs of several rounds may train together. Default: it may."""
        return True

    def descent(self, problem: Problem) -> Descent | None:
        """The constants of `step` where it is plain gradient descent: the platform then does the same in place, several times faster."""
        return None


class Strategy(Kind, ABC):
    """What the server does with updates. Concrete strategies are never subclassed: compose by wrapping."""

    paces: ClassVar[frozenset[str]] = frozenset({"sync", "buffered", "deadline"})
    sends: ClassVar[type] = Params  # the type of message in its jobs
    recalls: ClassVar[bool] = False  # whether `server` is told the message that each client began with (`updates.started`)
    asks: ClassVar[bool] = True  # whether clients' data are used at all
    personal: ClassVar[bool] = False  # whether `deploy` gives each client a model of its own
    keeps: ClassVar[bool] = False  # whether clients come with what they kept of the model in the phase before
    local: LocalProgram

    @property
    def needs(self) -> frozenset[str]:
        """What the problem must have: of "proxy", "calibration" and "rates". A scenario that lacks it is refused before anything trains."""
        return frozenset()

    @abstractmethod
    def init(self, problem: Problem, w: Params) -> Any:
        """The state before the first round, a `@record` with a field `w`."""

    @abstractmethod
    def server(self, problem: Problem, state: Any, updates: Updates, key: Key) -> Any:
        """The state after these updates. Never called without any."""

    def plan(self, problem: Problem, state: Any, ids: np.ndarray, key: Key) -> list[Job]:
        """What the clients `ids` `[C]` are asked to do. Default: run `local` on the model."""
        return [Job(ids, state.w, self.local)]

    def memory(self, problem: Problem, w: Params) -> Any:
        """What a client's device remembers before it first takes part. Default: nothing."""
        return NOTHING

    def deploy(self, state: Any, memory: Any) -> Params:
        """What a client runs, and what is evaluated. Default: the server's model."""
        return state.w

    def owned(self, problem: Problem, w: Params) -> tuple[str, ...]:
        """Names of the parameters of which each client has its own, and sends nothing. Raises `FedsimError` where that fits none."""
        return ()

    def protects(self) -> Protection | None:
        """What protects each client in the state. Default: nothing does."""
        return None

    def report(self, problem: Problem, before: Any, state: Any, arrivals: Arrivals) -> Report:
        """What is to be said of the round that turned `before` into `state`. Default: nothing.

        Numbers are logged as `server.<name>`; tensors `[C]`, in the order of `arrivals`, as each client's own. A strategy in which clients
        count differently says how much under the name `weight`.
        """
        return {}


class WeightedStrategy(Strategy, ABC):
    """A strategy whose new model is a function of a weighted SUM, with weights that are known before anyone trains.

    Workers then send back one summed vector a chunk instead of one a client. `weigh` must give each client a weight that depends on
    its own row of `arrivals` and on the state, not on who else arrived: a client may still be lost or rejected, and is then left out of
    `total`. Normalise in `apply`, by `total.weight` or by a constant.
    """

    @property
    def uniform(self) -> bool:
        """Whether every arrival weighs 1 and `apply` sees the updates through `total` alone: then one client moves it by its own update."""
        return False

    @abstractmethod
    def weigh(self, problem: Problem, state: Any, arrivals: Arrivals) -> Tensor:
        """The weight of each arrival, `[C]` float32."""

    @abstractmethod
    def apply(self, problem: Problem, state: Any, total: Total, arrivals: Arrivals, key: Key) -> Any:
        """The state after a weighted sum of updates."""

    def server(self, problem: Problem, state: Any, updates: Updates, key: Key) -> Any:
        total = updates.total(self.weigh(problem, state, updates.arrivals))
        return self.apply(problem, state, total, updates.arrivals, key)

    def report(self, problem: Problem, before: Any, state: Any, arrivals: Arrivals) -> Report:
        return {"weight": self.weigh(problem, before, arrivals)}


FRESH = Indifferent()
"""Staleness does not matter."""

Count = Annotated[int, Gt(0), Le(1_000_000)]
"""Epochs, steps or a batch size: a plan of more than a million would not fit in memory."""

Weighting = Literal["samples", "uniform"]


def client_weights(rule: Weighting, arrivals: Arrivals, staleness: Staleness = FRESH) -> Tensor:
    """How much each arrival counts: its number of training examples, or 1; less where it is stale. `[C]` float32."""
    counts = arrivals.n if rule == "samples" else torch.ones_like(arrivals.n)
    return counts * staleness.factor(arrivals.staleness).to(counts)


def client_shares(rule: Weighting, problem: Problem) -> Tensor:
    """alpha, how much each client counts in the objective: by its number of training examples, or 1/N. They add up to 1. `[N]` float32."""
    return problem.sizes / problem.sizes.sum() if rule == "samples" else torch.full_like(problem.sizes, 1 / problem.clients)
