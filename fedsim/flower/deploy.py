"""`fedsim deploy --local N`: a scenario over real Flower processes on this machine, as a person starts it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from fedsim.console import Display
from fedsim.errors import FedsimError
from fedsim.flower.bundle import write_app
from fedsim.flower.local import Federation, signals
from fedsim.folder import Folder
from fedsim.scenario import Scenario
from fedsim.session import INTERRUPTED, display_of

CLOSE = 20.0
"""Seconds that the server has after the last round, to close trackers."""


def deploy_locally(scenario: Scenario, folder: Folder, nodes: int, resume: bool, quiet: bool, verbose: bool) -> int:
    """Run a scenario over a SuperLink and `nodes` SuperNodes, or go on with the run in `folder`. Returns the exit code.

    Everything that is started is ended, whatever happens; Ctrl-C, SIGTERM and SIGHUP keep the last checkpoint.
    """
    again = f"fedsim deploy --resume {folder.path} --local {nodes}"
    rounds = sum(stage.rounds for stage in scenario.stages())
    display = display_of(rounds, quiet, verbose)
    try:
        with (
            signals(signal.default_int_handler),
            tempfile.TemporaryDirectory(prefix="fedsim-app-") as made,
            Federation(nodes) as federation,
        ):
            app = write_app(scenario, Path(made) / "app")
            if not quiet:
                print(f"SuperLink at 127.0.0.1:{federation.port}, {nodes} SuperNodes, TLS, authenticated", flush=True)
            run = federation.run(app, output=folder.path.absolute(), resume=resume, nodes=nodes, quiet=True)
            seen = len(folder.rows()) if resume else 0
            while not folder.finished:
                ended = run.poll() is not None
                seen = _show(folder, seen, display)
                if ended:
                    if folder.finished:
                        break
                    advice = f"\nGo on with: {again}" if _begun(folder) else ""
                    raise FedsimError(f"the run ended before its end:\n{federation.log('run')[-3000:]}{advice}")
                time.sleep(0.2)
            _show(folder, seen, display)
            with suppress(subprocess.TimeoutExpired):
                run.wait(CLOSE)
    except KeyboardInterrupt:
        advice = f"Go on with:\n  {again}" if _begun(folder) else "Nothing had begun; the same command begins anew."
        print(f"\nInterrupted; every process is ended. {advice}", file=sys.stderr)
        return INTERRUPTED
    finally:
        display.close()
    return 0


def _begun(folder: Folder) -> bool:
    """Whether there is something to go on with."""
    return (folder.path / "scenario.yaml").is_file()


def _show(folder: Folder, seen: int, display: Display) -> int:
    """Show the rows that are new; how many there are."""
    try:
        rows = folder.rows()
    except (FedsimError, json.JSONDecodeError):  # it is being written
        return seen
    for row in rows[seen:]:
        display.show(row)
    return max(seen, len(rows))
