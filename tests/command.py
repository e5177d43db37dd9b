"""`fedsim` in processes of their own, forked from one that has imported PyTorch and its kin already: importing them takes seconds.

What a start from nothing is like, `test_cli.py` and `test_errors.py` look at.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import weakref
from pathlib import Path

IMPORTED = ["fedsim.session", "fedsim.experiment", "fedsim.compare", "fedsim.report", "flwr_datasets.partitioner", "sklearn.datasets"]

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(IMPORTED)


class Command:
    """A command under way, or over. As a context manager, it is killed in the end."""

    def __init__(self, *arguments: str | Path):
        here = Path(tempfile.mkdtemp(prefix="fedsim-test-"))
        weakref.finalize(self, shutil.rmtree, here)
        self._output, self._errors = here / "output", here / "errors"
        self._process = _forks.Process(target=_main, args=(list(map(str, arguments)), Path.cwd(), self._output, self._errors))
        self._process.start()

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def code(self) -> int | None:
        """The exit code, minus a signal's number where one ended it; None while it runs."""
        return self._process.exitcode

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def signal(self, number: int) -> None:
        if self.code is None:
            os.kill(self._process.pid, number)

    def wait(self, seconds: float = 120) -> int:
        """Its exit code."""
        self._process.join(seconds)
        assert self.code is not None, f"still running after {seconds} s: {self.errors}"
        return self.code


def _main(arguments: list[str], folder: Path, output: Path, errors: Path) -> None:
    for path, descriptor in ((output, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(folder)
    sys.argv = ["fedsim", *arguments]
    from fedsim.cli import main

    main()


def finished(*arguments: str | Path, code: int = 0) -> Command:
    """A command that has ended, with this exit code."""
    command = Command(*arguments)
    assert command.wait() == code, command.errors
    return command


def wait_until(happened, command: Command, seconds: float = 100) -> None:
    """Wait for something that a command does."""
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline and command.code is None:
        time.sleep(0.002)
    assert happened(), command.errors
