"""FedPara's layers: what they compute, how large they are, how they start, and that they train like any model."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.nn import functional as F

from fedsim.document import InvalidScenario
from fedsim.errors import ScenarioError
from fedsim.experiment import open_executor, start, train
from fedsim.folder import Folder
from fedsim.models import Model, loops, realise
from fedsim.models.factors import Factored, FedPara, LowRank, hadamard_rank, low_rank, numbers
from fedsim.params import Params
from fedsim.problem import Classification, Network, Problem
from fedsim.scenario import load
from fedsim.types import Batch
from fedsim.world import build


def model(name: str, **fields: Any) -> Model:
    return TypeAdapter(Model).validate_python({"name": name, **fields})


def made(spec: Model, shape: tuple[int, ...], outputs: int = 10, key: int = 7) -> tuple[nn.Module, Params]:
    module, w, _ = realise(spec, shape, torch.float32, outputs, None, key, Classification(outputs))
    return module, w


# Sizes


@pytest.mark.parametrize(
    ("classes", "factors", "size"),
    [
        (10, None, 15.25),
        (10, {"name": "fedpara", "ratio": 0.1}, 1.55),
        (100, None, 15.30),
        (100, {"name": "fedpara", "ratio": 0.4}, 4.53),
        (10, {"name": "fedpara", "ratio": 0.1, "rule": "notebook"}, 2.02),  # not what is printed
        (100, {"name": "fedpara", "ratio": 0.4, "rule": "notebook"}, 6.52),
    ],
)
def test_vgg16_has_the_printed_sizes(classes: int, factors: Any, size: float) -> None:
    """In millions, as Flower's baseline prints them for the paper's ratios, convolutions only."""
    _, w = made(model("vgg16-gn", factors=factors), (3, 32, 32), classes)
    assert round(w.size / 1e6, 2) == size


def test_rank_rules_by_hand() -> None:
    """The numbers come from the formulas as they are printed:

    from math import ceil, floor, sqrt
    for O, I, k, r in ((64, 3, 3, .1), (64, 64, 3, .1), (512, 512, 3, .4), (128, 64, 1, .5)):
        note = max(ceil(sqrt((O + I)**2 / (4 * k**4) + r * O * I / 2) - (O + I) / (2 * k**2)), ceil(sqrt(max(O, I))))
        most = floor((-(O + I) + sqrt((O + I)**2 + 2 * O * I * k**4)) / (2 * k**2))
        print(note, ceil((1 - r) * ceil(sqrt(min(O, I))) + r * most))
    for O, I, r in ((128, 3136, .1), (200, 784, .5)):
        most = O * I // (2 * (O + I))
        note = max(ceil(r * O * I / (2 * (O + I))), ceil(sqrt(max(O, I))))
        print(note, ceil((1 - r) * ceil(sqrt(min(O, I))) + r * most))
    """
    convolutions = [((64, 3, 3, 3), 0.1), ((64, 64, 3, 3), 0.1), ((512, 512, 3, 3), 0.4), ((128, 64, 1, 1), 0.5)]
    linear = [((128, 3136), 0.1), ((200, 784), 0.5)]
    notebook = [hadamard_rank(shape, ratio, "notebook") for shape, ratio in convolutions + linear]
    flower = [hadamard_rank(shape, ratio, "flower") for shape, ratio in convolutions + linear]
    assert notebook == NOTEBOOK
    assert flower == FLOWER


NOTEBOOK = [8, 9, 180, 12, 56, 40]
FLOWER = [3, 11, 138, 14, 17, 47]


@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (128, 3136), (32, 9, 5)])
@pytest.mark.parametrize("rule", ["flower", "notebook"])
def test_the_low_rank_baseline_is_as_large_as_it_may_be(shape: tuple[int, ...], rule: Any) -> None:
    budget = 2 * numbers(shape, hadamard_rank(shape, 0.3, rule))
    rank = low_rank(shape, 0.3, rule)
    assert numbers(shape, rank) <= budget < numbers(shape, rank + 1)


def test_a_layer_that_would_not_shrink_stays_dense_and_where_none_does_it_is_an_error() -> None:
    _, w = made(model("cnn", factors={"name": "fedpara", "ratio": 0.2, "rule": "notebook"}), (1, 28, 28))
    assert "conv1.weight" in w  # 288 numbers; its factors would have more
    assert {"conv2.t1", "conv2.x1", "conv2.y1", "conv2.t2", "conv2.x2", "conv2.y2", "conv2.bias"} <= set(w)
    assert "conv2.weight" not in w
    with pytest.raises(ScenarioError, match="no layer of conv1 would be smaller in factors"):
        made(model("cnn", factors={"name": "fedpara", "rule": "notebook", "targets": ("conv1",)}), (1, 28, 28))


# What a layer computes


def explicit(layer: Factored) -> np.ndarray:
    """W, entry by entry, from the definition."""
    f = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    terms = []
    for j in "12":
        x, y = f.get(f"x{j}"), f.get(f"y{j}")
        if x is None or y is None:
            continue
        term = np.zeros(layer.shape)
        for o, i in np.ndindex(*layer.shape[:2]):
            if f"t{j}" in f:
                for a, b in np.ndindex(len(x), len(y)):
                    term[o, i] += f[f"t{j}"][a, b] * x[a, o] * y[b, i]
            else:
                term[o, i] = sum(x[o, a] * y[i, a] for a in range(x.shape[1]))
        terms.append(term)
    if layer.form == "low-rank":
        return terms[0]
    one, two = terms
    return {"plain": one * two, "tanh": np.tanh(one) * np.tanh(two), "personal": one * (two + 1)}[layer.form]


LAYERS = [
    (nn.Linear(7, 5), (4, 7)),
    (nn.Conv1d(3, 4, 5, padding=2, stride=2), (2, 3, 9)),
    (nn.Conv2d(3, 6, (3, 2), padding=1, dilation=2, bias=False), (2, 3, 8, 8)),
]


@pytest.mark.parametrize("form", ["plain", "tanh", "personal", "low-rank"])
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=["linear", "conv1d", "conv2d"])
def test_forward_is_the_layer_with_the_explicit_hadamard_product(layer: Any, shape: tuple[int, ...], form: Any) -> None:
    torch.manual_seed(0)
    factored = Factored(layer.double(), 2, form, "fan-out")
    w, x = torch.from_numpy(explicit(factored)), torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(factored.weight(), w)
    expected = F.linear(x, w, layer.bias) if isinstance(layer, nn.Linear) else layer._conv_forward(x, w, layer.bias)
    torch.testing.assert_close(factored(x), expected)


def test_a_product_of_two_terms_has_rank_r_squared_and_one_term_of_the_same_size_twice_r() -> None:
    torch.manual_seed(0)
    square = nn.Linear(64, 64).double()
    product, single = Factored(square, 6, "plain", "he"), Factored(square, 12, "low-rank", "he")
    assert sum(p.numel() for p in product.parameters()) == sum(p.numel() for p in single.parameters())
    ranks = [torch.linalg.matrix_rank(layer.weight()).item() for layer in (product, single)]
    assert ranks == [36, 12]


SPEC = {"name": "cnn", "channels": (6, 8), "hidden": 20}


@pytest.mark.parametrize("name", ["fedpara", "low-rank"])
def test_stacked_gradients_equal_those_one_by_one_and_the_tape(name: str) -> None:
    spec = model(**SPEC, factors={"name": name, "targets": ("conv2", "fc1"), "ratio": 0.3})
    module, w = made(spec, (1, 8, 8), 3)
    g = torch.Generator().manual_seed(1)
    batch = Batch(torch.randn(3, 5, 1, 8, 8, generator=g), torch.randint(0, 3, (3, 5), generator=g), torch.ones(3, 5))
    stacked = w.map(lambda v: torch.stack([v, v + 0.1, v - 0.1]))
    problem = Problem(Network(module), Classification(3), torch.ones(3))
    together, losses = torch.vmap(problem.grad)(stacked, batch)
    tape = Problem(Network(module), Classification(3), torch.ones(3), taped=True)
    for c in range(3):
        alone = Batch(batch.x[c], batch.y[c], batch.mask[c] if batch.mask is not None else None)
        for each in (problem, tape):
            gradient, loss = each.grad(stacked.map(lambda v, c=c: v[c]), alone)
            assert torch.allclose(loss, losses[c], rtol=1e-5)
            for k in w:
                torch.testing.assert_close(gradient[k], together[k][c], rtol=1e-4, atol=1e-6)
    assert all(float(together[k].abs().max()) > 0 for k in w)
    assert loops(module)  # a factored convolution is one


# How factors start


@pytest.mark.parametrize("form", ["plain", "personal", "low-rank"])
@pytest.mark.parametrize("layer", [nn.Linear(300, 200), nn.Conv2d(64, 96, 3)], ids=["linear", "conv2d"])
def test_he_gives_the_weight_hes_deviation(layer: Any, form: Any) -> None:
    torch.manual_seed(0)
    fan_in = math.prod(layer.weight.shape[1:])
    deviations = [float(Factored(layer, 16, form, "he").weight().detach().std()) for _ in range(8)]
    assert np.mean(deviations) / math.sqrt(2 / fan_in) == pytest.approx(1, abs=0.1)


def test_what_fan_in_and_fan_out_come_to() -> None:
    """Deviation of W at R = 16. A convolution's X [R, out] has fan_in = out and fan_out = R, a linear layer's X [out, R] the reverse, so
    the rules trade places. The variance v of a term, which is W's deviation:

        linear        fan-in R (2/R)^2                        fan-out R (2/out) (2/in)
        convolution   fan-in R^2 (2/(R K)) (2/out) (2/in)     fan-out R^2 (2/(R K)) (2/R)^2
    """
    torch.manual_seed(0)
    for layer, expected in (
        (nn.Linear(300, 200), (4 / 16, 16 * 4 / 60_000)),
        (nn.Conv2d(64, 96, 3), (8 * 16 / (9 * 64 * 96), 8 / (9 * 16))),
    ):
        found = [np.mean([float(Factored(layer, 16, "plain", s).weight().detach().std()) for _ in range(8)]) for s in ("fan-in", "fan-out")]
        assert found == pytest.approx(expected, rel=0.15)


def test_the_start_is_a_function_of_the_key() -> None:
    spec = model("mlp", factors={"name": "fedpara", "targets": ("linear",)})
    first, again, other = (made(spec, (1, 28, 28), key=key)[1] for key in (7, 7, 8))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not any(torch.equal(first[k], other[k]) for k in first)


# What is refused


def test_what_cannot_be_factored_is_refused_with_the_fix() -> None:
    with pytest.raises(ScenarioError, match=r"'convolution' matches no layer.*there are: 1 \(linear\), 3 \(linear\)"):
        made(model("mlp", factors="fedpara"), (1, 28, 28))
    with pytest.raises(ValidationError, match="tanh and personal: choose one"):
        model("mlp", factors={"name": "fedpara", "tanh": True, "personal": True})
    tied = model("python", function=f"{__name__}:tied", factors={"name": "fedpara", "targets": ("linear",)})
    with pytest.raises(ScenarioError, match="the weight of '0' is another layer's, too"):
        made(tied, (40,), 40)


def tied(shape: tuple[int, ...], outputs: int) -> nn.Module:
    module = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40))
    module[2].weight = module[0].weight
    return module


def twice(shape: tuple[int, ...], outputs: int) -> nn.Module:
    layer = nn.Linear(40, 40)
    return nn.Sequential(layer, nn.ReLU(), layer)


def test_a_layer_that_runs_twice_stays_one_layer() -> None:
    module, w = made(model("python", function=f"{__name__}:twice", factors={"name": "fedpara", "targets": ("linear",)}), (40,), 40)
    assert module[0] is module[2]
    assert len(w) == 5


# Training

SCENARIO = """
name: small
data: {source: digits, clients: 4}
model: {name: cnn, channels: [8, 16], factors: {name: FACTORS, targets: [conv2, fc1], ratio: 0.3}}
strategy: {name: STRATEGY, local: {name: LOCAL, lr: 0.1, epochs: 2}}
rounds: 4
evaluate: {every: 4}
engine: {workers: 0}
"""


@pytest.mark.parametrize(("strategy", "local"), [("fedavg", "sgd"), ("fedadam", "sgd"), ("scaffold", "scaffold-sgd"), ("fedvarp", "sgd")])
@pytest.mark.parametrize("factors", ["fedpara", "low-rank"])
def test_any_strategy_trains_factors_and_only_they_are_counted(tmp_path: Any, factors: str, strategy: str, local: str) -> None:
    text = SCENARIO.replace("FACTORS", factors).replace("STRATEGY", strategy).replace("LOCAL", local)
    (tmp_path / "small.yaml").write_text(text)
    scenario, _ = load(tmp_path / "small.yaml")
    world, folder = build(scenario), Folder.create(tmp_path / "run", "small")
    start(scenario, world, folder)
    executor = open_executor(scenario, world)
    rows = list(train(scenario, world, folder, executor))
    executor.close()
    # conv1 80, fc2 1290, biases 144; R = 4 and 12, or 6 and 24: 2 * 4 (24 + 4 * 9) + 2 * 12 * 192, or 6 (24 + 6 * 9) + 24 * 192.
    assert world.w.size == {"fedpara": 6602, "low-rank": 6590}[factors]
    copies = 2 if strategy == "scaffold" else 1
    assert rows[1]["bytes_down"] == rows[1]["bytes_up"] == 4 * copies * 4 * world.w.size
    assert rows[-1]["test.loss"] < rows[0]["test.loss"] - 0.1


def test_a_scenario_says_what_is_wrong_with_its_factors(tmp_path: Any) -> None:
    (tmp_path / "small.yaml").write_text(SCENARIO.replace("FACTORS", "fedpra"))
    with pytest.raises(InvalidScenario, match="fedpara"):
        load(tmp_path / "small.yaml")


def test_the_two_kinds_share_what_they_are_told() -> None:
    assert FedPara().ratio == LowRank().ratio == 0.1
