"""DP-LoRA: as published and by hand, its remedies, what it reduces to, and what it does not promise."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from test_lora import rows_of, world_of
from torch import nn

from fedsim import lowrank
from fedsim.data import Lists
from fedsim.engine import run as rounds_of
from fedsim.errors import FedsimError
from fedsim.fleet import Fleet
from fedsim.local import Sgd
from fedsim.models import trained
from fedsim.models.lora import Lora
from fedsim.pace import Sync
from fedsim.params import Params
from fedsim.private import DpSgd
from fedsim.problem import Network, Problem, Regression
from fedsim.scenario import load
from fedsim.sim.cohort import Trainer
from fedsim.sim.executor import Inline
from fedsim.sim.port import SimPort
from fedsim.strategy import Strategy
from fedsim.types import Arrivals, Updates
from strategies.dp_lora import DpLora, DpLoraBatch
from strategies.fedavg import FedAvg

D = torch.float64


def federation(lora: Lora, start: dict[str, list] | None = None) -> tuple[Trainer, Params]:
    """Two clients with least squares on one layer, W [2, 3], in float64."""
    module = nn.Linear(3, 2, bias=False, dtype=D)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, -1.0, 1.0]]))
    network = nn.Sequential(module)
    w = Params({k: v.detach().clone() for k, v in network.named_parameters()})
    fit = lora.fit(network, w, torch.zeros(2, 3, dtype=D), 1)
    whole = fit.whole | Params({f"0.{k}": torch.tensor(v, dtype=D) for k, v in (start or {}).items()})
    x = torch.tensor([[1.0, 2, 0], [0, 1, 1], [2, 0, -1], [1, 1, 1]], dtype=D)
    y = torch.tensor([[1.0, 0], [2, 1], [0, 0], [-1, 3]], dtype=D)
    version = torch.zeros((), dtype=D)
    problem = Problem(Network(network, fit.shapes), Regression(2), torch.tensor([2.0, 2.0]), frozen=whole, version=version)
    trainer = Trainer(problem, x, y, Lists.of_clients([np.arange(2), np.arange(2, 4)]), "vmap")
    return trainer, trained(fit.shapes, whole)


def states(strategy: Strategy, trainer: Trainer, w: Params, count: int, mode: str = "vmap") -> list[Any]:
    port = SimPort(Inline(replace(trainer, mode=mode)), Fleet(), None, trainer.problem.sizes, {}, None, 3)
    loop = rounds_of(strategy, trainer.problem, w, port, Sync(), 5)
    return [next(loop).state for _ in range(count)]


START = {"lora_A": [[1.0, 0.0, 1.0]], "lora_B": [[0.5], [-1.0]]}
LORA = Lora(rank=1, alpha=2.0)


@pytest.mark.parametrize("mode", ["vmap", "loop"])
def test_a_round_as_published_by_hand(mode):
    """Batches of two (all of a client), A and B clipped apart, no noise, p_k = 1/2. The numbers come from

    import numpy as np
    W, A, B, s = np.array([[1., 0, 2], [0, -1, 1]]), np.array([[1., 0, 1]]), np.array([[.5], [-1]]), 2.0
    X = [np.array([[1., 2, 0], [0, 1, 1]]), np.array([[2., 0, -1], [1, 1, 1]])]
    Y = [np.array([[1., 0], [2, 1]]), np.array([[0., 0], [-1, 3]])]
    lr, C, As, Bs = 0.1, 1.5, [], []
    for x, y in zip(X, Y):
        G = (x @ (W + s * B @ A).T - y).T @ x / 2
        gA, gB = s * B.T @ G, s * G @ A.T
        cut = lambda g: g / max(1, np.linalg.norm(g) / C)
        As.append(A - lr * cut(gA)); Bs.append(B - lr * cut(gB))
    a, b, m = np.mean(As, 0), np.mean(Bs, 0), np.mean([p @ q for p, q in zip(Bs, As)], 0)
    print(a.round(8), b.ravel().round(8), np.linalg.norm(b @ a - m) / np.linalg.norm(m))
    """
    trainer, w = federation(LORA, START)
    (state,) = states(DpLora(DpLoraBatch(lr=0.1, noise=0.0, clip=1.5, batch_size=2)), trainer, w, 1, mode)
    np.testing.assert_allclose(state.w["0.lora_A"][0].numpy(), HAND_A, atol=1e-7)
    np.testing.assert_allclose(state.w["0.lora_B"][:, 0].numpy(), HAND_B, atol=1e-7)
    assert float(state.bias) == pytest.approx(HAND_BIAS, rel=1e-6)


HAND_A, HAND_B, HAND_BIAS = [0.91403745, -0.10435399, 0.95741805], [0.43383716, -0.86830887], 0.0010631970678949458


def test_published_noise_goes_to_both_factors_with_its_deviation():
    """Clients without any gradient: 400 rounds of A (3) and B (2) of two clients, averaged: deviation lr z C / sqrt(2). Fixed numbers."""
    trainer, w = federation(LORA, {"lora_A": [[0.0, 0.0, 0.0]], "lora_B": [[0.0], [0.0]]})
    still = replace(trainer, y=trainer.x @ torch.tensor([[1.0, 0.0, 2.0], [0.0, -1.0, 1.0]], dtype=D).T)
    zero = [state.w.vector().numpy() for state in states(DpLora(DpLoraBatch(lr=1e-6, noise=2.0, clip=10.0)), still, w, 400)]
    steps = np.diff(np.stack([np.zeros(5), *zero]), axis=0) / (1e-6 * 20 / np.sqrt(2))
    assert stats.kstest(steps.ravel(), "norm").pvalue > 1e-3


def test_naive_is_the_mean_of_factors_and_fedavg():
    trainer, w = federation(LORA, START)
    local = DpSgd(lr=0.1, noise=0.5, batch_size=2, steps=2)
    ours, fedavg = (states(s, trainer, w, 3) for s in (DpLora(local), FedAvg(local, weights="uniform")))
    for a, b in zip(ours, fedavg, strict=True):
        assert all(torch.allclose(a.w[k], b.w[k], rtol=0, atol=1e-12) for k in w)


def test_with_a_frozen_the_mean_is_exact_and_at_full_rank_the_product_is_too():
    """FFA-LoRA has no bias. Where r is as large as the layer, nothing is cut off: B A is the mean of the products."""
    trainer, w = federation(Lora(rank=2, alpha=2.0, train="b"))
    assert set(w) == {"0.lora_B"}
    assert all(float(s.bias) == 0 for s in states(DpLora(Sgd(lr=0.1)), trainer, w, 3))
    trainer, w = federation(Lora(rank=2, alpha=2.0, init="orthogonal"), {"lora_B": [[0.3, 1.0], [-0.2, 0.7]]})
    random = np.random.default_rng(1)
    payload = w.map(lambda v: torch.from_numpy(random.normal(size=(2, *v.shape))))
    updates = Updates(Arrivals(torch.arange(2), torch.tensor([2.0, 2.0]), torch.zeros(2), torch.zeros(2)), payload)
    strategy = DpLora(Sgd(), aggregate="product")
    state = strategy.server(trainer.problem, strategy.init(trainer.problem, w), updates, 0)
    models = payload + w
    mean = (models["0.lora_B"] @ models["0.lora_A"]).mean(0)
    torch.testing.assert_close(state.w["0.lora_B"] @ state.w["0.lora_A"], mean, rtol=1e-9, atol=1e-9)
    assert float(state.bias) > 0.01


def test_the_product_of_one_client_is_its_own():
    trainer, w = federation(LORA, START)
    arrivals = Arrivals(torch.arange(1), torch.tensor([2.0]), torch.zeros(1), torch.zeros(1))
    payload = w.map(lambda v: 0.3 * torch.ones((1, *v.shape), dtype=D))
    for aggregate in ("naive", "product"):
        strategy = DpLora(Sgd(), aggregate=aggregate)
        state = strategy.server(trainer.problem, strategy.init(trainer.problem, w), Updates(arrivals, payload), 0)
        a, b = lowrank.factors(state.w, "0")
        own = w + w.map(lambda v: 0.3 * torch.ones_like(v))
        torch.testing.assert_close(b @ a, own["0.lora_B"] @ own["0.lora_A"])
        assert float(state.bias) == pytest.approx(0, abs=1e-6)


def test_noise_in_both_factors_makes_the_bias_that_freezing_one_does_not_have():
    """The quadratic term: with noise on A and B, mean(B) mean(A) is off; with A frozen it is not, at any noise."""
    for train, low, high in (("both", 0.05, 10.0), ("b", 0.0, 1e-9)):
        trainer, w = federation(Lora(rank=1, alpha=2.0, train=train), START)
        last = states(DpLora(DpSgd(lr=0.3, noise=2.0, batch_size=2, steps=3)), trainer, w, 3)[-1]
        assert low <= float(last.bias) <= high


# ---- runs

SCENARIO = """\
name: adapted
seed: 4
data: {source: digits, clients: 5, partition: iid}
model: {name: mlp, hidden: [16], adapt: {name: lora, rank: 3}}
strategy: {name: dp-lora, local: {name: dp-sgd, lr: 0.3, noise: 1.0, batch_size: 32, steps: 2}}
rounds: 3
evaluate: {every: 3}
engine: {workers: 0}
"""


def test_the_sound_variant_says_its_epsilon_and_the_published_one_does_not(tmp_path: Path):
    (tmp_path / "sound").mkdir()
    _, sound = rows_of(tmp_path / "sound", text=SCENARIO)
    assert sound[-1]["privacy.epsilon"] > 0
    assert sound[-1]["server.bias"] > 0
    (tmp_path / "published").mkdir()
    _, published = rows_of(tmp_path / "published", "strategy.local={name: dp-lora-batch, noise: 2.0}", text=SCENARIO)
    assert not any(name.startswith("privacy.") for row in published for name in row)
    assert published[-1]["bytes_up"] == sound[-1]["bytes_up"]


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (("strategy.local=dp-lora-batch", "privacy.target_epsilon=2"), "clipping or noise without a bounded sensitivity has no epsilon"),
        (("model.adapt=null",), "strategy: dp-lora trains adapters; add model.adapt, e.g. {name: lora, rank: 8}"),
    ],
)
def test_what_it_cannot_promise_is_refused(tmp_path, assignments, message):
    (tmp_path / "adapted.yaml").write_text(SCENARIO)
    with pytest.raises(FedsimError) as caught:
        load(tmp_path / "adapted.yaml", assignments)
    assert message in str(caught.value)


def test_workers_are_not_told_the_base(tmp_path):
    """What travels is the adapters: the message of a job has no name of the base."""
    _, world = world_of(tmp_path, text=SCENARIO)
    stage = world.ledger.stages[0]
    (job,) = stage.strategy.plan(world.problem, stage.strategy.init(world.problem, world.w), np.arange(5), 0)
    assert set(job.message) == {f"{layer}.lora_{factor}" for layer in ("1", "3") for factor in "AB"}
