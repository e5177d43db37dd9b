"""F3. `Model`, a kind of network that a scenario may name, and `realise`, which turns one into a module, initial weights and draws."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedsim.errors import ScenarioError
from fedsim.models.adapt import Adapt
from fedsim.models.dropout import draws_of, key_dropouts
from fedsim.models.factors import Factors
from fedsim.models.soundness import refuse_randomness_and_modes, refuse_structure
from fedsim.params import Params
from fedsim.problem import NextToken, Task
from fedsim.registry import Kind
from fedsim.rng import Key
from fedsim.types import Draw


@dataclass(frozen=True)
class Model(Kind, ABC):
    """A network architecture; `build` fits it to the data. `adapt` says that few tensors are trained, and the others stay as they are;
    `factors` that layers have factors in the place of their weights, and all are trained.

    `inputs` says which inputs it reads: `image` `[ch, H, W]`, `signal` `[ch, T]`, `features` `[F]` or `tokens` `[T]`; empty: unknown.
    `per_token` says that it answers at each position `[B, T, outputs]` and not once an example `[B, outputs]`.
    """

    inputs: ClassVar[frozenset[str]] = frozenset()
    per_token: ClassVar[bool] = False
    _: KW_ONLY
    adapt: Adapt | None = None
    factors: Factors | None = None

    @abstractmethod
    def build(self, shape: tuple[int, ...], outputs: int, vocabulary: int | None) -> nn.Module:
        """A fresh network for examples of `shape`, initialised from torch's global generator. `[B, *shape] -> [B, (T,) outputs]`.

        `vocabulary` is the number of different tokens, or None where inputs are real numbers. Raises ScenarioError where the
        architecture does not fit the input.
        """

    def require(self, shape: tuple[int, ...], vocabulary: int | None, smallest: int = 1) -> None:
        """Raise unless this model reads inputs of this kind, with at least `smallest` pixels (or samples in time) a side."""
        kind = input_kind(shape, vocabulary)
        name = type(self).registered_name
        if kind not in self.inputs:
            reads = " or ".join(sorted(self.inputs))
            message = f"'{name}' reads {reads}, and these examples are {kind} {list(shape)}; {_fitting(kind, self.per_token)}"
            raise ScenarioError("model", message)
        if kind in ("image", "signal") and min(shape[1:]) < smallest:
            side = f"{smallest} x {smallest} pixels" if kind == "image" else f"{smallest} samples in time"
            message = f"'{name}' needs at least {side}, and these examples are {list(shape)}; 'logreg' and 'mlp' take any size"
            raise ScenarioError("model", message)


def input_kind(shape: tuple[int, ...], vocabulary: int | None) -> str:
    """What examples of this shape are: `image`, `signal`, `features`, `tokens`, or else `array`."""
    if vocabulary is not None:
        return "tokens" if len(shape) == 1 else "array"
    return {1: "features", 2: "signal", 3: "image"}.get(len(shape), "array")


def _fitting(kind: str, per_token: bool) -> str:
    """`models for tokens: char-lstm, ...`, the fix of a misfit."""
    names = [n for n, c in sorted(Model.choices.items()) if issubclass(c, Model) and kind in c.inputs and c.per_token == per_token]
    return f"models for {kind}: {', '.join(names)}" if names else f"no model of the zoo reads {kind}; write one and name it with 'python'"


def realise(
    model: Model, shape: tuple[int, ...], dtype: torch.dtype, outputs: int, vocabulary: int | None, key: Key, task: Task
) -> tuple[nn.Module, Params, dict[str, Draw]]:
    """The network, its initial weights, and what it draws for one example in training.

    Initial weights are a function of `key` alone, and torch's global generator is left as it was. The module comes back in evaluation
    mode and stays there: its dropout is switched by draws, not by a mode.

    Args:
        shape, dtype: of the input of one example, as the network receives it. A floating dtype is also the weights' dtype.
        outputs, task: width and meaning of the output; NextToken wants `[B, T, outputs]`, every other task `[B, outputs]`.
        vocabulary: number of different tokens, or None.
    """
    _check_task(model, input_kind(shape, vocabulary), task)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(key & (2**63 - 1))  # not torch.manual_seed: that would reseed GPUs as well
        try:
            module = model.build(shape, outputs, vocabulary)
            if model.factors is not None:
                model.factors.factorise(module)
        except (RuntimeError, MemoryError, OverflowError) as error:
            reason = str(error).splitlines()[0][:200]
            raise ScenarioError("model", f"cannot be built: {reason}; are its sizes what you meant?") from error
        if dtype.is_floating_point:
            module.to(dtype)
        refuse_structure(module)
        key_dropouts(module)
        x = torch.zeros((2, *shape), dtype=dtype)
        wanted = [2, *shape[:1], outputs] if isinstance(task, NextToken) else [2, outputs]
        draws = draws_of(module, lambda: _check_output(model, module.eval(), x, wanted))
        refuse_randomness_and_modes(module, x)
    module.eval()
    for part in module.modules():
        if isinstance(part, nn.RNNBase):
            part.train()  # cuDNN refuses to differentiate a recurrent layer in evaluation mode; without dropout the modes agree
    return module, Params({name: p.detach().clone() for name, p in module.named_parameters()}), draws


def _check_task(model: Model, kind: str, task: Task) -> None:
    per_token = isinstance(task, NextToken)
    if model.inputs and model.per_token != per_token:
        answers = "at each position" if model.per_token else "once an example"
        needs = "at each position" if per_token else "once an example"
        who = type(model).registered_name
        message = f"'{who}' answers {answers}, and {type(task).__name__} needs an answer {needs}; {_fitting(kind, per_token)}"
        raise ScenarioError("model", message)


def _check_output(model: Model, module: nn.Module, x: Tensor, wanted: list[int]) -> None:
    """Run the network once on a batch of two zeros, and raise unless the output has the shape `wanted`."""
    who, batch = f"'{type(model).registered_name}'", f"a batch {list(x.shape)} of {str(x.dtype).removeprefix('torch.')}"
    try:
        y = module(x)
    except ScenarioError:
        raise
    except Exception as error:  # whatever a user's forward may raise
        message = f"{who} cannot run on {batch}: {type(error).__name__}: {error}; make its layers fit this shape"
        raise ScenarioError("model", message) from error
    if not isinstance(y, Tensor):
        raise ScenarioError("model", f"{who} returns {type(y).__name__}; its forward must return one tensor {wanted}")
    if list(y.shape) != wanted:
        message = f"{who} turns {batch} into {list(y.shape)}, and the task needs {wanted}; let its last layer have {wanted[-1]} outputs"
        raise ScenarioError("model", message)
