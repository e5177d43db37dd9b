"""LoRA: adapters on any model, what they leave alone, what travels, and what they come to."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsim import lowrank, rng
from fedsim.engine import run as rounds_of
from fedsim.errors import ScenarioError
from fedsim.experiment import open_executor, start, train
from fedsim.folder import Folder
from fedsim.models import realise, trained
from fedsim.models.adapt import Fitted
from fedsim.models.attention import CharTransformer
from fedsim.models.convolution import LeNet5
from fedsim.models.lora import Adapted, Lora, row_norms
from fedsim.params import Params
from fedsim.problem import Classification, Network, NextToken, Problem, Regression
from fedsim.scenario import load
from fedsim.sim.pool import Packed
from fedsim.sim.port import SimPort
from fedsim.tree import nbytes, rows
from fedsim.types import Batch
from fedsim.world import World, build


class Mixed(nn.Module):
    """Every kind of layer that can be adapted: `[B, 4] tokens -> [B, 3]`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, 5, 3, padding=1, stride=2)
        self.fc = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.conv(self.embed(x).transpose(1, 2))).flatten(1))


def fitted(lora: Lora, module: nn.Module | None = None, x: Tensor | None = None) -> tuple[nn.Module, Fitted, Problem]:
    """An adapted network, and the problem in which only adapters are trained. Adapters are moved away from zero."""
    if module is None:
        torch.manual_seed(3)
        module, x = Mixed(), torch.zeros((2, 4), dtype=torch.int64)
    w = Params({k: v.detach().clone() for k, v in module.named_parameters()})
    fit = lora.fit(module, w, x, 11)
    return module, fit, Problem(Network(module, fit.shapes), Classification(3), torch.ones(1), fit.draws, frozen=fit.whole)


def moved(fit: Fitted) -> Params:
    """Adapters at random places."""
    draw = torch.Generator().manual_seed(1)
    return trained(fit.shapes, fit.whole).map(lambda v: v + 0.3 * torch.randn(v.shape, generator=draw))


TOKENS = torch.from_numpy(rng.generator(5).integers(0, 9, (7, 4)))
ALL = ("linear", "embedding", "convolution")
VARIANTS = {
    "all kinds": Lora(rank=2, alpha=3.0, targets=ALL),
    "rank-stabilised": Lora(rank=2, alpha=3.0, targets=ALL, scaling="rank-stabilised"),
    "gaussian": Lora(rank=2, targets=ALL, init="gaussian"),
    "orthogonal": Lora(rank=2, targets=ALL, init="orthogonal"),
    "dora": Lora(rank=2, targets=("linear",), dora=True),
    "b only": Lora(rank=2, targets=ALL, train="b"),
    "head whole": Lora(rank=2, targets=ALL, also=("fc",)),
    "dropout": Lora(rank=2, targets=("linear", "convolution"), dropout=0.4),
}
every_variant = pytest.mark.parametrize("lora", VARIANTS.values(), ids=VARIANTS.keys())


@every_variant
def test_fresh_adapters_leave_the_output_as_it_was_bit_for_bit(lora):
    torch.manual_seed(3)
    before = Mixed()(TOKENS)
    _, fit, problem = fitted(lora)
    assert torch.equal(problem.output(trained(fit.shapes, fit.whole), TOKENS), before)


@every_variant
def test_every_adapter_moves_the_output_and_merging_gives_the_same_network(lora):
    module, fit, problem = fitted(lora)
    w = moved(fit)
    adapted = problem.output(w, TOKENS)
    for name in w:
        still = trained(fit.shapes, fit.whole)[name]
        assert not torch.allclose(problem.output(w | Params({name: still}), TOKENS), adapted), name
    merged = lora.merged(module, fit.whole | w)
    torch.manual_seed(3)
    plain = Mixed()
    plain.load_state_dict(dict(merged))  # exactly the names of the network without adapters
    torch.testing.assert_close(plain(TOKENS), adapted, rtol=1e-5, atol=1e-6)


