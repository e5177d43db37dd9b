"""How soon Flower looks again, and for how long: no option says so, but its functions' defaults do."""

from __future__ import annotations

from flwr.supercore.constant import PULL_MAX_TIME
from flwr.supercore.inflatable import inflatable_utils

FIRST = 0.05
"""Seconds until a part of a message that is still being uploaded is asked for again; each further wait is twice as long."""


def look_soon(most: float = PULL_MAX_TIME) -> None:
    """In this process, ask again after `FIRST` seconds (Flower: one), for at most so many. A message is there before its parts are."""
    for function in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        defaults = function.__kwdefaults__
        assert defaults
        assert {"initial_backoff", "max_time"} <= defaults.keys()
        defaults |= {"initial_backoff": FIRST, "max_time": most}
