"""F5. Flower: a scenario on real devices. Checks, once, that the Flower that is installed is one that this package knows."""

import os
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version

from fedsim.errors import FedsimError

SUPPORTED = ((1, 41), (1, 43))
"""Flower from the first of these on, below the second: its API for deployments changed within 2026."""


def check(installed: str | None) -> None:
    """Raise unless the installed version of flwr (None: there is none) is in the supported range."""
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    advice = f"fedsim.flower needs flwr>={low},<{high}: pip install 'flwr>={low},<{high}'"
    if installed is None:
        raise FedsimError(f"Flower is not installed; {advice}")
    digits = [part for part in installed.split(".")[:2] if part.isdecimal()]
    found = tuple(map(int, digits))
    if len(found) < 2 or not SUPPORTED[0] <= found < SUPPORTED[1]:
        raise FedsimError(f"flwr {installed} is installed; {advice}")


def _installed() -> str | None:
    try:
        return _version("flwr")
    except PackageNotFoundError:
        return None


os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when flwr is imported
check(_installed())
