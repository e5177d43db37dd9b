"""F3. Made-up federations: FedProx's Synthetic(alpha, beta), and least squares with a known optimum."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt

from fedsim import rng
from fedsim.data.source import Dataset, Examples, Source
from fedsim.problem import Classification, Regression
from fedsim.registry import register


@register("synthetic")
@dataclass(frozen=True)
class Synthetic(Source):
    """FedProx's Synthetic(alpha, beta) (Li et al., MLSys 2020): 60 features, 10 classes, one natural client for each of `clients`.

        u_k ~ N(0, alpha), B_k ~ N(0, beta);  v_k ~ N(B_k, 1);  W_k, b_k ~ N(u_k, 1)   (entry by entry; second argument: deviation)
        x ~ N(v_k, Sigma), Sigma_jj = j^-1.2;  y = argmax(x W_k + b_k);  n_k = 50 + floor(lognormal(4, 2))

    `alpha` is how much the clients' models differ, `beta` how much their inputs do; `iid`: one model for all and v_k = 0. The last tenth of
    each client's examples is the test set, as in the authors' generator, which also takes alpha and beta as deviations.
    """

    alpha: Annotated[float, Ge(0)] = 1.0
    beta: Annotated[float, Ge(0)] = 1.0
    clients: Annotated[int, Gt(0)] = 30
    iid: bool = False

    def load(self, root: Path, key: rng.Key) -> Dataset:
        draw = rng.generator(rng.fold(key, 0))
        sizes = draw.lognormal(4.0, 2.0, self.clients).astype(np.int64) + 50
        deviation = np.arange(1, 61) ** -0.6
        shared = draw.standard_normal((61, 10))
        train, test = [], []
        for k, n in enumerate(sizes):
            own = rng.generator(rng.fold(key, 1, k))
            u, b = own.normal(0, self.alpha), own.normal(0, self.beta)
            v = np.zeros(60) if self.iid else own.normal(b, 1, 60)
            model = shared if self.iid else own.normal(u, 1, (61, 10))
            x = v + own.standard_normal((n, 60)) * deviation
            part = Examples(x.astype(np.float32), (x @ model[:60] + model[60]).argmax(1).astype(np.int64))
            cut = int(0.9 * n)
            train.append(Examples(part.x[:cut], part.y[:cut]))
            test.append(Examples(part.x[cut:], part.y[cut:]))
        return Dataset(Classification(10), _join(train), _join(test), groups=_owners(train), group_names=_names(self.clients))


@register("synthetic-images")
@dataclass(frozen=True)
class SyntheticImages(Source):
    """Made-up pictures: noise around one faint pattern a class. Something to learn of any size and number, to measure speed with.

    pattern_k ~ U(0, signal),  y ~ U{0, ..., classes - 1},  x = pattern_y + U(-1/2, 1/2)     (pixel by pixel)
    """

    train: Annotated[int, Gt(0)] = 10_000
    test: Annotated[int, Gt(0)] = 1_000
    shape: tuple[Annotated[int, Gt(0)], Annotated[int, Gt(0)], Annotated[int, Gt(0)]] = (3, 32, 32)
    classes: Annotated[int, Gt(1)] = 10
    signal: Annotated[float, Ge(0)] = 0.05

    def load(self, root: Path, key: rng.Key) -> Dataset:
        draw = rng.generator(key)
        patterns = self.signal * draw.random((self.classes, *self.shape), dtype=np.float32)
        y = draw.integers(self.classes, size=self.train + self.test)
        x = draw.random((len(y), *self.shape), dtype=np.float32)
        x -= 0.5
        x += patterns[y]
        cut = self.train
        return Dataset(Classification(self.classes), Examples(x[:cut], y[:cut]), Examples(x[cut:], y[cut:]))


@register("least-squares")
@dataclass(frozen=True)
class LeastSquares(Source):
    """Linear regression with a known optimum: y = w_k x + noise, one natural client for each of `clients`.

        w ~ N(0, I);  w_k = w + heterogeneity * N(0, I);  x ~ N(0, I);  y = w_k . x + noise * N(0, 1)

    `optimum` `[1, dim]` is the least-squares solution over all train examples, solved in float64, and is in the layout of a linear layer
    without bias. The test set has `test` examples, each from a client drawn at random.
    """

    clients: Annotated[int, Gt(0)] = 10
    per_client: Annotated[int, Gt(0)] = 50
    dim: Annotated[int, Gt(0)] = 10
    noise: Annotated[float, Ge(0)] = 0.1
    heterogeneity: Annotated[float, Ge(0)] = 0.0
    test: Annotated[int, Gt(0)] = 200

    def load(self, root: Path, key: rng.Key) -> Dataset:
        draw = rng.generator(key)
        w = draw.standard_normal(self.dim) + self.heterogeneity * draw.standard_normal((self.clients, self.dim))  # [N, dim]
        owners = np.repeat(np.arange(self.clients), self.per_client)
        train, test = self._draw(draw, w[owners]), self._draw(draw, w[draw.integers(self.clients, size=self.test)])
        # The optimum of the float32 numbers that clients see, not of the float64 numbers that they were drawn as.
        optimum = np.linalg.lstsq(train.x.astype(np.float64), train.y.astype(np.float64), rcond=None)[0].T
        return Dataset(Regression(1), train, test, groups=owners, group_names=_names(self.clients), optimum=optimum)

    def _draw(self, draw: np.random.Generator, w: np.ndarray) -> Examples:
        """One example for each row of `w [M, dim]`."""
        x = draw.standard_normal(w.shape)
        y = (x * w).sum(1, keepdims=True) + self.noise * draw.standard_normal((len(w), 1))
        return Examples(x.astype(np.float32), y.astype(np.float32))


def _join(parts: list[Examples]) -> Examples:
    return Examples(np.concatenate([p.x for p in parts]), np.concatenate([p.y for p in parts]))


def _owners(parts: list[Examples]) -> np.ndarray:
    return np.repeat(np.arange(len(parts)), [len(p) for p in parts])


def _names(clients: int) -> tuple[str, ...]:
    return tuple(f"client {k}" for k in range(clients))
