"""`flower-supernode`, quicker: it looks for messages every fraction of a second, and keeps one process at work.

    python -m fedsim.flower.node --superlink HOST:PORT --root-certificates ca.crt --auth-supernode-private-key key \\
        --port 9094 --node-config "partition-id=0 num-partitions=3"

All options are `flower-supernode`'s. The plain command works with the same app, and is slower: it looks every three seconds, and starts a
process for each message. FEDSIM_POLL (0.2) is the number of seconds between looks; FEDSIM_PATIENCE, see `polling.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace

HANDED_OVER = 0.02
"""Seconds between looks at what the worker has handed over."""


def main() -> None:
    """Start the worker, then be a SuperNode."""
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode, flower_supernode

    from fedsim.flower.polling import look_soon

    poll = float(os.environ.get("FEDSIM_POLL", "0.2"))
    options = _parse_args_run_supernode().parse_args()
    sys.argv += ["--isolation", "process"]  # the worker below is that process
    address = f"{options.host}:{options.port}"
    worker = subprocess.Popen(
        [sys.executable, "-m", "fedsim.flower.worker", "--address", address, "--parent", str(os.getpid()), "--poll", str(min(poll, 0.1))]
    )
    # The loop there sleeps for three seconds between looks at the SuperLink, and for half a second between looks at what the worker has
    # handed over, which costs no message; nothing configures either.
    start_client_internal.time = SimpleNamespace(  # type: ignore[assignment]
        sleep=lambda seconds: time.sleep(min(seconds, poll if seconds > 1 else HANDED_OVER))
    )
    look_soon()
    try:
        flower_supernode()
    finally:
        worker.terminate()


if __name__ == "__main__":
    main()
