"""`python -m tests.bench.admm`: how far noise on the links keeps ADMM from the pooled solution, simulated and in theory.

The scenario is papers/fedadmm. Each row: ||w - w*||^2, mean over rounds 101 to 200 and over `--seeds`; what theory says of those
rounds, where everyone takes part; and ||w - w*||^2 after 20 rounds.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from fedsim import rng
from fedsim.engine import run
from fedsim.fleet import Channel, Link
from fedsim.scenario import load
from fedsim.sim.executor import Inline
from fedsim.sim.port import SimPort
from fedsim.world import World, build
from strategies.fedadmm import AdmmSolve

FILE = Path(__file__).parents[2] / "scenarios" / "papers" / "fedadmm.yaml"
ROUNDS = 200

ROWS = [  # form, share, continues, clients a round, noise both ways
    *(("dual", "sum", 0, 50, noise) for noise in (0.02, 0.05, 0.1)),
    *(("last", "sum", 0, 50, noise) for noise in (0.02, 0.05, 0.1)),
    *(("dual", "model", 0, 50, noise) for noise in (0.02, 0.05, 0.1)),
    *(("dual", "sum", goes_on, 10, noise) for noise in (0.0, 0.05) for goes_on in (0, 5, 20)),
    *(("last", "sum", goes_on, 10, 0.05) for goes_on in (0, 5)),
    *(("dual", "model", 0, 10, noise) for noise in (0.0, 0.05)),
]


def recursion(h: np.ndarray, form: str, share: str, rho: float) -> tuple[np.ndarray, np.ndarray]:
    """A round of everyone, less its fixed point: `s <- A s + G e`, for clients whose f_k has the matrix `h[k]` `[K, D, D]`.

    s = (v_k, z_k, what each k last received, w) `[3 K D + D]`; e = noise on what each receives, and on what each sends `[2 K D]`.
    """
    k, d = h.shape[:2]
    inverse = np.linalg.inv(h + rho * np.eye(d))

    def turn(s: np.ndarray, e: np.ndarray) -> np.ndarray:
        v, z, heard = s[:-d].reshape(3, k, d)
        w = s[-d:] + e[: k * d].reshape(k, d)
        if form == "dual":
            z = z + rho * (v - w)
            v = np.einsum("kij,kj->ki", inverse, rho * w - z)
        else:
            v = v + rho * np.einsum("kij,kj->ki", inverse, (2 * w - heard if form == "eliminated" else w) - v)
        u = v
        if share == "sum":
            u = v + z / rho if form == "dual" else w - np.einsum("kij,kj->ki", h, v) / rho
        return np.concatenate([v.ravel(), z.ravel(), w.ravel(), (u + e[k * d :].reshape(k, d)).mean(0)])

    n, m = 3 * k * d + d, 2 * k * d
    a = np.stack([turn(s, np.zeros(m)) for s in np.eye(n)], 1)
    g = np.stack([turn(np.zeros(n), e) for e in np.eye(m)], 1)
    return a, g


def expected_error(h: np.ndarray, form: str, share: str, rho: float, down: float, up: float, count: int) -> np.ndarray:
    """E ||w - E w||^2 after each of `count` rounds, with noise of these standard deviations on every number. `[count]`."""
    a, g = recursion(h, form, share, rho)
    spread = np.repeat([down**2, up**2], g.shape[1] // 2)
    rows, out = np.eye(len(a))[-h.shape[1] :], []
    for _ in range(count):
        out.append(((rows @ g) ** 2 * spread).sum())
        rows = rows @ a
    return np.cumsum(out)


def curvatures(world: World) -> np.ndarray:
    """H_k of each client. `[K, D, D]`."""
    parts = [world.data.x[world.data.train.of(k)].numpy() for k in range(world.data.clients)]
    return np.stack([x.T @ x / len(x) for x in parts])


def errors(seed: int, program: AdmmSolve, clients: int, noise: float) -> tuple[np.ndarray, World]:
    """||w - w*||^2 after each round."""
    scenario, _ = load(FILE, (f"seed={seed}", f"fleet.participation.clients={clients}"))
    world, strategy = build(scenario), replace(scenario.strategy, local=program)  # type: ignore[type-var]
    fleet = replace(scenario.fleet, channel=Channel(Link(noise), Link(noise)))
    blank = strategy.memory(world.problem, world.w)
    port = SimPort(Inline(world.trainer()), fleet, None, world.data.sizes, blank, None, rng.fold(seed, rng.FLEET))
    rounds = islice(run(strategy, world.problem, world.w, port, scenario.pace, rng.fold(seed, 1000)), ROUNDS)
    assert world.data.optimum is not None
    return np.array([float((next(iter(r.state.w.values())) - world.data.optimum).square().sum()) for r in rounds]), world


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.admm", description=__doc__)
    parser.add_argument("--seeds", default="1,2,3")
    seeds = [int(s) for s in parser.parse_args().seeds.split(",")]
    print(f"{'form':>6} {'share':>6} {'goes on':>8} {'clients':>8} {'noise':>6} {'error':>10} {'theory':>10} {'round 20':>10}")
    for form, share, goes_on, clients, noise in ROWS:
        program = AdmmSolve(form=form, share=share, continues=goes_on)  # type: ignore[arg-type]
        found = [errors(seed, program, clients, noise) for seed in seeds]
        error, early = (np.mean([curve[part].mean() for curve, _ in found]) for part in (slice(100, None), slice(19, 20)))
        theory = ""
        if clients == found[0][1].data.clients:
            each = [expected_error(curvatures(w), form, share, program.rho, noise, noise, ROUNDS)[100:].mean() for _, w in found]
            theory = f"{np.mean(each):10.3g}"
        print(f"{form:>6} {share:>6} {goes_on:>8} {clients:>8} {noise:>6} {error:>10.3g} {theory:>10} {early:>10.3g}", flush=True)


if __name__ == "__main__":
    main()
