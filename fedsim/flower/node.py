"""`flower-supernode`, quicker: it looks for messages every fraction of a second, and keeps one process at work.

    python -m fedsim.flower.node --superlink HOST:PORT --root-certificates ca.crt --auth-supernode-private-key key \\
        --port 9094 --node-config "partition-id=0 num-partitions=3"

The options are `flower-supernode`'s, without those of a worker elsewhere: ours is on this machine, and speaks plain HTTP with it. The
plain command works with the same app, and is slower: it looks every three seconds, and starts a process for each message. FEDSIM_POLL (0.2)
is the number of seconds between looks. FEDSIM_PATIENCE (Flower's two hours) is how many seconds a message that has begun to come is waited
for: a SuperLink that is killed in the middle of one leaves it without its parts, and until it has noticed that the run behind it is over,
about a minute, the node gets nothing else.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

HANDED_OVER = 0.02
"""Seconds between looks at what the worker has handed over."""


AGAIN = 1.0
"""Seconds after which a worker that has ended is started again."""


NOT_OURS = ("ssl_certfile", "ssl_keyfile", "ssl_ca_certfile", "superexec_auth_secret_file")
"""Options of `flower-supernode` that guard the way to a worker elsewhere."""


def keep(command: list[str]) -> Callable[[], None]:
    """Keep a process at work: where it ends, another is started. Returns what ends it for good.

    Flower ends a worker whose task it has given up, and expects another to be there for the next.
    """
    over, at_work = threading.Event(), [subprocess.Popen(command)]

    def watch() -> None:
        while True:
            code = at_work[0].wait()
            if over.wait(AGAIN):
                return
            print(f"the worker has ended ({code}); another is started", flush=True)
            at_work[0] = subprocess.Popen(command)

    def end() -> None:
        over.set()
        at_work[0].terminate()

    threading.Thread(target=watch, daemon=True).start()
    return end


def forgetting(pull: Callable[..., int | None]) -> Callable[..., int | None]:
    """Flower's `_pull_and_store_message`, which forgets what it gives up.

    It leaves the message of a run that has ended, without its parts, and the worker that has begun to wait for them would wait for hours.
    """

    def pulled(*, state: Any, object_store: Any, receive: Callable[[], Any], **more: Any) -> int | None:
        begun: list[str] = []

        def received() -> Any:
            if (found := receive()) is not None:
                begun.append(found[0].metadata.message_id)
            return found

        run = pull(state=state, object_store=object_store, receive=received, **more)
        if run is None:
            state.delete_messages(message_ids=begun)
            for number in begun:
                object_store.delete(number)
        return run

    return pulled


def main() -> None:
    """Start the worker, then be a SuperNode."""
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode, flower_supernode

    from fedsim.flower.polling import PULL_MAX_TIME, look_soon

    poll, patience = (float(os.environ.get(name, default)) for name, default in (("FEDSIM_POLL", 0.2), ("FEDSIM_PATIENCE", PULL_MAX_TIME)))
    parser = _parse_args_run_supernode()
    options = parser.parse_args()
    if refused := [f"--{name.replace('_', '-')}" for name in NOT_OURS if getattr(options, name, None)]:
        parser.error(f"{', '.join(refused)}: the worker of this command would get no work; leave that out, or start flower-supernode")
    sys.argv += ["--isolation", "process"]  # the worker below is that process
    address = f"{options.host}:{options.port}"
    here = ["--address", address, "--parent", str(os.getpid()), "--poll", str(min(poll, 0.1))]
    end = keep([sys.executable, "-m", "fedsim.flower.worker", *here])
    # The loop there sleeps for three seconds between looks at the SuperLink, and for half a second between looks at what the worker has
    # handed over, which costs no message; nothing configures either.
    start_client_internal.time = SimpleNamespace(  # type: ignore[assignment]
        sleep=lambda seconds: time.sleep(min(seconds, poll if seconds > 1 else HANDED_OVER))
    )
    start_client_internal._pull_and_store_message = forgetting(start_client_internal._pull_and_store_message)
    look_soon(patience)
    try:
        flower_supernode()
    finally:
        end()


if __name__ == "__main__":
    main()
