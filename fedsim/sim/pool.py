"""Chunks on Ray actors, with the same answer as in one process."""

from __future__ import annotations

import math
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import ClientError, FedsimError
from fedsim.params import Params
from fedsim.sim.cohort import Trainer
from fedsim.sim.executor import PATIENT, Executor, Failure, Patience, complaint
from fedsim.sim.handout import Handout, Task
from fedsim.sim.process import return_memory, settle
from fedsim.tree import flatten, unflatten
from fedsim.types import Batch, Precision

PAGE = 4096
"""Bytes of a memory page, or fewer."""


@dataclass(frozen=True)
class Packed:
    """A pytree as one NumPy vector for each dtype, which Ray shares without copying."""

    vectors: list[np.ndarray]
    dtypes: list[torch.dtype]
    empty: Any

    @staticmethod
    def of(tree: Any) -> Packed:
        vectors, empty = flatten(tree)
        return Packed([_to_numpy(v) for v in vectors], [v.dtype for v in vectors], empty)

    def tree(self, device: torch.device | str = "cpu") -> Any:
        """The tree; what was not in RAM comes to `device`."""
        return unflatten([_to_torch(v, d) for v, d in zip(self.vectors, self.dtypes, strict=True)], self.empty, device)


def _to_numpy(vector: Tensor) -> np.ndarray:
    vector = vector.detach().cpu()
    return vector.view(torch.int16).numpy() if vector.dtype == torch.bfloat16 else vector.numpy()


def _to_torch(vector: np.ndarray, dtype: torch.dtype) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # shared memory; we only read it
        return torch.from_numpy(vector).view(dtype)


class Worker:
    """A Ray actor: a `Trainer` over data that it shares with its neighbours.

    `data` are references to `Packed` in the object store. Had Ray resolved them, each worker would have got a copy of its own.
    """

    def __init__(self, trainer: Trainer, data: list[Any], device: str, threads: int, precision: Precision):
        import ray

        settle(device, precision)
        torch.set_num_threads(threads)
        self.device = device
        self._trainer = _with_data(trainer, [_resident(part, device) for part in ray.get(data)])

    def freeze(self, frozen: Packed) -> None:
        self._trainer = self._trainer.freeze(frozen.tree(self.device))

    def run(self, method: str, shared: Packed, item: Packed) -> Packed:
        return_memory()
        try:
            return Packed.of(getattr(self._trainer, method)(shared.tree(self.device), item.tree(self.device)))
        except Exception as error:  # here, because not every exception can travel
            raise complaint(method, error) from None


def _resident(packed: Packed, device: str) -> Tensor:
    """A data tensor that stays in shared memory on a CPU, and is copied once to a GPU."""
    (vector,), (dtype,) = packed.vectors, packed.dtypes
    vector.view(np.uint8)[::PAGE].max(initial=0)  # map every page now, not one by one in the first hundred rounds
    return _to_torch(vector, dtype).view(packed.empty.shape).to(device)


BRIEF = 1.0
"""Seconds of an item below which a worker has its next one at hand already: the way to a worker and back takes up to ten milliseconds.
Longer items are handed out one by one, so that none waits for a slow worker while another is free."""


MESSAGES = 512 << 20
"""Bytes of the object store beside the data: messages and replies that are under way."""

STARTING = 600.0
"""Seconds in which at least one of the workers that are waited for has to be ready. An autoscaler takes minutes to add a node."""

LATE = 60.0
"""Seconds after which we say that workers on a cluster that we joined are waited for: it may be full, or too small."""


class Cluster:
    """A Ray that several pools use, one after the other. It starts with the first of them, and ends with `close`.

    A Ray of our own starts anew, larger, for a pool that does not fit.
    """

    def __init__(self) -> None:
        self._ray: Any = None
        self._folder: str | None = None
        self._address: str | None = None
        self._cpus = self._data_bytes = 0

    def start(self, cpus: int, data_bytes: int, address: str | None) -> Any:
        """The `ray` module, connected to a Ray of at least this size, or to the one at `address`. No pool is open."""
        if self._ray is not None:
            fits = address is not None or (cpus <= self._cpus and data_bytes <= self._data_bytes)
            if address == self._address and fits:
                return self._ray
            self.close()
        self._address, self._cpus, self._data_bytes = address, max(cpus, self._cpus), max(data_bytes, self._data_bytes)
        self._folder = None if address else tempfile.mkdtemp(prefix="fedsim-ray-")
        try:
            self._ray = _start_ray(self._cpus, self._data_bytes, address, self._folder)
        except BaseException:
            self.close()
            raise
        return self._ray

    def close(self) -> None:
        """Disconnect; a Ray of our own ends."""
        if self._ray is not None:
            self._ray.shutdown()
            self._ray = None
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


