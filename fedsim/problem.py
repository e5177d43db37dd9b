"""F1. `Problem`: what is being learned, as pure functions of parameters.

A strategy and a program see the data only through it: `loss(w, batch)`, `grad(w, batch)`, the number of clients and their sizes, the
server's proxy data, and the parameters that an earlier phase left behind.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.entropy import KEYED, Entropy
from fedsim.errors import FedsimError
from fedsim.params import Params
from fedsim.table import IN_RAM, Storage
from fedsim.types import Batch, Draw, Draws


class Task(ABC):
    """What a model's output means, and how wrong it is."""

    outputs: int  # width of the model's last layer

    @abstractmethod
    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Loss of each example: `[B, ...], [B, ...] -> [B]`."""

    def slope(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each example `[B]`, and its derivative in the output `[B, ...]`."""
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            each = self.loss(leaf, y)
            (d,) = torch.autograd.grad(each, leaf, torch.ones_like(each))
        return each.detach(), d

    def targets(self, free: Tensor) -> Tensor:
        """Targets that may lie between labels, from any numbers: what is optimised where labels are unknown. `[B, outputs] -> [B, ...]`."""
        raise FedsimError(f"{type(self).__name__.lower()} has no targets between its labels, so examples cannot be reconstructed")


@dataclass(frozen=True)
class Classification(Task):
    """One of `outputs` classes: cross-entropy of logits `[B, K]` against labels `[B]` int64, or against probabilities `[B, K]`."""

    outputs: int
    names: tuple[str, ...] = ()

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output, y, reduction="none")

    def slope(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """`softmax(output) - onehot(y)`, written out because it runs in every step."""
        logp, place = output.log_softmax(1), y[:, None]
        return -logp.gather(1, place)[:, 0], logp.exp() - (place == torch.arange(logp.shape[1], device=y.device)).to(logp.dtype)

    def targets(self, free: Tensor) -> Tensor:
        return free.softmax(-1)


@dataclass(frozen=True)
class NextToken(Task):
    """The next token at each position: cross-entropy of logits `[B, T, V]` against `[B, T]` int64, averaged over positions but `IGNORE`."""

    outputs: int
    IGNORE = -100

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(output.flatten(0, 1), y.flatten(), reduction="none", ignore_index=self.IGNORE).view(y.shape)  # [B, T]
        return each.sum(1) / (y != self.IGNORE).sum(1).clamp(min=1)


@dataclass(frozen=True)
class Regression(Task):
    """Real targets: half the squared error of `[B, D]` against `[B, D]` float."""

    outputs: int

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (output - y).square().sum(1)

    def targets(self, free: Tensor) -> Tensor:
        return free


@dataclass(frozen=True)
class Quantiles(Task):
    """Two quantiles of a real target: the pinball losses of `[B, 2]` at the levels `low` and `high` against `[B, 1]` float, added up."""

    low: float = 0.05
    high: float = 0.95
    outputs: int = 2

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        level = output.new_tensor([self.low, self.high])
        return torch.maximum(level * (y - output), (level - 1) * (y - output)).sum(1)


@dataclass(frozen=True)
class MultiLabel(Task):
    """Any subset of `outputs` labels: binary cross-entropy of logits `[B, L]` against `[B, L]` in {0, 1}, averaged over labels."""

    outputs: int

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, y.to(output.dtype), reduction="none").mean(1)

    def targets(self, free: Tensor) -> Tensor:
        return free.sigmoid()


@dataclass(frozen=True)
class Inputs:
    """What an input of real numbers can be.

    Attributes:
        shape: of one input.
        low, high: the least and greatest value, `[channels, 1, 1]` for pictures, one number for everything else.
    """

    shape: tuple[int, ...]
    low: Tensor
    high: Tensor

    @staticmethod
    def of(x: Tensor) -> Inputs | None:
        """The range that examples `x` `[M, ...]` span; None for tokens and other whole numbers."""
        if not x.is_floating_point():
            return None
        over = (0, 2, 3) if x.ndim == 4 else tuple(range(x.ndim))
        low, high = x.amin(over), x.amax(over)
        return Inputs(tuple(x.shape[1:]), *((low[:, None, None], high[:, None, None]) if x.ndim == 4 else (low, high)))