@every_variant
def test_the_base_is_not_trained_and_gradients_equal_the_merged_networks(lora):
    """d loss / d B = scale * (d loss / d W) A^T on the linear layer, by the chain rule."""
    _, fit, problem = fitted(replace(lora, dora=False, dropout=0.0))
    w = moved(fit)
    g, _ = problem.grad(w, Batch(TOKENS, torch.arange(7) % 3))
    assert set(g) == set(fit.trained)
    if "fc.lora_B" not in w:
        return
    plain = Problem(problem.network, Classification(3), torch.ones(1))
    whole = fit.whole | w
    (inside,) = (name for name, *_ in [("fc.weight",)])
    moved_base = Params({k: v for k, v in whole.items() if "lora" not in k})
    shifted = moved_base | Params({inside: moved_base[inside] + lora.scale * whole["fc.lora_B"] @ whole["fc.lora_A"]})
    rest = Params({k: v for k, v in whole.items() if "lora" in k and not k.startswith("fc.")})
    dense, _ = plain.grad(shifted | rest, Batch(TOKENS, torch.arange(7) % 3))
    torch.testing.assert_close(g["fc.lora_B"], lora.scale * dense[inside] @ whole["fc.lora_A"].T, rtol=1e-4, atol=1e-6)


def test_a_layer_by_hand():
    """y = W x + (alpha / r) B A x.

    import numpy as np
    W, A, B, x = np.array([[1., 2.], [0., 1.]]), np.array([[1., -1.]]), np.array([[2.], [3.]]), np.array([1., 3.])
    print(W @ x + 4 * B @ (A @ x))
    n = np.linalg.norm(W + 4 * B @ A, axis=1); print((np.array([1., 2.]) / n * ((W + 4 * B @ A) @ x)).round(6))
    """
    layer = nn.Linear(2, 2, bias=False)
    values = {
        "weight": torch.tensor([[1.0, 2.0], [0.0, 1.0]]),
        "lora_A": torch.tensor([[1.0, -1.0]]),
        "lora_B": torch.tensor([[2.0], [3.0]]),
    }
    x = torch.tensor([[1.0, 3.0]])
    adapted = Adapted(layer, 4.0, 0.0)
    assert torch.func.functional_call(adapted, values, (x,)).tolist() == [[-9.0, -21.0]]
    stretched = torch.func.functional_call(adapted, values | {"lora_magnitude": torch.tensor([1.0, 2.0])}, (x,))
    assert stretched[0].tolist() == pytest.approx([-0.83205, -2.58004], abs=1e-5)


def test_scaling():
    assert Lora(rank=16, alpha=8.0).scale == 0.5
    assert Lora(rank=16, alpha=8.0, scaling="rank-stabilised").scale == 2.0


def test_row_norms_without_the_product():
    draw = torch.Generator().manual_seed(2)
    w, a, b = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((5, 7), (2, 7), (5, 2)))
    torch.testing.assert_close(row_norms(w, a, b, 1.7), (w + 1.7 * b @ a).norm(dim=1))


