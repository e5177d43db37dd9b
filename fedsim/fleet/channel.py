"""F3. A noisy way between server and clients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Le

from fedsim.registry import section


@section
@dataclass(frozen=True)
class Link:
    """One direction. noise: standard deviation of Gaussian noise on every number; erasure: chance that a whole message is lost."""

    noise: Annotated[float, Ge(0)] = 0.0
    erasure: Annotated[float, Ge(0), Le(1)] = 0.0


@section
@dataclass(frozen=True)
class Channel:
    """Additive Gaussian noise and erasures, drawn anew for each message of each client.

    down: from the server to a client: each receives the model with noise of its own.
    up: from a client to the server.
    """

    down: Link = field(default_factory=Link)
    up: Link = field(default_factory=Link)
