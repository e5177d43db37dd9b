"""F3. `Adapt`: a way to train few tensors of a network and leave the rest as it is, and how the two are told apart.

A model that is adapted has two sets of tensors under one naming: the network's own, frozen, held once by each worker
(`Problem.frozen`), and what is trained, which is all that travels (`Network.adapters`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from fedsim.params import Params
from fedsim.registry import Kind
from fedsim.rng import Key
from fedsim.types import Draw


@dataclass(frozen=True)
class Fitted:
    """What became of a network that was adapted.

    Attributes:
        whole: all tensors at the start: the network's own and the adapters.
        trained: names of those that are trained.
        draws: what one example draws in training.
    """

    whole: Params
    trained: tuple[str, ...]
    draws: dict[str, Draw] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of what is trained."""
        return {name: tuple(self.whole[name].shape) for name in self.trained}


class Adapt(Kind, ABC):
    """What is trained in the place of all parameters."""

    @abstractmethod
    def fit(self, module: nn.Module, w: Params, x: Tensor, key: Key) -> Fitted:
        """Change `module`, whose initial parameters are `w`, in place. `x` is a batch of two zeros; initial adapters depend on `key` alone.

        Adapters start so that outputs are what they were, bit for bit. Raises ScenarioError where nothing fits.
        """

    merge: bool  # whether the model at the end is one without adapters

    def export(self, folder: Path, module: nn.Module, whole: Params) -> None:
        """Write the adapters by themselves, for others to load. Default: nothing is written."""

    def begin(self, module: nn.Module, whole: Params) -> Params:
        """All tensors where adapters start over weights that have been trained since. Default: the adapters as they were drawn."""
        return whole

    @abstractmethod
    def merged(self, module: nn.Module, whole: Params) -> Params:
        """The parameters of a network without adapters that answers the same, from all tensors of the adapted `module`."""


def trained(shapes: dict[str, tuple[int, ...]], whole: Params) -> Params:
    """The part of `whole` that is trained."""
    return Params({name: whole[name] for name in shapes})