def test_an_image_network_and_a_stack_of_clients():
    """Adapters on two-dimensional convolutions; the base is one tensor for the whole stack."""
    task = Classification(10)
    module, w, _ = realise(LeNet5(), (1, 28, 28), torch.float32, 10, None, 4, task)
    before = module(torch.ones(2, 1, 28, 28))
    fit = Lora(rank=2, targets=("convolution", "linear")).fit(module, w, torch.zeros(2, 1, 28, 28), 5)
    problem = Problem(Network(module, fit.shapes), task, torch.ones(3), frozen=fit.whole)
    assert torch.equal(problem.output(trained(fit.shapes, fit.whole), torch.ones(2, 1, 28, 28)), before)
    w = moved(fit)
    many = w.map(lambda v: torch.stack([v, v * 0.5, v * 2]))
    x = torch.randn(3, 4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    together = torch.vmap(problem.output)(many, x)
    alone = torch.stack([problem.output(rows(many, i), x[i]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [6, 3])
def test_at_full_rank_it_trains_like_the_dense_layer(rank):
    """Least squares on one layer, W [6, 6]. A is orthogonal and stays (train: b), so a step of B with rate lr / scale^2 moves the product
    as a dense step with rate lr does: d(scale B A) = -scale^2 (lr / scale^2) G A^T A = -lr G. At half the rank it cannot.
    """
    torch.manual_seed(0)
    module = nn.Linear(6, 6, bias=False, dtype=torch.float64)
    x = torch.randn(40, 6, dtype=torch.float64)
    batch, dense = Batch(x, x @ torch.randn(6, 6, dtype=torch.float64)), module.weight.detach().clone()
    lora = Lora(rank=rank, alpha=5.0, init="orthogonal", train="b")
    _, fit, problem = fitted(lora, nn.Sequential(module), torch.zeros(2, 6, dtype=torch.float64))
    problem = replace(problem, task=Regression(6))
    w = trained(fit.shapes, fit.whole)
    for _ in range(300):
        dense = dense - 0.3 * (x @ dense.T - batch.y).T @ x / 40
        w = w + problem.grad(w, batch)[0] * (-0.3 / lora.scale**2)
    low = lora.merged(problem.network.module, fit.whole | w)["0.weight"]
    if rank == 6:
        torch.testing.assert_close(low, dense, rtol=1e-8, atol=1e-8)
    else:
        assert (low - dense).norm() > 0.3 * dense.norm()


# ---- what cannot be adapted


class Reads(nn.Module):
    """Uses a layer's weight without running the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x @ self.a.weight.T)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


FEATURES = torch.zeros(2, 4)
REFUSED: list[tuple[Lora, Any, Any, str]] = [
    (Lora(rank=5), None, None, "rank 5 is larger than layer 'fc' allows, a matrix of 3 x 10; take at most 3"),
    (
        Lora(targets=("fcc",)),
        None,
        None,
        r"'fcc' matches no layer \(did you mean 'fc'\?\); there are: embed \(embedding\), conv \(convolution\), fc",
    ),
    (Lora(rank=2, targets=ALL, dora=True), None, None, "'embed' is no linear layer"),
    (Lora(rank=2, also=("head",)), None, None, "model.adapt.also: 'head' matches no layer"),
    (Lora(rank=2, also=("fc",)), None, None, "nothing is left to adapt"),
    (Lora(rank=2), Reads, FEATURES, "layer 'a' is never run as a layer"),
    (Lora(rank=2), Tied, FEATURES, "the weight of 'a' is another layer's, too"),
]


@pytest.mark.parametrize(("lora", "module", "x", "message"), REFUSED, ids=[m[:30] for *_, m in REFUSED])
def test_what_cannot_be_adapted_is_refused_by_name(lora, module, x, message):
    with pytest.raises(ScenarioError, match=message):
        fitted(lora, module and module(), x)


def test_layers_inside_of_fused_ones_are_not_offered():
    """`nn.MultiheadAttention` reads its output layer's weight, so an adapter there would do nothing."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend, self.fc = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.attend(x, x, x)[0].mean(1))

    _, fit, _ = fitted(Lora(rank=2), Net(), torch.zeros(2, 5, 4))
    assert set(fit.trained) == {"fc.lora_A", "fc.lora_B"}


# ---- runs


SCENARIO = """\
name: adapted
seed: 4
data: {source: digits, clients: 6, partition: iid, proxy: {source: train, size: 100}}
model: {name: mlp, hidden: [16], adapt: {name: lora, rank: 3, alpha: 6}}
phases:
  - {strategy: {name: pretrain, local: {name: sgd, lr: 0.1, epochs: 5}}, rounds: 1, adapt: false}
  - {strategy: {name: fedavg, local: {name: sgd, lr: 0.2, epochs: 1, momentum: 0.5}}, rounds: 4}
evaluate: {every: 1}
engine: {workers: 0}
output: {checkpoint: 1}
"""


def world_of(tmp_path: Path, *assignments: str, text: str = SCENARIO) -> tuple[Any, World]:
    (tmp_path / "adapted.yaml").write_text(text)
    scenario, _ = load(tmp_path / "adapted.yaml", assignments)
    return scenario, build(scenario)


def rows_of(tmp_path: Path, *assignments: str, text: str = SCENARIO, stop: int | None = None) -> tuple[Folder, list[dict]]:
    scenario, world = world_of(tmp_path, *assignments, text=text)
    place = tmp_path / "run"
    folder = Folder.open(place) if place.exists() else Folder.create(place, scenario.name)
    start(scenario, world, folder)
    steps = train(scenario, world, folder)
    list(islice(steps, stop))
    steps.close()
    return folder, folder.rows()


def model_of(folder: Folder) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder.path / "model.safetensors")


def test_a_base_is_made_then_adapted_and_only_adapters_travel(tmp_path):
    folder, log = rows_of(tmp_path)
    first, second = log[1], log[-1]
    assert (first["participants"], first["bytes_down"], first["bytes_up"]) == (0, 0, 0)
    shapes = [(3, 64), (16, 3), (3, 16), (10, 3)]
    each = 4 * sum(a * b for a, b in shapes)  # float32
    for row in log[2:]:
        assert row["bytes_down"] + row["bytes_up"] == 2 * 6 * each
    assert second["test.accuracy"] > first["test.accuracy"] + 0.02
    assert first["test.accuracy"] > 0.4
    kept = model_of(folder)
    assert {name for name in kept if "lora" in name} == {f"{n}.lora_{f}" for n in ("1", "3") for f in "AB"}


def test_bytes_are_what_a_message_weighs(tmp_path):
    """The vector that Ray gets, and the tensors of a safetensors file."""
    from safetensors.torch import save

    _, world = world_of(tmp_path)
    _, w = world.enter(world.ledger.stages[1], world.whole)
    assert sum(vector.nbytes for vector in Packed.of(w).vectors) == nbytes(w)
    content = save(dict(w))
    header = int.from_bytes(content[:8], "little")
    assert len(content) - 8 - header == nbytes(w)


def test_a_merged_model_is_a_plain_network_that_answers_the_same(tmp_path):
    for name in ("kept", "merged"):
        (tmp_path / name).mkdir()
    kept, log = rows_of(tmp_path / "kept")
    merged, _ = rows_of(tmp_path / "merged", "model.adapt.merge=true")
    plain = model_of(merged)
    scenario, world = world_of(
        tmp_path, text=SCENARIO.replace(", adapt: {name: lora, rank: 3, alpha: 6}", "").replace(", adapt: false", "")
    )
    assert set(plain) == set(world.w)
    output = world.problem.output(Params(plain), world.data.test_x)
    assert float((output.argmax(1) == world.data.test_y).double().mean()) == pytest.approx(log[-1]["test.accuracy"])
    assert kept.path != merged.path
    assert scenario.model.adapt is None


def test_an_adapted_run_resumes_to_the_same_bytes(tmp_path):
    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
    straight, log = rows_of(tmp_path / "straight")
    rows_of(tmp_path / "resumed", stop=4)  # in the second phase
    resumed, again = rows_of(tmp_path / "resumed")
    assert again == log
    assert (resumed.path / "model.safetensors").read_bytes() == (straight.path / "model.safetensors").read_bytes()


def test_modes_agree_from_the_first_phase_on(tmp_path):
    """`model.adapt` without a phase before: adapters over the initial network."""
    text = SCENARIO[: SCENARIO.index("phases")] + "strategy: {name: fedavg, local: {name: sgd, lr: 0.3}}\nrounds: 3\n"
    models = []
    for mode in ("vmap", "loop"):
        scenario, world = world_of(tmp_path, f"engine.mode={mode}", text=text)
        assert set(world.w) == set(world.problem.network.adapters)
        executor = open_executor(scenario, world)
        port = SimPort(executor, scenario.fleet, None, world.data.sizes, {}, None, 1)
        models.append(list(islice(rounds_of(scenario.strategy, world.problem, world.w, port, scenario.pace, 5), 3))[-1].state.w)
        executor.close()
    for name in models[0]:
        torch.testing.assert_close(models[0][name], models[1][name], rtol=1e-4, atol=1e-5)


def test_adapters_of_an_earlier_phase_go_on_and_a_dense_phase_takes_them_in(tmp_path):
    text = SCENARIO.replace(
        "rounds: 4}", "rounds: 2}\n  - {strategy: {name: fedavg, local: {name: sgd, lr: 0.2}}, rounds: 1, adapt: ADAPT}"
    )
    (tmp_path / "on").mkdir()
    folder, log = rows_of(tmp_path / "on", text=text.replace("ADAPT", "true"))
    assert len([name for name in model_of(folder) if "lora" in name]) == 4
    (tmp_path / "in").mkdir()
    folder, dense = rows_of(tmp_path / "in", text=text.replace("ADAPT", "false"))
    assert not any("lora" in name for name in model_of(folder))
    assert dense[:-1] == log[:-1]
    assert dense[-1]["bytes_up"] > 2 * log[-1]["bytes_up"]


def test_workers_hold_the_base_and_give_the_same_bits(tmp_path):
    for name in ("0", "2"):
        (tmp_path / name).mkdir()
    results = [rows_of(tmp_path / n, f"engine.workers={n}", "engine.chunk=2") for n in ("0", "2")]
    assert results[0][1] == results[1][1]
    assert (results[0][0].path / "model.safetensors").read_bytes() == (results[1][0].path / "model.safetensors").read_bytes()


def test_dropout_of_adapters_is_keyed():
    _, fit, problem = fitted(VARIANTS["dropout"])
    assert set(fit.draws) == {"conv.drop.uniform", "fc.drop.uniform"}
    w = moved(fit)
    numbers = {name: torch.from_numpy(rng.uniform(rng.fold_each(1, np.arange(1)), (7, *d.shape)))[0] for name, d in fit.draws.items()}
    once, again = (problem.output(w, TOKENS, numbers) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.allclose(once, problem.output(w, TOKENS))


def test_dora_starts_from_the_weights_that_a_phase_left(tmp_path):
    _, world = world_of(tmp_path, "model.adapt.dora=true")
    stage = world.ledger.stages[1]
    dense = world.whole.map(lambda v: v) | Params({"1.weight": world.whole["1.weight"] * 3})
    dense = Params({k: v for k, v in dense.items() if "lora" not in k})
    frozen, w = world.enter(stage, dense)
    torch.testing.assert_close(w["1.lora_magnitude"], dense["1.weight"].norm(dim=1))
    adapted = replace(world.problem, frozen=frozen).output(w, world.data.test_x)
    plain = replace(world.problem, frozen=None).output(dense, world.data.test_x)
    assert torch.equal(adapted, plain)


# ---- pairs of factors


def stacked(count: int = 4) -> Params:
    draw = torch.Generator().manual_seed(7)
    shapes = {"x.lora_A": (2, 5), "x.lora_B": (6, 2), "y.lora_A": (2, 3, 3, 3), "y.lora_B": (4, 2), "z": (3,)}
    return Params({k: torch.randn(count, *s, generator=draw, dtype=torch.float64) for k, s in shapes.items()})


P = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


def dense(models: Params, layer: str) -> Tensor:
    return models[f"{layer}.lora_B"] @ models[f"{layer}.lora_A"].flatten(2)


def test_the_bias_of_averaging_factors_is_the_definitions():
    models, off, size = stacked(), 0.0, 0.0
    for layer in ("x", "y"):
        mean = torch.tensordot(P, dense(models, layer), dims=1)
        a, b = (torch.tensordot(P, models[f"{layer}.lora_{f}"].flatten(2), dims=1) for f in "AB")
        off, size = off + float((b @ a - mean).square().sum()), size + float(mean.square().sum())
    assert float(lowrank.bias(models, P)) == pytest.approx((off / size) ** 0.5, rel=1e-9)
    same = models.map(lambda v: v[:1].expand(4, *v.shape[1:]))
    assert float(lowrank.bias(same, P)) == pytest.approx(0, abs=1e-7)
    shared = models | Params({k: v[:1].expand(4, *v.shape[1:]) for k, v in models.items() if k.endswith("A")})
    assert float(lowrank.bias(shared, P)) == pytest.approx(0, abs=1e-7)  # FFA-LoRA: A is the same for all


def test_the_mean_of_products_is_the_best_of_its_rank():
    """Eckart and Young: the truncated singular value decomposition, here of the dense matrix."""
    models = stacked()
    out = lowrank.mean_of_products(models, P)
    for layer in ("x", "y"):
        u, s, v = torch.linalg.svd(torch.tensordot(P, dense(models, layer), dims=1), full_matrices=False)
        best = (u[:, :2] * s[:2]) @ v[:2]
        a = out[f"{layer}.lora_A"].flatten(1)
        torch.testing.assert_close(out[f"{layer}.lora_B"] @ a, best, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(a @ a.T, torch.eye(2, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out["z"], torch.tensordot(P, models["z"], dims=1))
    assert {k: v.shape for k, v in out.items()} == {k: v.shape[1:] for k, v in models.items()}


def test_the_mean_of_zero_products_keeps_a_alive():
    models = stacked()
    zero = models | Params({k: torch.zeros_like(v) for k, v in models.items() if k.endswith("B")})
    out = lowrank.mean_of_products(zero, P)
    assert float(out["x.lora_B"].abs().max()) == 0
    assert float(out["x.lora_A"].norm(dim=1).min()) == pytest.approx(1)


def test_a_transformer_of_the_zoo_is_adapted_where_one_says():
    task = NextToken(11)
    module, w, _ = realise(CharTransformer(dim=16, depth=2, heads=2), (8,), torch.int64, 11, 11, 5, task)
    fit = Lora(rank=4, targets=("query", "encoder.layers.1.*.value")).fit(module, w, torch.zeros((2, 8), dtype=torch.int64), 7)
    layers = {name.rsplit(".", 1)[0] for name in fit.trained}
    assert layers == {f"encoder.layers.{i}.attention.{part}" for i, part in ((0, "query"), (1, "query"), (1, "value"))}