class RayPool(Executor):
    """Runs items on `workers` Ray actors. Data are put in the object store once, what is shared once a call; the first items start first.

    A worker that dies, hangs or raises is replaced and its item handed out again. Results do not change, because programs are pure.

    Args:
        trainer: what each worker holds; its data are shared.
        workers: number of actors.
        threads: of each, and of this process meanwhile.
        patience: with workers that fail.
        address: of a Ray cluster to join, or None for a Ray of our own on this machine.
        cluster: a Ray to share with later pools, which outlives this one; None for one that ends with it.
        precision: of products of float32 on a GPU.
    """

    def __init__(
        self,
        trainer: Trainer,
        workers: int,
        threads: int = 1,
        patience: Patience = PATIENT,
        address: str | None = None,
        cluster: Cluster | None = None,
        precision: Precision = "highest",
    ):
        data = [trainer.x, trainer.y, *((trainer.test.x, trainer.test.y) if trainer.test else ())]
        self.mode = trainer.mode
        self.device = device = str(trainer.x.device.type)
        self._patience = patience
        self._threads = threads
        self._address = address
        self._cluster = cluster or Cluster()
        self._alone = cluster is None
        self._actors: dict[int, Any] = {}
        self._seconds: dict[str, float] = {}  # what an item of each method took last
        ray = self._ray = self._cluster.start(workers * threads, sum(part.nbytes for part in data), address)
        self._threads_before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            share = _share(torch.cuda.device_count(), workers) if device == "cuda" and not address else 0
            self._actor = ray.remote(num_cpus=threads, num_gpus=share)(Worker)
            parts = [ray.put(Packed.of(part)) for part in data]
            self._arguments: Any = (ray.put(_with_data(trainer, [])), parts, device, threads, precision)
            self._frozen = ray.put(Packed.of(None))
            self._spawn(range(workers))
        except BaseException:
            self.close()
            raise

    def _spawn(self, places: Iterable[int]) -> None:
        """Start workers in these places, and wait for them: starting up is not part of an item's time."""
        places = list(places)
        self._actors |= {place: self._actor.remote(*self._arguments) for place in places}
        if died := self._tell_frozen(places):
            raise FedsimError(f"a worker did not start: {next(iter(died.values()))}")

    def _tell_frozen(self, places: Iterable[int]) -> dict[int, str]:
        """Tell the workers in these places what is frozen, and wait until they know. Gives those that died instead, and why."""
        ray, died = self._ray, dict[int, str]()
        waiting = {self._actors[place].freeze.remote(self._frozen): place for place in places}
        while waiting:
            reference = self._next(list(waiting))
            place = waiting.pop(reference)
            try:
                ray.get(reference)
            except ray.exceptions.RayError as error:
                died[place] = str(error).strip().splitlines()[-1]  # where Ray names the cause
        return died

    def _next(self, waiting: list[Any]) -> Any:
        """The first of workers' answers to come. Raises a `FedsimError` where there is none for `STARTING` seconds."""
        quiet = LATE if self._address else STARTING
        done, _ = self._ray.wait(waiting, num_returns=1, timeout=quiet)
        if not done and quiet < STARTING:
            warnings.warn(f"{self._shortage(len(waiting))}; waiting for {STARTING / 60:g} minutes", RuntimeWarning, stacklevel=2)
            done, _ = self._ray.wait(waiting, num_returns=1, timeout=STARTING - quiet)
        if not done:
            raise FedsimError(self._shortage(len(waiting)))
        return done[0]

    def _shortage(self, missing: int) -> str:
        """How many workers there are not, and what Ray has for them."""
        total, free = (resources().get("CPU", 0) for resources in (self._ray.cluster_resources, self._ray.available_resources))
        where, more = (f"the Ray cluster at {self._address}", ", or add nodes") if self._address else ("Ray", "")
        each = "1 CPU" if self._threads == 1 else f"{self._threads} CPUs"
        return (
            f"{missing} of {len(self._actors)} workers do not start: each takes {each}, and {where} has {total:g}, "
            f"of which {free:g} are free; lower engine.workers or engine.threads{more}"
        )

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return list(self._ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in self._actors.values()]))

    def map(self, method: str, shared: Any, items: list[Any]) -> list[Any]:
        ray, results = self._ray, dict[int, Any]()
        common = ray.put(Packed.of(shared))
        handout = Handout(len(items), len(self._actors), self._seconds.get(method, math.inf) < BRIEF)
        running: dict[Any, Task] = {}
        while len(results) < len(items):
            while task := handout.take():
                running[self._actors[task.worker].run.remote(method, common, Packed.of(items[task.item]))] = task
            reference, problem = self._finished(running, method)
            task = running[reference]
            if problem is None:
                del running[reference]
                self._seconds[method] = handout.end(task)
                results[task.item] = ray.get(reference).tree(self.device)
                continue
            failed = task if isinstance(problem, ClientError) else handout.first(task.worker)
            again = failed.failures < self._patience.retries
            handout.take_back(failed, again)
            running = {reference: task for reference, task in running.items() if task.worker != failed.worker}
            self._replace([failed.worker])
            if not again and not self._patience.loses(method):
                raise problem
            if not again:
                results[failed.item] = Failure(str(problem))
        return [results[i] for i in range(len(items))]

    def _finished(self, running: dict[Any, Task], method: str) -> tuple[Any, FedsimError | None]:
        """A task that has ended, and what went wrong, if anything: it raised, its worker died, or it took too long."""
        ray, timeout = self._ray, self._patience.timeout
        limit = oldest = None
        if timeout is not None:
            oldest = min(running, key=lambda reference: running[reference].since)
            limit = max(0.0, running[oldest].since + timeout - time.monotonic())
        done, _ = ray.wait(list(running), num_returns=1, timeout=limit)
        if not done:
            return oldest, FedsimError(f"a worker took more than {timeout:g} s")
        try:
            ray.get(done)
        except ray.exceptions.RayTaskError as error:
            return done[0], complaint(method, error.cause)
        except ray.exceptions.RayError as error:
            return done[0], FedsimError(f"a worker died: {_brief(error)}")
        return done[0], None

    def _replace(self, places: Iterable[int]) -> None:
        for place in places:
            self._ray.kill(self._actors[place], no_restart=True)
        self._spawn(places)

    def freeze(self, frozen: Params | None) -> None:
        self._frozen = self._ray.put(Packed.of(frozen))
        self._replace(self._tell_frozen(self._actors))

    def close(self) -> None:
        torch.set_num_threads(self._threads_before)
        for actor in self._actors.values():
            self._ray.kill(actor, no_restart=True)
        self._actors = {}
        self._arguments = self._frozen = None  # what a later pool needs room for
        if self._alone:
            self._cluster.close()