class Network:
    """A module as a pure function of its parameters (and of the buffers that its dropouts read). Not for several threads at once.

    It does what `torch.func.functional_call` does, with the places of the parameters looked up once instead of at every call.

    `adapters` says which tensors are trained, by name and shape, where they are not all parameters: see `fedsim.models.lora`.
    """

    def __init__(self, module: nn.Module, adapters: dict[str, tuple[int, ...]] | None = None):
        self.module = module
        self.adapters = adapters or {}
        self._places: dict[str, list[tuple[dict[str, Any], str]]] = {}
        for members, named in (("_parameters", module.named_parameters()), ("_buffers", module.named_buffers())):
            owners = [(getattr(part, members), key) for part in module.modules() for key in getattr(part, members)]
            for name, tensor in named:  # a tensor may be at home in several places
                self._places[name] = [(owner, key) for owner, key in owners if owner[key] is tensor]
        # Recurrent layers keep a list of their weights besides, and a compiler must see a call that it knows.
        self._plain = not any(isinstance(part, nn.RNNBase) for part in module.modules())

    def __reduce__(self) -> tuple[Any, ...]:
        return Network, (self.module, self.adapters)

    def __call__(self, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        if not self._plain or torch.compiler.is_compiling():
            return torch.func.functional_call(self.module, tensors, (x,))
        places = [(owner, key, tensor) for name, tensor in tensors.items() for owner, key in self._places[name]]
        before = [owner[key] for owner, key, _ in places]
        try:
            for owner, key, tensor in places:
                owner[key] = tensor
            return self.module(x)
        finally:
            for (owner, key, _), tensor in zip(places, before, strict=True):
                owner[key] = tensor


@dataclass(frozen=True)
class Problem:
    """A federated learning problem. Frozen: the platform hands out variants with `at` and `replace`.

    Attributes:
        network: the network; only its structure is used, its own parameters are not.
        task: loss of an output.
        sizes: training examples of each client, `[N]` float32.
        example_draws: random numbers the network needs for one example in training (dropout), by buffer name.
        proxy: the server's own data, or None.
        calibration: calibration examples of each client, `[N]` float32, or None where the scenario keeps none.
        rates: the true share of rounds in which each client takes part, `[N]` float32, or None where the platform does not know it.
        frozen: the model that an earlier phase deployed, or None. Where only adapters are trained, everything else is in here.
        held: parameters that are in every output and have no gradient: see `holding`.
        storage: where tables with a row for each client are kept.
        inputs: shape and range of an input, which a server knows from how its clients prepare their data; None for tokens.
        version: how many server updates the model at hand has behind it; schedules look at it. 0-dim float.
        entropy: where noise that protects somebody comes from: keys, or in a deployment the operating system.
        taped: differentiate with the autograd tape (fast for one client at a time) instead of `torch.func` (needed under vmap).
    """

    network: Network
    task: Task
    sizes: Tensor
    example_draws: dict[str, Draw] = field(default_factory=dict)
    proxy: Batch | None = None
    calibration: Tensor | None = None
    rates: Tensor | None = None
    frozen: Params | None = None
    held: Params | None = None
    storage: Storage = IN_RAM
    inputs: Inputs | None = None
    version: Tensor = field(default_factory=lambda: torch.zeros(()))
    entropy: Entropy = KEYED
    taped: bool = False

    @property
    def clients(self) -> int:
        """N, the number of clients in the population."""
        return len(self.sizes)

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained, over a frozen model that is neither trained nor sent."""
        return bool(self.network.adapters) and self.frozen is not None and self.network.adapters.keys() <= self.frozen.keys()

    @property
    def size(self) -> int:
        """P, the number of entries of what is trained."""
        if self.adapted:
            return sum(math.prod(shape) for shape in self.network.adapters.values())
        return sum(p.numel() for p in self.network.module.parameters())

    def at(self, version: int) -> Problem:
        """The problem as seen by a client that received model `version`."""
        return replace(self, version=torch.full_like(self.version, version))

    def holding(self, held: Params) -> Problem:
        """The problem in the other parameters, with these held as they are: `holding(u).grad(v, batch)` is the gradient in v of f(u, v)."""
        return replace(self, held=held)

    def draws(self, batch: int) -> dict[str, Draw]:
        """What one training step on a batch of this size draws."""
        return {name: Draw(d.kind, (batch, *d.shape)) for name, d in self.example_draws.items()}

    def output(self, w: Params, x: Tensor, draws: Draws | None = None) -> Tensor:
        """The network's output. Without `draws` the network is in evaluation: dropout is off. `[B, ...] -> [B, ...]`."""
        under = {**(self.frozen or {}), **(self.held or {})} if self.adapted else self.held or {}
        return self.network({**under, **w, **(draws or {})}, x)

    def loss(self, w: Params, batch: Batch, draws: Draws | None = None) -> Tensor:
        """Mean loss over the examples of a batch, padding excluded: a scalar."""
        return batch.mean(self.task.loss(self.output(w, batch.x, draws), batch.y))

    def grad(self, w: Params, batch: Batch, draws: Draws | None = None) -> tuple[Params, Tensor]:
        """Gradient of `loss` in `w`, and the loss itself (a scalar, detached)."""
        if not self.taped:
            return torch.func.grad_and_value(self.loss)(w, batch, draws)
        leaves = w.map(lambda v: v.detach().requires_grad_())
        loss = self.loss(leaves, batch, draws)
        gradients: Sequence[Any] = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return Params(dict(zip(leaves, gradients, strict=True))), loss.detach()
