"""The server trains on its own data before any client is asked: a base for adapters, made without a download.

    w <- tune(w), on the loss of the proxy data, before the first round; then clients are not asked

As a first phase it gives later phases a model that owes nothing to clients' data, so it costs no privacy: the proxy set is taken to be
public, and no example of it is any client's. One round is enough.

No paper: it is what "pre-trained" means where the paper has a foundation model (DP-LoRA, Liu et al., ACM TMIS 2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedsim.local import Adam
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.proxy import on_server, proxy_of, tune
from fedsim.registry import register
from fedsim.rng import Key, fold
from fedsim.strategy import LocalProgram, ModelState, Strategy
from fedsim.types import Job, Updates


@register("pretrain")
@dataclass(frozen=True)
class Pretrain(Strategy):
    """Train on the server's proxy data alone, once, and ask no client: the first phase of a run that adapts the model later."""

    needs: ClassVar[frozenset[str]] = frozenset({"proxy"})
    paces: ClassVar[frozenset[str]] = frozenset({"sync"})
    asks: ClassVar[bool] = False

    local: LocalProgram = Adam(lr=3e-3, epochs=3)

    def __post_init__(self) -> None:
        if self.local.receives is not Params or self.local.protects() is not None:
            raise ValueError(f"local: {type(self.local).__name__} is not for the server's own data; take sgd or adam")

    def init(self, problem: Problem, w: Params) -> ModelState:
        return ModelState(tune(self.local, on_server(problem), w, proxy_of(problem), fold(0, KEY)))

    def plan(self, problem: Problem, state: ModelState, ids: np.ndarray, key: Key) -> list[Job]:
        return []

    def server(self, problem: Problem, state: ModelState, updates: Updates, key: Key) -> ModelState:
        return state


KEY = 77
"""Folded for the order of the proxy data: the same for every seed, because `init` has no key."""
