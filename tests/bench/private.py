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
CHOSEN = {"dense": 0.003, "naive": 0.03, "ffa": 0.03, "product": 0.03}
"""What `tune` gave at epsilon 4. Beyond its grid, dense at 0.001 (0.631) and naive at 0.1 (0.207) are worse."""


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
                row |= {
                    "spent": last["privacy.epsilon"],
                    "noise": last["privacy.noise"],
                    "bytes": last["bytes"],
                    "cpu": round(last["cpu"], 1),
                }
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


# ---- speed

CLIENTS, BATCH, LENGTH, VOCABULARY, STEPS = 16, 8, 64, 90, 5


def adapted() -> tuple[Any, Any, Any, Any]:
    """A frozen causal transformer with adapters of rank 8, and tokens `[C B, T]`."""
    from fedsim.models import realise, trained
    from fedsim.models.attention import CharTransformer
    from fedsim.models.lora import Lora
    from fedsim.problem import Network, NextToken, Problem

    task = NextToken(VOCABULARY)
    module, w, draws = realise(CharTransformer(dim=64, depth=2, heads=4), (LENGTH,), torch.int64, VOCABULARY, VOCABULARY, 1, task)
    fit = Lora(rank=8).fit(module, w, torch.zeros((2, LENGTH), dtype=torch.int64), 2)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (CLIENTS * BATCH, LENGTH + 1)))
    problem = Problem(Network(module, fit.shapes), task, torch.full((CLIENTS,), float(BATCH)), draws, frozen=fit.whole)
    return problem, trained(fit.shapes, fit.whole), tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def timed(work: Any, repeats: int = 7) -> float:
    """Median CPU seconds of `work`, after one call to warm up. CPU and not wall seconds: a shared machine takes turns."""
    work()
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        seconds.append(time.process_time() - begin)
    return float(np.median(seconds))


def clients_step(program: Any, clients: int = CLIENTS) -> float:
    """Examples a second of `clients` that share the examples and run `program` as one stack."""
    from fedsim.data import Lists
    from fedsim.sim.chunk import Chunk
    from fedsim.sim.cohort import Trainer

    problem, w, x, y = adapted()
    each = len(x) // clients
    lists = Lists.of_clients([np.arange(i * each, (i + 1) * each) for i in range(clients)])
    trainer = Trainer(replace(problem, sizes=torch.full((clients,), float(each))), x, y, lists, "vmap")
    chunk = Chunk(np.arange(clients), 0, 3, {}, torch.ones(clients))
    return STEPS * len(x) / timed(lambda: trainer.train((program, w), chunk))


def central() -> float:
    """Examples a second of one model on all examples: autograd and torch's optimiser on the adapters alone."""
    problem, w, x, y = adapted()
    leaves = [v.clone().requires_grad_() for v in w.values()]
    optimiser = torch.optim.SGD(leaves, lr=0.1)
    problem.network.module.requires_grad_(False)

    def work() -> None:
        for _ in range(STEPS):
            optimiser.zero_grad()
            tensors = dict(problem.frozen) | dict(zip(w, leaves, strict=True))
            problem.task.loss(problem.network(tensors, x), y).mean().backward()
            optimiser.step()

    return STEPS * len(x) / timed(work)


def opacus(clients: int) -> float:
    """Examples a second of Opacus on the same network, adapters as pairs of linear layers, one client after the other."""
    from copy import deepcopy

    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer
    from torch import Tensor, nn

    from fedsim.models import realise
    from fedsim.models.attention import CharTransformer
    from fedsim.problem import NextToken

    class Pair(nn.Module):
        def __init__(self, layer: nn.Linear):
            super().__init__()
            self.layer, self.a, self.b = layer, nn.Linear(layer.in_features, 8, bias=False), nn.Linear(8, layer.out_features, bias=False)
            nn.init.zeros_(self.b.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.b(self.a(x))

    task = NextToken(VOCABULARY)
    module, *_ = realise(CharTransformer(dim=64, depth=2, heads=4), (LENGTH,), torch.int64, VOCABULARY, VOCABULARY, 1, task)
    module.requires_grad_(False)
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) is nn.Linear:
                parent._modules[name] = Pair(child)
    _, _, x, y = adapted()
    each = len(x) // clients

    def work() -> None:
        for i in range(clients):
            private = GradSampleModule(deepcopy(module), loss_reduction="mean")
            inner = torch.optim.SGD([p for p in private.parameters() if p.requires_grad], lr=0.1)
            optimiser = DPOptimizer(inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=each)
            own = slice(i * each, (i + 1) * each)
            for _ in range(STEPS):
                optimiser.zero_grad()
                task.loss(private(x[own]), y[own]).mean().backward()
                optimiser.step()

    return STEPS * len(x) / timed(work, 3)


