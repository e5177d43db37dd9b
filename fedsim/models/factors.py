"""F3. Layers whose weight is made of small factors: FedPara's Hadamard product of two low-rank terms, and one low-rank term alone.

Hyeon-Woo, Ye-Bin, Oh, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", ICLR 2022 (arXiv 2108.06098):

    W = W1 (.) W2                         rank up to R^2 from two terms of rank R; pFedPara: W = W1 (.) (W2 + 1)
    linear        Wj = Xj Yj'             X [out, R], Y [in, R]                                     2 R (out + in) numbers
    convolution   Wj = sum_{a,b} Tj[a, b] (x) Xj[a] (x) Yj[b]    T [R, R, k, k], X [R, out], Y [R, in]
                                          (its Proposition 3)                                       2 R (out + in + R K) numbers, K = k k

There is no dense weight beside the factors: the layer `fc1` has the parameters `fc1.x1`, `fc1.y1`, `fc1.x2`, ..., and they travel.
The rank R comes from `ratio` by one of two rules, which differ:

    flower     R = ceil((1 - ratio) Rmin + ratio Rmax),  Rmin = ceil(sqrt(min(out, in))),  Rmax the largest R with no more numbers than W
               (Flower's baseline); gives VGG16's printed sizes, 1.55 M of 15.25 M at 0.1, 4.53 M of 15.30 M at 0.4 (convolutions only)
    notebook   the smallest R with at least `ratio` times the numbers of W, but at least ceil(sqrt(max(out, in)))   (the authors' notebook)

A layer whose factors would be no smaller stays dense.

How factors start decides what is learned. `fan-in` and `fan-out` are He's normal initialisation of each factor by its own fans; then the
deviation of W is far from He's for a dense weight. `he` gives all factors one deviation, such that W has He's, sqrt(2 / fan_in).

Differs: the paper's Jacobian correction is left out (no source states it well enough). `he` is ours.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.errors import ScenarioError
from fedsim.models.lora import CONVOLUTIONS, matching, places, shared_weights
from fedsim.registry import Kind, register

Rule = Literal["flower", "notebook"]
Start = Literal["fan-in", "fan-out", "he"]
Form = Literal["plain", "tanh", "personal", "low-rank"]
Ratio = Annotated[float, Gt(0), Le(1)]


class Factored(nn.Module):
    """A linear layer or convolution that makes its weight of factors whenever it runs. It keeps the bias of the `layer` it replaces."""

    def __init__(self, layer: nn.Module, rank: int, form: Form, start: Start):
        super().__init__()
        weight: Any = layer.weight
        self.form = form
        self.shape = tuple(weight.shape)  # [out, in, k...]
        self.function = CONVOLUTIONS.get(type(layer))
        self.convolves = self.function is not None
        self.settings: dict[str, Any] = {k: getattr(layer, k) for k in ("stride", "padding", "dilation") if hasattr(layer, k)}
        self.register_parameter("bias", layer._parameters["bias"])
        for term in terms(form):
            for name, shape in factor_shapes(self.shape, rank).items():
                self.register_parameter(name + term, nn.Parameter(weight.new_empty(shape)))
        for name, factor in self.named_parameters():
            if name != "bias":
                _start(factor, start, he_deviation(self.shape, rank, form))

    def forward(self, x: Tensor) -> Tensor:
        if self.function is None:
            return F.linear(x, self.weight(), self.bias)  # type: ignore[arg-type]
        return self.function(x, self.weight(), self.bias, **self.settings)

    def weight(self) -> Tensor:
        """W `[out, in, k...]`."""
        one = self._term("1")
        if self.form == "low-rank":
            return one
        two = self._term("2")
        if self.form == "tanh":
            return torch.tanh(one) * torch.tanh(two)
        return one * (two + 1) if self.form == "personal" else one * two

    def _term(self, term: str) -> Tensor:
        x: Tensor = getattr(self, f"x{term}")
        y: Tensor = getattr(self, f"y{term}")
        if self.function is None:
            return x @ y.T
        t: Tensor = getattr(self, f"t{term}")  # [R, R, k...]
        half = (x.T @ t.flatten(1)).view(x.shape[1], len(y), -1)  # [out, R, K]
        return (y.T @ half).view(self.shape)


def terms(form: Form) -> tuple[str, ...]:
    """The terms that W is made of, by what their factors' names end with."""
    return ("1",) if form == "low-rank" else ("1", "2")


