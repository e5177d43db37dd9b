"""How soon Flower looks again, and for how long: seconds where a fraction of one does. No option says so, but its functions' defaults do.

FEDSIM_PATIENCE is the number of seconds for which a node waits for a message that has begun to come. A SuperLink that was killed in the
middle of one leaves it without its parts, and until it has noticed that the run behind it is over (a minute), the node gets nothing else.
"""

from __future__ import annotations

import os

from flwr.supercore.inflatable import inflatable_utils

FIRST = 0.05
"""Seconds until a part of a message that is still being uploaded is asked for again; each further wait is twice as long."""


def patience(default: float) -> float:
    """FEDSIM_PATIENCE, or the default."""
    return float(os.environ.get("FEDSIM_PATIENCE", default))


def look_soon() -> None:
    """In this process, ask again after `FIRST` seconds. Flower's own value is one second, and a message is there before its parts are."""
    for function in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        defaults = function.__kwdefaults__
        assert defaults
        assert {"initial_backoff", "max_time"} <= defaults.keys()
        defaults |= {"initial_backoff": FIRST, "max_time": patience(defaults["max_time"])}