def _with_data(trainer: Trainer, data: list[Tensor]) -> Trainer:
    """The trainer with these data tensors: x, y, and those of the test set; or with none, to travel without them."""
    nothing = torch.empty(0)
    x, y, *test = data or (nothing, nothing)
    return replace(trainer, x=x, y=y, test=Batch(test[0], test[1]) if test else None)


def _brief(error: BaseException) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _share(cards: int, workers: int) -> float:
    """What part of a GPU each worker asks for. A worker uses one of them, which some share where there are too few."""
    return 1 / -(-workers // cards)


def _start_ray(cpus: int, data_bytes: int, address: str | None, folder: str | None) -> Any:
    """Ray, quiet and without a dashboard: a running cluster, or one of our own on this machine."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_free_objects_period_milliseconds", "0")  # not once a second: messages would wander through the store
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 gives way to whatever else runs on the machine
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            _reachable(address)
            ray.init(address=address, **quiet)
        else:
            store = data_bytes + MESSAGES
            ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=store, _temp_dir=folder, **quiet)
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        where = f"join the Ray cluster at {address}" if address else "start Ray"
        raise FedsimError(f"cannot {where}: {_brief(error)}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own there, which ends the process on the spot
    return ray


def _reachable(address: str) -> None:
    """Raise an OSError if nobody listens at `host:port`: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=5).close()
