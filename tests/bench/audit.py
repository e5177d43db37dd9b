"""`python -m tests.bench.audit [ROW...]`: what one update of a convolutional network gives away, and what takes it back.

A client of Fashion-MNIST with four pictures trains a LeNet with strided convolutions and tanh for one round from the first model; the
server attacks its change by gradient inversion and by SME on the same budget, and guesses blindly the mean of the test set. PSNR in dB,
SSIM, and seconds of an attack, means over `--seeds` (another model, other clients). Rows: one full-batch step, local epochs, and defences.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fedsim.audit import METHODS, Attack, Seen, audit
from fedsim.replay import update_of
from fedsim.scenario import load
from fedsim.world import build

BASE = """\
name: leak
data: {source: fashion-mnist, clients: 15000, partition: iid}
model: {name: python, function: "tests.bench.audit:strided"}
fleet: {participation: {name: uniform, clients: 1}}
strategy: {name: fedavg, local: {name: sgd, lr: 0.02, epochs: 1, batch_size: 1}}
rounds: 1
"""

LOCAL = "strategy.local="
ROWS: dict[str, tuple[str, ...]] = {
    "one step": (LOCAL + "{name: sgd, lr: 0.02, steps: 1, batch_size: null}",),
    "1 epoch": (LOCAL + "{name: sgd, lr: 0.02, epochs: 1, batch_size: 1}",),
    "10 epochs": (LOCAL + "{name: sgd, lr: 0.02, epochs: 10, batch_size: 1}",),
    "one step, DP": (LOCAL + "{name: dp-sgd, lr: 0.02, steps: 1, batch_size: 4, clip: 1.0, noise: 0.1}",),
    "10 epochs, DP": (LOCAL + "{name: dp-sgd, lr: 0.02, steps: 40, batch_size: 1, clip: 1.0, noise: 0.1}",),
    "one step, FedPara": (LOCAL + "{name: sgd, lr: 0.02, steps: 1, batch_size: null}", "model.factors={name: fedpara, ratio: 0.5}"),
    "one step, LoRA": (LOCAL + "{name: sgd, lr: 0.02, steps: 1, batch_size: null}", "model.adapt={name: lora, rank: 4}"),
}


def strided(shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Two strided convolutions of 12 channels and a linear layer, tanh between: after the LeNet of Zhu, Liu, Han, NeurIPS 2019."""
    size = 12 * -(-shape[1] // 4) * -(-shape[2] // 4)
    layers = (nn.Conv2d(shape[0], 12, 5, 2, 2), nn.Tanh(), nn.Conv2d(12, 12, 5, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(size, outputs))
    return nn.Sequential(*layers)


def figures(assignments: tuple[str, ...], seed: int, how: Attack) -> dict[str, dict[str, Any]]:
    """The figures of each method, for one client and model."""
    with tempfile.TemporaryDirectory() as there:
        file = Path(there) / "leak.yaml"
        file.write_text(BASE)
        scenario, _ = load(file, (f"seed={seed}", *assignments))
    world = build(scenario)
    update = update_of(scenario, world, None, 1, None)
    seen = Seen(update.started, update.change, update.data.y)
    return audit(update.problem, seen, update.data.x, world.data.test_x, how, key=seed).figures()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.audit", description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="which rows; default: all")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--iterations", type=int, default=300)
    args = parser.parse_args()
    how = Attack(args.iterations, lr=0.1, a_lr=0.01, tv=1e-3)
    print(f"{'':18} " + "   ".join(f"{name:>24}" for name in METHODS.values()))
    for row in args.rows or ROWS:
        found = [figures(ROWS[row], int(seed), how) for seed in args.seeds.split(",")]
        cells = []
        for name in METHODS:
            psnr, ssim = (np.array([each[name][what] for each in found]) for what in ("psnr", "ssim"))
            time = f" {np.mean([each[name]['seconds'] for each in found]):4.0f} s" if "seconds" in found[0][name] else ""
            cells.append(f"{psnr.mean():6.2f} ± {psnr.std(ddof=len(found) > 1):4.2f} {ssim.mean():6.3f}{time}")
        print(f"{row:18} " + "   ".join(f"{cell:>24}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
