"""F1. Which of a model's parameters all clients share, and which are each client's own: a split by name.

    own: output                 the last layer                        (a layer: whatever has parameters and no layers inside)
    own: input                  the first layer
    own: adapters               everything with a part named lora_A, lora_B, lora_magnitude or prefix
    own: "encoder\\.layers\\.3"   a regular expression for whole parts of a name, which are what is between its dots
    own: [input, output]        several of these;  [] = nothing, ".*" = everything

A pattern matches where it is one part of a name or several in a row, whole: `head` means `head.weight`, and not `overhead.weight`.

Messages and payloads carry what is shared. What is a client's own lives in its memory, and is never sent.
"""

from __future__ import annotations

import re
from abc import ABC
from typing import ClassVar

from torch import Tensor

from fedsim.errors import FedsimError
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.rng import Key
from fedsim.staleness import Staleness
from fedsim.strategy import ModelState, WeightedStrategy, Weighting, client_weights
from fedsim.types import Arrivals, Total

Own = str | tuple[str, ...]
"""What is a client's own: `input`, `output`, `adapters`, a regular expression, or several of them."""

EVERYTHING = ".*"
ADAPTERS = r"lora_A|lora_B|lora_magnitude|prefix"


def patterns(own: Own) -> tuple[str, ...]:
    """What is asked for, one by one. Raises ValueError where it is no regular expression."""
    each = (own,) if isinstance(own, str) else own
    for pattern in each:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"own: '{pattern}' is no regular expression: {error}") from None
    return each


def owned(problem: Problem, w: Params, own: Own) -> tuple[str, ...]:
    """The names in `w` that are a client's own, in the order of `w`. Raises `FedsimError` where a pattern matches none."""
    layers = _layers(problem, w)
    found: set[str] = set()
    for pattern in patterns(own):
        if pattern in {"input", "output"}:
            matched = layers[0 if pattern == "input" else -1] if layers else []
        else:
            pieces = ADAPTERS if pattern == "adapters" else pattern
            matched = [name for name in w if _holds(pieces, name)]
        if not matched:
            raise FedsimError(_nothing(pattern, w))
        found |= set(matched)
    return tuple(name for name in w if name in found)


def split(problem: Problem, w: Params, own: Own) -> tuple[Params, Params]:
    """`w` in two: what is shared, and what is a client's own. Either may be empty."""
    names = owned(problem, w, own)
    return Params({k: v for k, v in w.items() if k not in names}), Params({k: w[k] for k in names})


def _layers(problem: Problem, w: Params) -> list[list[str]]:
    """The parameters in `w` of each layer that has some, in the order in which the network defines them."""
    found = []
    for path, part in problem.network.module.named_modules():
        if next(part.children(), None) is None:
            names = [f"{path}.{name}".removeprefix(".") for name in (*part._parameters, *part._buffers)]  # adapters are buffers
            found.append([name for name in names if name in w])
    return [names for names in found if names]


def _holds(pattern: str, name: str) -> bool:
    """Whether the pattern is some parts of the name in a row, whole."""
    parts = name.split(".")
    spans = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
    return any(re.fullmatch(pattern, span) for span in spans)


def _nothing(pattern: str, w: Params) -> str:
    """Why a pattern that matches nothing does not, and what there is."""
    if pattern == "adapters":
        return f"the model has no adapters (a part of a name that is {ADAPTERS.replace('|', ', ')}); there are: {_shown(w)}"
    pieces = [name for name in w if re.search(pattern, name)]
    but = f"; it is a piece of a word in {pieces[0]}, which does not count" if pieces else ""
    return f"'{pattern}' matches no whole part of a parameter's name{but}; there are: {_shown(w)}"


def _shown(w: Params) -> str:
    names = list(w)
    return ", ".join(names) if len(names) <= 12 else ", ".join([*names[:6], "...", *names[-5:]])


class SplitStrategy(WeightedStrategy, ABC):
    """A server that averages changes of what is shared; clients keep what is their own.

        w <- w + server_lr * sum_{i in S} a_i Delta_i / sum_{i in S} a_i

    `weights`: a_i is n_i, or 1; less where an update is stale. A client that has never taken part has the first model's part.
    """

    personal: ClassVar[bool] = True
    keeps: ClassVar[bool] = True

    own: Own
    weights: Weighting
    server_lr: float
    staleness: Staleness

    def __post_init__(self) -> None:
        patterns(self.own)
        if not self.local.joins:
            name = self.local.registered_name
            raise ValueError(f"local: {name} does not train what a client's memory holds of the model; take e.g. sgd")

    @property
    def uniform(self) -> bool:
        return self.weights == "uniform"

    def owned(self, problem: Problem, w: Params) -> tuple[str, ...]:
        return owned(problem, w, self.own)

    def init(self, problem: Problem, w: Params) -> ModelState:
        return ModelState(split(problem, w, self.own)[0])

    def memory(self, problem: Problem, w: Params) -> Params:
        return split(problem, w, self.own)[1]

    def deploy(self, state: ModelState, memory: Params) -> Params:
        return state.w | memory

    def weigh(self, problem: Problem, state: ModelState, arrivals: Arrivals) -> Tensor:
        return client_weights(self.weights, arrivals, self.staleness)  # [C]

    def apply(self, problem: Problem, state: ModelState, total: Total, arrivals: Arrivals, key: Key) -> ModelState:
        return ModelState(state.w + self.server_lr * total.mean())
