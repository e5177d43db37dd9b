"""F5. The run folder: everything a run leaves behind, complete enough to resume it and to report on it without the program that made it.

    scenario.yaml       what ran, resolved: every default written out
    manifest.json       versions, machine, seed, code revision, how chunks were executed
    metrics.jsonl       a row a round; a function of the scenario alone, so two runs of one scenario have the same bytes
    clients.jsonl       a row a round: who took part, and the weight and whatever else the strategy says of each; likewise
    scores.jsonl        a row an evaluation: each client's accuracy and loss on its own test data (`evaluate.clients`)
    timings.jsonl       wall-clock seconds of each round; these differ from run to run
    checkpoints/        tensors (safetensors) and their outline (JSON); nothing is ever unpickled
    tables/             rows of clients that are too large for the checkpoints: what a server or devices remember of each client
    model.safetensors   the final model
    failure.json        why a cell of a study came to no end; gone when it is tried again

Every file but the logs is written beside its place and moved there; the logs are appended to and flushed.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from fedsim.document import write
from fedsim.errors import FedsimError
from fedsim.params import Params
from fedsim.table import Storage, Table
from fedsim.tree import dump, load, tree_leaves

FORMAT = 2
"""Version of the checkpoint format."""

LOGS = ("metrics", "clients", "scores", "timings")


class Folder:
    """A run folder. `create` makes a new one, `Folder(path)` opens one."""

    def __init__(self, path: Path):
        self.path = path
        self._logs: dict[str, IO[str]] = {}
        self._lock: IO[str] | None = None
        self._kept: dict[str, list[Table]] = {}  # what checkpoints refer to in `tables/`: not to be overwritten

    @property
    def storage(self) -> Storage:
        """Where tables with a row for each client are kept."""
        return Storage(folder=self.path)

    @staticmethod
    def create(path: Path | None, name: str) -> Folder:
        """A new folder at `path` (which may exist if it is empty), or `runs/<name>/<time>`."""
        if path is None:
            stem = Path("runs") / name / time.strftime("%Y-%m-%d_%H-%M-%S")
            return Folder(_make_new(stem))
        try:
            path.mkdir(parents=True, exist_ok=True)
            occupied = any(path.iterdir())
        except OSError as error:
            raise FedsimError(f"{path}: cannot be made the run folder: {error.strerror}") from None
        if occupied:
            raise FedsimError(f"{path}: not empty; choose another --output, or continue the run there with: fedsim run --resume {path}")
        return Folder(path)

    @staticmethod
    def open(path: Path) -> Folder:
        """The folder of an earlier run."""
        if not (path / "scenario.yaml").is_file():
            raise FedsimError(f"{path}: not a run folder (no scenario.yaml in it)")
        return Folder(path)

    def lock(self) -> None:
        """Keep other processes from writing here; the lock ends with this process, however it ends."""
        import fcntl

        for _ in range(10):  # `fedsim watch` holds it for an instant, to see whether anyone does
            lock = open(self.path / ".lock", "w")  # noqa: SIM115  (held until `unlock`)
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock.fileno()).st_ino == (self.path / ".lock").stat().st_ino:  # else who had it has just taken it away
                    self._lock = lock
                    return
            lock.close()
            time.sleep(0.02)
        raise FedsimError(f"{self.path}: another process is running in this folder")

    def write_scenario(self, values: dict[str, Any]) -> None:
        self._write("scenario.yaml", write(values).encode())

    def write_manifest(self, values: dict[str, Any]) -> None:
        self._write("manifest.json", json.dumps(values, indent=2).encode() + b"\n")

    def manifest(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / "manifest.json").read_bytes()))
        except (OSError, ValueError) as error:
            raise FedsimError(f"{self.path / 'manifest.json'}: cannot be read: {error}") from None

    def log(self, name: str, row: dict[str, Any]) -> None:
        """Append a row to one of `LOGS`, and flush it."""
        if name not in self._logs:
            self._logs[name] = open(self.path / f"{name}.jsonl", "a", encoding="utf-8")  # noqa: SIM115  (until `close`)
        self._logs[name].write(json.dumps(row) + "\n")
        self._logs[name].flush()

    def rows(self, name: str = "metrics") -> list[dict[str, Any]]:
        """The rows of a log. A last line that a crash cut off is left out."""
        try:
            text = (self.path / f"{name}.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        lines = text.split("\n")[:-1]
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise FedsimError(f"{self.path / name}.jsonl: cannot be read: {error}") from None

    def rewind(self, round: int) -> None:
        """Forget what was logged after `round`."""
        self.close()
        for name in LOGS:
            kept = [row for row in self.rows(name) if row["round"] <= round]
            self._write(f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in kept).encode())

    def save(self, round: int, tree: Any, keep: int) -> None:
        """Write the checkpoint of a round, and drop all but the newest `keep`."""
        from safetensors.torch import save

        arrays, outline = dump(tree)
        stem = f"checkpoints/round-{round:08d}"
        (self.path / "checkpoints").mkdir(exist_ok=True)
        self._write(f"{stem}.safetensors", save({name: tensor.clone() for name, tensor in arrays.items()}))
        self._write(f"{stem}.json", json.dumps({"format": FORMAT, "round": round, "outline": outline}).encode())  # last: it makes it valid
        self._kept[f"{stem}.json"] = _tables(tree)
        for old in self.checkpoints()[:-keep]:
            self._kept.pop(str(old.relative_to(self.path)), None)
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)

    def checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("round-*.json"))

    def latest(self, device: str = "cpu") -> tuple[int, Any] | None:
        """The newest checkpoint, as its round and its tree, or None if there is none yet. What was not in RAM comes to `device`."""
        checkpoints = self.checkpoints()
        for older in checkpoints[:-1]:
            with suppress(FedsimError):  # only to know what it refers to
                self._load(older)
        return self._load(checkpoints[-1], device) if checkpoints else None

    def _load(self, path: Path, device: str = "cpu") -> tuple[int, Any]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            meta = json.loads(path.read_bytes())
            # Copies, because tensors in the file lie at any address, and sums over those round otherwise.
            arrays = {name: tensor.clone() for name, tensor in load_file(path.with_suffix(".safetensors")).items()}
        except (OSError, ValueError, SafetensorError) as error:
            raise FedsimError(f"{path}: cannot be read ({error}); delete it to go on from the one before") from None
        if meta.get("format") != FORMAT:
            raise FedsimError(f"{path}: format {meta.get('format')}; this version of fedsim reads format {FORMAT}")
        tree = load(arrays, meta["outline"], self.path, device)
        self._kept[str(path.relative_to(self.path))] = _tables(tree)
        return meta["round"], tree

    def write_model(self, w: Params) -> None:
        from safetensors.torch import save

        self._write("model.safetensors", save({name: tensor.detach().cpu().clone() for name, tensor in w.items()}))

    def write_failure(self, reason: str, trace: str) -> None:
        """Why the run ended before its end."""
        self._write("failure.json", json.dumps({"reason": reason, "trace": trace}, indent=2).encode() + b"\n")

    def forget_failure(self) -> None:
        """It is tried again."""
        (self.path / "failure.json").unlink(missing_ok=True)

    @property
    def finished(self) -> bool:
        return (self.path / "model.safetensors").is_file()

    def close(self) -> None:
        for log in self._logs.values():
            log.close()
        self._logs.clear()

    def unlock(self) -> None:
        """Let others in again."""
        if self._lock is not None:
            (self.path / ".lock").unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def _write(self, name: str, content: bytes) -> None:
        write_file(self.path / name, content)


def write_file(target: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, target)


def _tables(tree: Any) -> list[Table]:
    """The tables of a checkpoint that are kept in files."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Table) and leaf.on_disk]


def _make_new(stem: Path) -> Path:
    """`stem`, or `stem-2`, `stem-3`... if another run took it in the same second."""
    for attempt in range(1, 1000):
        path = stem if attempt == 1 else stem.with_name(f"{stem.name}-{attempt}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise FedsimError(f"{path}: cannot be made: {error.strerror}; choose a place with --output") from None
    raise FedsimError(f"{stem}: too many runs of one second")
