"""F3. How a quantity of devices (seconds, bytes per second) is spread over the population: one positive number a client, drawn once."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, MinLen
from numpy.typing import NDArray

from fedsim.errors import ScenarioError
from fedsim.fleet import files
from fedsim.registry import Kind, register, section
from fedsim.rng import Key, generator

Vector = NDArray[np.float64]
Positive = Annotated[float, Gt(0)]


class Spread(Kind, ABC):
    """How a quantity is spread over the clients."""

    @abstractmethod
    def draw(self, clients: int, key: Key, field: str) -> Vector:
        """One number for each client, `[N]` float64. Raises ScenarioError at `field` where the population does not fit."""


@register("constant")
@dataclass(frozen=True)
class ConstantSpread(Spread):
    """Every device has the same."""

    value: Annotated[float, Ge(0)]

    def draw(self, clients: int, key: Key, field: str) -> Vector:
        return np.full(clients, self.value)


@register("lognormal")
@dataclass(frozen=True)
class Lognormal(Spread):
    """Log-normal: x = median * exp(sigma * z), z ~ N(0, 1). Its mean is median * exp(sigma^2 / 2)."""

    median: Positive
    sigma: Annotated[float, Ge(0)] = 0.5

    def draw(self, clients: int, key: Key, field: str) -> Vector:
        return self.median * np.exp(self.sigma * generator(key).standard_normal(clients))


@register("pareto")
@dataclass(frozen=True)
class Pareto(Spread):
    """Pareto, with a heavy tail: P(x > least * t) = t^-shape. The mean is least * shape / (shape - 1), infinite where shape <= 1."""

    least: Positive
    shape: Positive = 1.5

    def draw(self, clients: int, key: Key, field: str) -> Vector:
        return self.least * (1 - generator(key).random(clients)) ** (-1 / self.shape)


@section
@dataclass(frozen=True)
class DeviceClass:
    """Devices of one class: their share of the population (shares are made to add up to 1), and what each has."""

    share: Positive
    value: Annotated[float, Ge(0)]


@register("classes")
@dataclass(frozen=True)
class Classes(Spread):
    """A few classes of devices, such as phones of three generations; the numbers of each follow the shares, up to rounding."""

    classes: Annotated[tuple[DeviceClass, ...], MinLen(1)]

    def draw(self, clients: int, key: Key, field: str) -> Vector:
        edges = np.cumsum([c.share for c in self.classes])
        place = (np.arange(clients) + 0.5) / clients * edges[-1]
        values = np.array([c.value for c in self.classes])[np.searchsorted(edges, place).clip(max=len(edges) - 1)]
        return generator(key).permutation(values)


@register("recorded")
@dataclass(frozen=True)
class Recorded(Spread):
    """As it was measured: a file (.csv with a header, or .jsonl) with `client` and `value`, one row a client."""

    file: str

    def draw(self, clients: int, key: Key, field: str) -> Vector:
        def row(record: dict[str, Any], where: str) -> tuple[int, float]:
            client = files.client(record, clients, field, where)
            value: float = files.number(record, "value", field, where, float)
            if not (math.isfinite(value) and value >= 0):
                raise ScenarioError(field, f"{where}: 'value' is {value}, not a number from 0 upwards")
            return client, value

        rows = files.read(Path(self.file), ("client", "value"), f"{field}.file", row)
        known = dict(rows)
        if len(known) != clients or len(rows) != clients:
            missing = next((i for i in range(clients) if i not in known), None)
            fault = f"client {missing} has no row" if missing is not None else "a client has more than one row"
            raise ScenarioError(f"{field}.file", f"{self.file}: {fault}; each of the {clients} clients needs one")
        return np.array([known[i] for i in range(clients)])