def factor_shapes(shape: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
    """The factors of one term for a weight `[out, in, k...]`."""
    out, inside, *kernel = shape
    if not kernel:
        return {"x": (out, rank), "y": (inside, rank)}
    return {"t": (rank, rank, *kernel), "x": (rank, out), "y": (rank, inside)}


def numbers(shape: tuple[int, ...], rank: int) -> int:
    """How many numbers one term has."""
    return sum(math.prod(each) for each in factor_shapes(shape, rank).values())


def _root(shape: tuple[int, ...], budget: float) -> float:
    """The R, not rounded, at which one term has `budget` numbers: R (out + in) + R^2 K = budget, without R^2 K in a linear layer."""
    out, inside, *kernel = shape
    if not kernel:
        return budget / (out + inside)
    k, both = math.prod(kernel), out + inside
    return (math.sqrt(both**2 + 4 * k * budget) - both) / (2 * k)


def hadamard_rank(shape: tuple[int, ...], ratio: float, rule: Rule) -> int:
    """R of the two terms of a weight `[out, in, k...]`."""
    size, (out, inside) = math.prod(shape), shape[:2]
    if rule == "notebook":
        return max(math.ceil(_root(shape, ratio * size / 2)), math.ceil(math.sqrt(max(out, inside))))
    least, most = math.ceil(math.sqrt(min(out, inside))), math.floor(_root(shape, size / 2))
    return math.ceil((1 - ratio) * least + ratio * most)


def low_rank(shape: tuple[int, ...], ratio: float, rule: Rule) -> int:
    """The largest rank of a single term that has no more numbers than the two terms of FedPara."""
    return math.floor(_root(shape, 2 * numbers(shape, hadamard_rank(shape, ratio, rule))) + 1e-9)


def he_deviation(shape: tuple[int, ...], rank: int, form: Form) -> float:
    """The deviation s of every factor with which an entry of W has variance 2 / fan_in, fan_in = in K.

    An entry of a term has variance v = R s^4 (linear) or R^2 s^6 (convolution). An entry of W has v^2 where two terms are multiplied, v in
    a single term, and v (1 + v) in pFedPara, which is about v.
    """
    target = 2 / math.prod(shape[1:])
    term = math.sqrt(target) if form in {"plain", "tanh"} else target
    return float((term / rank) ** (1 / 4)) if len(shape) == 2 else float((term / rank**2) ** (1 / 6))


def _start(factor: Tensor, start: Start, deviation: float) -> None:
    if start == "he":
        nn.init.normal_(factor, std=deviation)
    else:
        nn.init.kaiming_normal_(factor, mode="fan_in" if start == "fan-in" else "fan_out", nonlinearity="relu")


class Factors(Kind, ABC):
    """How weights are made of factors."""

    targets: tuple[str, ...]
    start: Start

    def factorise(self, module: nn.Module) -> None:
        """Put factored layers into `module` in the place of its `targets`; they start from torch's generator."""
        found = [place for place in places(module) if place[1] != "embedding"]
        chosen = matching(self.targets, {name: kind for name, kind, *_ in found}, "model.factors.targets")
        if twice := sorted(shared_weights(module) & set(chosen)):
            message = f"the weight of '{twice[0]}' is another layer's, too, which factors would part from it; leave it out"
            raise ScenarioError("model.factors.targets", message)
        made: dict[nn.Module, Factored] = {}
        for name, _, parent, child in found:
            layer: Any = parent._modules[child]
            if name in chosen and layer not in made and self.shrinks(tuple(layer.weight.shape)):
                made[layer] = Factored(layer, self.rank(tuple(layer.weight.shape)), self.form, self.start)
            parent._modules[child] = made.get(layer, layer)
        if not made:
            message = f"no layer of {', '.join(chosen)} would be smaller in factors; lower the ratio, or take larger layers"
            raise ScenarioError("model.factors.ratio", message)

    def shrinks(self, shape: tuple[int, ...]) -> bool:
        """Whether the factors of a weight are smaller than the weight."""
        rank = self.rank(shape)
        return rank > 0 and len(terms(self.form)) * numbers(shape, rank) < math.prod(shape)

    @property
    @abstractmethod
    def form(self) -> Form:
        """What is made of the terms."""

    @abstractmethod
    def rank(self, shape: tuple[int, ...]) -> int:
        """R for a weight of this shape."""


@register("fedpara")
@dataclass(frozen=True)
class FedPara(Factors):
    """Each weight the Hadamard product of two low-rank ones (Hyeon-Woo et al., ICLR 2022).

    ratio, rule: how large the factors are. targets: layers, by name, pattern or kind (linear, convolution). start: how factors start.
    tanh: W = tanh(W1) (.) tanh(W2). personal: W = W1 (.) (W2 + 1), for the strategy `pfedpara`, whose clients keep W2.
    """

    ratio: Ratio = 0.1
    rule: Rule = "flower"
    targets: tuple[str, ...] = ("convolution",)
    start: Start = "he"
    tanh: bool = False
    personal: bool = False

    def __post_init__(self) -> None:
        if self.tanh and self.personal:
            raise ValueError("tanh and personal: choose one; tanh(W2) + 1 is in no source")

    @property
    def form(self) -> Form:
        return "tanh" if self.tanh else "personal" if self.personal else "plain"

    def rank(self, shape: tuple[int, ...]) -> int:
        return hadamard_rank(shape, self.ratio, self.rule)


@register("low-rank")
@dataclass(frozen=True)
class LowRank(Factors):
    """Each weight one low-rank term, of as many numbers as FedPara's two have at the same ratio: what FedPara is compared with."""

    ratio: Ratio = 0.1
    rule: Rule = "flower"
    targets: tuple[str, ...] = ("convolution",)
    start: Start = "he"

    @property
    def form(self) -> Form:
        return "low-rank"

    def rank(self, shape: tuple[int, ...]) -> int:
        return low_rank(shape, self.ratio, self.rule)
