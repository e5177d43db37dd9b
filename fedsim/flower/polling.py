"""How soon Flower looks again. It waits seconds where a fraction of one does; no option says so, but its functions' defaults do."""

from __future__ import annotations

from flwr.supercore.inflatable import inflatable_utils

FIRST = 0.05
"""Seconds until a part of a message that is still being uploaded is asked for again; each further wait is twice as long."""


def look_soon() -> None:
    """In this process, ask again after `FIRST` seconds. Flower's own value is one second, and a message is there before its parts are."""
    for function in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        defaults = function.__kwdefaults__
        assert "initial_backoff" in defaults, "this Flower calls it otherwise"
        defaults["initial_backoff"] = FIRST