def speed() -> None:
    from fedsim.local import Sgd
    from fedsim.private import DpSgd

    plain = clients_step(Sgd(lr=0.1, steps=STEPS, batch_size=BATCH))
    private = clients_step(DpSgd(lr=0.1, noise=1.0, rate=1.0, batch_size=BATCH, steps=STEPS))
    one, alone = central(), clients_step(DpSgd(lr=0.1, noise=1.0, rate=1.0, batch_size=CLIENTS * BATCH, steps=STEPS), clients=1)
    print(f"{CLIENTS} clients x {BATCH} examples of {LENGTH} tokens, rank 8, one core; examples a CPU second")
    print(f"one central model     {one:8.0f}")
    print(f"clients               {plain:8.0f}   {plain / one:.2f} of central")
    print(f"clients, private      {private:8.0f}   a private step takes {plain / private:.2f} times a plain one")
    print(f"one client, private   {alone:8.0f}")
    try:
        theirs, theirs_alone = opacus(CLIENTS), opacus(1)
    except ImportError:
        print("Opacus is not installed: pip install opacus")
        return
    print(f"Opacus, clients       {theirs:8.0f}   ours is {private / theirs:.2f} times as fast")
    print(f"Opacus, one client    {theirs_alone:8.0f}   ours is {alone / theirs_alone:.2f} times as fast")


# ---- membership


def advantages(epsilon: float, seed: int, canaries: int = 400, rounds: int = 20) -> tuple[float, float, float]:
    """Advantage of a loss-threshold attack on canaries, its bound, and test accuracy.

    Canaries are examples with random labels. Half of them, by lot, are trained on; the attack says "member" where the model's loss on one
    is low. The threshold is chosen on a half of each, and the advantage (true minus false positives) measured on the other.
    """
    from dataclasses import replace as change

    from fedsim.data import Lists
    from fedsim.ledger import open_ledger
    from fedsim.scenario import validate
    from fedsim.world import build

    scenario = validate(canary_scenario(epsilon, seed, rounds))
    world = build(scenario)
    draw = np.random.default_rng(seed)
    chosen = draw.permutation(world.data.train.index)[:canaries]
    inside, outside = chosen[: canaries // 2], chosen[canaries // 2 :]
    y = world.data.y.clone()
    y[chosen] = torch.from_numpy(draw.integers(0, 10, canaries))
    kept = [part[~np.isin(part, outside)] for part in (world.data.train.of(i) for i in range(world.data.clients))]
    data = change(world.data, y=y, train=Lists.of_clients(kept))
    ledger = open_ledger(scenario, data.train.sizes)  # sizes have changed, and with them rates and noise
    world = change(world, data=data, problem=change(world.problem, sizes=data.sizes), ledger=ledger)
    w, last = final_model(scenario, world)
    with torch.no_grad():
        loss = world.problem.task.loss(world.problem.output(w, data.x), y).numpy()
    half = canaries // 4
    threshold = max(loss[chosen], key=lambda t: (loss[inside[:half]] <= t).mean() - (loss[outside[:half]] <= t).mean())
    advantage = float((loss[inside[half:]] <= threshold).mean() - (loss[outside[half:]] <= threshold).mean())
    spent = last.get("privacy.epsilon")
    bound = 1.0 if spent is None else (math.expm1(spent) + 2 * last["privacy.delta"]) / (math.exp(spent) + 1)
    return advantage, bound, last["test.accuracy"]


def canary_scenario(epsilon: float, seed: int, rounds: int) -> Any:
    from fedsim.document import Document

    program: dict[str, Any] = {"name": "sgd", "lr": 0.1, "epochs": 5, "batch_size": 16, "momentum": 0.5}
    if math.isfinite(epsilon):
        program = {"name": "dp-sgd", "lr": 0.5, "steps": 4, "batch_size": 64, "momentum": 0.5}
    values: dict[str, Any] = {
        "name": "canary",
        "seed": seed,
        "data": {"source": "digits", "clients": 4, "partition": "iid"},
        "model": {"name": "mlp", "hidden": [128]},
        "strategy": {"name": "fedavg", "local": program},
        "rounds": rounds,
        "evaluate": {"every": rounds},
        "engine": {"workers": 0},
    }
    if math.isfinite(epsilon):
        values["privacy"] = {"target_epsilon": epsilon, "delta": 1e-5}
    return Document("canary", values)


def final_model(scenario: Any, world: Any) -> tuple[Any, dict[str, Any]]:
    """The model that a run ends with, and its last row."""
    from safetensors.torch import load_file

    from fedsim.experiment import start, train
    from fedsim.folder import Folder
    from fedsim.params import Params

    with tempfile.TemporaryDirectory() as place:
        folder = Folder.create(Path(place) / "run", scenario.name)
        start(scenario, world, folder)
        rows = list(train(scenario, world, folder))
        return Params(load_file(folder.path / "model.safetensors")), rows[-1]


def canary() -> None:
    print("| epsilon | advantage of the attack, seeds 1 to 3 | what epsilon allows | test accuracy |")
    print("|---|---|---|---|")
    for epsilon in (math.inf, 8.0, 2.0, 0.5):
        found = [advantages(epsilon, seed) for seed in SEEDS]
        shown = ", ".join(f"{a:+.2f}" for a, *_ in found)
        print(f"| {epsilon:g} | {shown} | {max(b for _, b, _ in found):.2f} | {np.mean([c for *_, c in found]):.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.private", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
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
        {"tune": tune, "speed": speed, "canary": canary}[chosen.part]()


if __name__ == "__main__":
    main()
