"""What privacy costs: accuracy against epsilon, speed of private steps, and what an attack on membership still sees.

python -m tests.bench.private tune                 # the learning rate of each method, on examples held back
python -m tests.bench.private curves --out FILE    # 4 methods x 5 epsilons x 3 seeds on papers/dp-lora; goes on where it was killed
python -m tests.bench.private table FILE           # mean and 95 % interval of each, paired with dense
python -m tests.bench.private speed                # LoRA clients against one central model, private against plain, and against Opacus
python -m tests.bench.private canary               # membership inference with and without privacy
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
METHODS = ("dense", "naive", "ffa", "product")
EPSILONS = (math.inf, 8.0, 4.0, 2.0, 1.0)
SEEDS = (1, 2, 3)
RATES = (0.003, 0.01, 0.03)
CHOSEN = {"dense": 0.003, "naive": 0.01, "ffa": 0.01, "product": 0.01}
"""What `tune` gave at epsilon 4."""


def scenario_of(method: str, epsilon: float, seed: int, lr: float, validation: float = 0.0) -> Any:
    """papers/dp-lora with another method, another target, another seed."""
    from fedsim.registry import lookup
    from fedsim.scenario import load
    from fedsim.strategy import Strategy

    scenario, _ = load(ROOT / "scenarios" / "papers" / "dp-lora.yaml")
    assert scenario.phases is not None
    first, second = scenario.phases
    local = replace(second.strategy.local, lr=lr, noise=0.0 if math.isinf(epsilon) else None)
    strategy: Any = lookup(Strategy, "dp-lora")(local=local, aggregate="product" if method == "product" else "naive")
    if method == "dense":
        strategy = lookup(Strategy, "fedavg")(local=local, weights="uniform")
    adapt = replace(scenario.model.adapt, train="b" if method == "ffa" else "both")
    return replace(
        scenario,
        seed=seed,
        data=replace(scenario.data, validation=validation),
        model=replace(scenario.model, adapt=adapt),
        phases=(first, replace(second, strategy=strategy, adapt=method != "dense")),
        privacy=replace(scenario.privacy, target_epsilon=None if math.isinf(epsilon) else epsilon),
    )


BASES: dict[int, Any] = {}
"""The base that the first phase makes, by initial model: methods differ after it."""


def make_bases_once() -> None:
    """Let the first phase of a seed train once, whatever follows it."""
    from strategies.pretrain import Pretrain

    train = Pretrain.init

    def init(self: Any, problem: Any, w: Any) -> Any:
        key = hash((round(float(w.norm()), 6), len(problem.proxy.y)))
        if key not in BASES:
            BASES[key] = train(self, problem, w)
        return BASES[key]

    Pretrain.init = init  # type: ignore[method-assign]


def run(scenario: Any) -> dict[str, Any]:
    """The last row of a run, its bytes in all, and CPU seconds."""
    from fedsim.experiment import start, train
    from fedsim.folder import Folder
    from fedsim.world import build

    begin = time.process_time()
    with tempfile.TemporaryDirectory() as place:
        folder = Folder.create(Path(place) / "run", scenario.name)
        world = build(scenario)
        start(scenario, world, folder)
        rows = list(train(scenario, world, folder))
    total = sum(row.get("bytes_up", 0) + row.get("bytes_down", 0) for row in rows)
    return rows[-1] | {"bytes": total, "cpu": time.process_time() - begin}


def tune() -> None:
    for method in METHODS:
        scores = {}
        for lr in RATES:
            scores[lr] = run(scenario_of(method, 4.0, 101, lr, validation=0.1))["validation.accuracy"]
        print(method, {lr: round(score, 4) for lr, score in scores.items()}, "->", max(scores, key=scores.__getitem__), flush=True)


def curves(out: Path) -> None:
    known = {(row["method"], row["epsilon"], row["seed"]) for row in read(out)} if out.exists() else set()
    for seed in SEEDS:
        for epsilon in EPSILONS:
            for method in METHODS:
                if (method, epsilon, seed) in known:
                    continue
                last = run(scenario_of(method, epsilon, seed, CHOSEN[method]))
                row = {"method": method, "epsilon": epsilon, "seed": seed, "lr": CHOSEN[method], "accuracy": last["test.accuracy"]}
                row |= {"spent": last["privacy.epsilon"], "noise": last["privacy.noise"], "bytes": last["bytes"], "cpu": round(last["cpu"], 1)}
                row |= {"loss": last["test.loss"], "bias": last.get("server.bias")}
                with open(out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def table(file: Path) -> None:
    """Accuracy by method and epsilon, and its difference to dense, paired by seed."""
    from scipy import stats

    found: dict[tuple[str, float], dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in read(file):
        found[row["method"], row["epsilon"]][row["seed"]] = row
    print("| method | bytes | " + " | ".join(f"epsilon {e:g}" for e in EPSILONS) + " |")
    print("|---|---|" + "---|" * len(EPSILONS))
    for method in METHODS:
        cells = []
        for epsilon in EPSILONS:
            rows, base = found[method, epsilon], found["dense", epsilon]
            seeds = sorted(rows)
            mean = np.mean([rows[s]["accuracy"] for s in seeds])
            text = f"{mean:.3f}"
            if method != "dense" and len(seeds) > 1:
                d = np.array([100 * (rows[s]["accuracy"] - base[s]["accuracy"]) for s in seeds])
                half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
                text += f", {d.mean():+.1f} ({d.mean() - half:+.1f} to {d.mean() + half:+.1f})"
            cells.append(text)
        size = next(iter(found[method, EPSILONS[0]].values()))["bytes"]
        print(f"| {method} | {size / 1e6:.1f} MB | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.private", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=["tune", "curves", "table", "speed", "canary"])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, default=Path("curves.jsonl"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.part in ("tune", "curves"):
        make_bases_once()
    if chosen.part == "curves":
        curves(chosen.out)
    elif chosen.part == "table":
        table(chosen.file or chosen.out)
    else:
        {"tune": tune}[chosen.part]()


if __name__ == "__main__":
    main()
