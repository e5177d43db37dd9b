"""F5. The manifest: what the bits of a result depend on besides the scenario, and what one wants to know of a run later."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import time
from dataclasses import replace
from importlib.metadata import version as version_of
from typing import Any

import torch

from fedsim import __version__
from fedsim.errors import FedsimError
from fedsim.params import Params
from fedsim.scenario import Scenario
from fedsim.world import World

RUNTIMES = {
    "simulation": "fedsim run --resume {}",
    "flower-simulation": "",
    "flower": "fedsim deploy --resume {} --local N",
}
"""Where a run's clients can be, and the command that goes on with it, of its folder; none where nodes forget what devices remember."""


def manifest(scenario: Scenario, world: World, runtime: str = "simulation") -> dict[str, Any]:
    """What the bits of a result depend on besides the scenario, and what one wants to know of a run. `runtime`: one of `RUNTIMES`."""
    return {
        "fedsim": __version__,
        "runtime": runtime,
        "seed": scenario.seed,
        "versions": environment(),
        "machine": {"platform": platform.platform(), "processor": _processor(), "cores": os.cpu_count()},
        "code": _revision(),
        "partition": world.data.fingerprint(),
        "initial_model": _digest(world.whole),
        "clients": world.data.clients,
        "parameters": world.w.size,
        "engine": {
            "mode": world.mode,
            "compile": scenario.engine.compile,
            "device": world.device,
            "precision": scenario.engine.precision,
            "workers": world.workers,
        },
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def as_began(scenario: Scenario, then: dict[str, Any]) -> Scenario:
    """The scenario with the device on which a run began, where it leaves that open: on another, the last bits would differ."""
    device = then["engine"]["device"]
    if scenario.engine.device != "auto" or (device == "cuda" and not torch.cuda.is_available()):
        return scenario
    return replace(scenario, engine=replace(scenario.engine, device=device))


def _digest(w: Params) -> str:
    """SHA-256 (hex) over names, shapes and bytes of a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(w.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def environment() -> dict[str, str]:
    """The versions that decide the last bits of a result."""
    return {"python": platform.python_version()} | {name: version_of(name) for name in ("torch", "numpy", "ray", "flwr-datasets")}


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What would make a run resumed now differ from one that was never interrupted. Raises if the data are not the same."""
    if then["partition"] != now["partition"]:
        raise FedsimError("the data or their partition have changed since this run started; it cannot be continued")
    changed = [f"{k} {v} -> {now['versions'].get(k)}" for k, v in then["versions"].items() if now["versions"].get(k) != v]
    if then["machine"]["processor"] != now["machine"]["processor"]:
        changed.append(f"processor {then['machine']['processor']} -> {now['machine']['processor']}")
    was, is_ = then["engine"], now["engine"]
    changed += [f"engine.{k} {was[k]} -> {is_[k]}" for k in ("mode", "compile", "device", "precision") if was.get(k, is_[k]) != is_[k]]
    return changed


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _revision() -> str | None:
    """The git revision of the working directory, with `+` if it is not clean, or None outside of a repository."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, timeout=5, check=True).stdout
        return head + ("+" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None
