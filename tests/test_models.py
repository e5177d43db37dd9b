"""The zoo: every model on an input that fits, and what `realise` promises and refuses."""

import math
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from fedsim import rng
from fedsim.errors import ScenarioError
from fedsim.models import Dropout, Model, loops, realise, vmappable
from fedsim.params import Params
from fedsim.problem import Classification, MultiLabel, Network, NextToken, Problem, Regression, Task
from fedsim.registry import first_line
from fedsim.types import Batch, Draw

torch.set_num_threads(1)
CLIENTS = 3


@dataclass(frozen=True)
class Row:
    """A model on an input that fits it, and the number of parameters it then has."""

    name: str
    shape: tuple[int, ...]
    outputs: int
    parameters: int
    vocabulary: int | None = None
    spec: tuple[tuple[str, Any], ...] = ()

    @property
    def task(self) -> Task:
        return NextToken(self.outputs) if self.model.per_token else Classification(self.outputs)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.vocabulary is None else torch.int64

    @property
    def model(self) -> Model:
        return TypeAdapter(Model).validate_python({"name": self.name, **dict(self.spec)})

    def realise(self, key: int = 7) -> tuple[nn.Module, Params, dict[str, Draw]]:
        return realise(self.model, self.shape, self.dtype, self.outputs, self.vocabulary, key, self.task)


# A transformer layer has D^2 (4 + 2 e) + D (9 + e) parameters, for width D and expansion e; the other counts are sums over plain layers.
ROWS = [
    Row("logreg", (1, 28, 28), 10, 7_850),
    Row("mlp", (1, 28, 28), 10, 159_010),
    Row("cnn", (1, 28, 28), 10, 421_642),
    Row("lenet5", (1, 28, 28), 10, 61_706),
    Row("pfl-cnn", (3, 32, 32), 10, 1_626_442),
    Row("resnet20-gn", (3, 32, 32), 10, 269_722),
    Row("resnet18-gn", (3, 32, 32), 10, 11_173_962),
    Row("vgg16-gn", (3, 32, 32), 10, 15_253_578),
    Row("cnn1d", (9, 128), 6, 274_822),
    Row("vit", (3, 32, 32), 10, 142_026),
    Row("prefix-vit", (3, 32, 32), 10, 142_026 + 4 * (65 * 40 + 41 * 128)),
    Row("char-transformer", (80,), 90, 116_826, vocabulary=90),
    Row("char-lstm", (80,), 90, 215_082, vocabulary=90),
    Row("text-classifier", (64,), 4, 199_428, vocabulary=2000),
    Row("python", (6,), 3, 21, spec=(("function", f"{__name__}:small_net"), ("args", {"bias": True}))),
]
MORE = [  # other sizes and fields
    Row("cnn", (1, 28, 28), 10, 1_663_370, spec=(("kernel", 5), ("hidden", 512))),  # McMahan et al. 2017
    Row("cnn", (1, 8, 8), 10, 53_002),
    Row("cnn", (3, 32, 32), 10, 545_098),
    Row("lenet5", (3, 32, 32), 10, 62_006),
    Row("resnet20-gn", (1, 8, 8), 10, 269_434, spec=(("groups", 4),)),
    Row("mlp", (5,), 2, 12, spec=(("hidden", ()),)),
    Row("vit", (1, 28, 28), 10, 139_018, spec=(("dropout", 0.1),)),
    Row("prefix-vit", (3, 32, 32), 10, 142_026 + 4 * 65 * 128, spec=(("form", "linear"), ("start", "zero"))),
    Row("char-transformer", (8,), 20, 103_188, vocabulary=20, spec=(("dropout", 0.1),)),
    Row("text-classifier", (8,), 2, 68_994, vocabulary=20, spec=(("dropout", 0.1),)),
    Row("char-lstm", (80,), 90, 822_570, vocabulary=90, spec=(("hidden", 256),)),  # 820,522 in Reddi et al. 2021, with one bias a gate
]
ALL = ROWS + MORE
LARGE = {"resnet18-gn", "vgg16-gn"}  # seconds to make


def called(row: Row) -> str:
    return "-".join([row.name, "x".join(map(str, row.shape)), *(str(k) for k, _ in row.spec)])


def small_net(shape: tuple[int, ...], outputs: int, bias: bool) -> nn.Module:
    """What a user's function looks like."""
    return nn.Linear(shape[0], outputs, bias=bias)


def inputs(row: Row, *lead: int) -> Tensor:
    """Random examples `[*lead, *shape]`."""
    g = torch.Generator().manual_seed(1)
    if row.vocabulary is None:
        return torch.randn(*lead, *row.shape, generator=g)
    return torch.randint(0, row.vocabulary, (*lead, *row.shape), generator=g)


def cohort(row: Row, size: int) -> Batch:
    """A batch for each client, `[C, B, ...]`, with one padded example."""
    x = inputs(row, CLIENTS, size)
    g = torch.Generator().manual_seed(2)
    where = x.shape if isinstance(row.task, NextToken) else (CLIENTS, size)
    mask = torch.ones(CLIENTS, size)
    mask[1, -1] = 0
    return Batch(x, torch.randint(0, row.outputs, where, generator=g), mask)


def draw(draws: dict[str, Draw], key: int) -> dict[str, Tensor]:
    """One uniform tensor a client for each draw, `[C, ...]`."""
    keys = rng.fold_each(key, np.arange(CLIENTS))
    return {name: torch.from_numpy(rng.uniform(rng.fold_each(keys, np.array([i])), d.shape)) for i, (name, d) in enumerate(draws.items())}


def close(a: Params, b: Params) -> None:
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-5), f"{name} differs by {(a[name] - b[name]).abs().max():.1e}"


def test_every_model_has_a_row() -> None:
    assert len(Model.choices) == 16
    assert {row.name for row in ROWS} == set(Model.choices) - {"huggingface"}  # has tests of its own, where that library is
    assert all(first_line(c).endswith(".") for c in Model.choices.values())


@pytest.mark.parametrize("row", ALL, ids=called)
def test_shape_and_parameters(row: Row) -> None:
    module, w, draws = row.realise()
    y = Problem(Network(module), row.task, torch.ones(1), draws).output(w, inputs(row, 2))
    assert list(y.shape) == ([2, row.shape[0], row.outputs] if row.model.per_token else [2, row.outputs])
    assert y.isfinite().all()
    assert w.size == row.parameters
    assert all(not v.requires_grad for v in w.values())


SMALL = Row("resnet18-gn", (3, 8, 8), 10, 11_173_962)  # its gradients for three clients on 32 x 32 would take seconds
BATCHED = [SMALL if r.name == SMALL.name else r for r in ROWS if r.name != "char-lstm"] + [r for r in MORE if ("dropout", 0.1) in r.spec]


@pytest.mark.parametrize("row", BATCHED, ids=called)
def test_vmapped_clients_equal_a_loop(row: Row) -> None:
    """Three clients with different weights, batches and masks: stacked under vmap, and one by one on the tape."""
    module, w, draws = row.realise()
    assert vmappable(module)
    stack = Params({k: torch.stack([v * (1 + 0.1 * c) for c in range(CLIENTS)]) for k, v in w.items()})
    problem = Problem(Network(module), row.task, torch.ones(CLIENTS), draws)
    batch, numbers = cohort(row, 2), draw(problem.draws(2), 5)
    together, loss = torch.vmap(problem.grad)(stack, batch, numbers)
    taped = Problem(Network(module), row.task, torch.ones(CLIENTS), draws, taped=True)
    for c in range(CLIENTS):
        one = Batch(batch.x[c], batch.y[c], batch.mask[c])
        g, alone = taped.grad(stack.map(lambda v, c=c: v[c]), one, {k: u[c] for k, u in numbers.items()})
        torch.testing.assert_close(loss[c], alone, rtol=1e-5, atol=1e-5)
        close(together.map(lambda v, c=c: v[c]), g)


def test_lstm_differentiates_both_ways() -> None:
    """The fused kernel sees the weights it is given, not those it was built with: both gradients agree with a finite difference."""
    row = Row("char-lstm", (6,), 5, 0, vocabulary=5, spec=(("hidden", 4),))
    module, w, _ = row.realise()
    w = 2.0 * w
    batch = cohort(row, 2)
    one = Batch(batch.x[0], batch.y[0], batch.mask[0])
    taped, _ = Problem(Network(module), row.task, torch.ones(1), taped=True).grad(w, one)
    problem = Problem(Network(module), row.task, torch.ones(1))
    g, _ = problem.grad(w, one)
    close(taped, g)
    there, back = problem.loss(w + 1e-2 * g, one), problem.loss(w - 1e-2 * g, one)
    torch.testing.assert_close((there - back) / 2e-2, g.dot(g), rtol=1e-2, atol=1e-5)


def test_execution_hints() -> None:
    built = {row.name: row.realise()[0] for row in ROWS if row.name not in LARGE}
    assert {n for n, m in built.items() if loops(m)} == {"cnn", "lenet5", "pfl-cnn", "resnet20-gn", "cnn1d", "char-lstm"}
    assert {n for n, m in built.items() if not vmappable(m)} == {"char-lstm"}


@pytest.mark.parametrize("row", [r for r in ROWS if r.name not in LARGE], ids=called)
def test_weights_are_a_function_of_the_key(row: Row) -> None:
    torch.manual_seed(3)
    _, w, _ = row.realise(rng.fold(1, rng.MODEL))
    torch.rand(5)
    before = torch.get_rng_state()
    _, again, _ = row.realise(rng.fold(1, rng.MODEL))
    assert torch.equal(torch.get_rng_state(), before)
    _, other, _ = row.realise(rng.fold(2, rng.MODEL))
    assert all(torch.equal(w[k], again[k]) for k in w)
    assert any(not torch.equal(w[k], other[k]) for k in w)


@pytest.mark.parametrize("row", [r for r in ALL if r.name not in LARGE], ids=called)
def test_module_pickles(row: Row) -> None:
    module, w, draws = row.realise()
    copy, w2, draws2 = pickle.loads(pickle.dumps((module, w, draws)))
    x = inputs(row, 2)
    assert draws2 == draws
    assert torch.equal(torch.func.functional_call(copy, dict(w2), (x,)), torch.func.functional_call(module, dict(w), (x,)))
    assert not any(part.training for part in copy.modules() if not isinstance(part, nn.RNNBase))


# dropout


class Dropped(nn.Module):
    """A network with each kind of dropout: `[B, 3, 8, 8] -> [B, 4]`."""

    def __init__(self, reuse: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.drop1 = nn.Dropout2d(0.25)
        self.fc = nn.Linear(6 * 6 * 6, 4)
        self.drop2 = nn.Dropout(0.5)
        self.never = nn.Dropout(0.0)
        self.reuse = reuse

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop1(self.conv(x)).flatten(1)
        if self.reuse:
            h = self.drop2(h)
        return self.fc(self.never(self.drop2(h)))


@dataclass(frozen=True)
class Given(Model):
    """Gives the network that `make` makes: what `python` does, without a module to import from."""

    registered_name = "given"
    make: Any

    def build(self, shape: tuple[int, ...], outputs: int, vocabulary: int | None) -> nn.Module:
        return self.make()


IMAGE = ((3, 8, 8), torch.float32, 4, None, 1, Classification(4))


def test_draws_name_the_buffers() -> None:
    module, _, draws = realise(Given(Dropped), *IMAGE)
    assert draws == {"drop1.uniform": Draw("uniform", (6, 1, 1)), "drop2.uniform": Draw("uniform", (216,))}
    assert {name for name, _ in module.named_buffers()} >= set(draws)
    assert not any(isinstance(part, (nn.Dropout, nn.Dropout2d)) for part in module.modules())
    assert not module.state_dict().keys() & set(draws)


def test_dropout_keeps_the_mean_and_is_off_in_evaluation() -> None:
    layer = Dropout(0.25)
    x = torch.rand(200, 500) + 1
    u = torch.from_numpy(rng.uniform(rng.fold_each(0, np.arange(200)), (500,)))
    y = torch.func.functional_call(layer, {"uniform": u}, (x,))
    assert torch.equal(layer(x), x)
    # A kept entry is x / 0.75: the variance of one is x^2 / 3 < 4 / 3, so of the mean of 10^5 under 1.34e-5: 5 sigma is 0.019.
    assert abs(y.mean() - x.mean()) < 0.019
    assert abs((y == 0).float().mean() - 0.25) < 0.007  # 5 sigma
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.75)


@pytest.mark.parametrize("model", [Given(Dropped), TypeAdapter(Model).validate_python("pfl-cnn")], ids=["each kind", "pfl-cnn"])
def test_dropout_vmapped_equals_looped(model: Model) -> None:
    module, w, draws = realise(model, *IMAGE)
    problem = Problem(Network(module), Classification(4), torch.ones(CLIENTS), draws)
    x = torch.randn(CLIENTS, 5, 3, 8, 8)
    numbers = draw(problem.draws(5), 3)
    together = torch.vmap(problem.output, in_dims=(None, 0, 0))(w, x, numbers)
    alone = torch.stack([problem.output(w, x[c], {k: u[c] for k, u in numbers.items()}) for c in range(CLIENTS)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(alone[0], problem.output(w, x[0]))
    other = problem.output(w, x[0], {k: u[1] for k, u in numbers.items()})
    assert not torch.allclose(alone[0], other)


def test_dropout_does_not_read_the_global_generator() -> None:
    module, w, draws = realise(Given(Dropped), *IMAGE)
    problem = Problem(Network(module), Classification(4), torch.ones(CLIENTS), draws)
    numbers = {k: u[0] for k, u in draw(problem.draws(2), 3).items()}
    x = torch.randn(2, 3, 8, 8)
    state = torch.get_rng_state()
    a = problem.output(w, x, numbers)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, problem.output(w, x, numbers))


# refusals


def head(*layers: nn.Module) -> nn.Module:
    """Layers on features `[B, 8]`, then 4 outputs."""
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 4))


class Looks(nn.Module):
    """A network whose forward is a function that a test gives."""

    def __init__(self, forward: Any, **parts: nn.Module) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)
        self.f = forward
        self.register_buffer("seen", torch.zeros(()))
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.f(self, x)


class Wrapped(nn.Module):
    """A layer on one-step sequences `[B, 1, 8]`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]
        y = self.inner(x, x, x) if isinstance(self.inner, nn.MultiheadAttention) else self.inner(x)
        return self.fc((y[0] if isinstance(y, tuple) else y)[:, 0])


def counting(self: Any, x: Tensor) -> Tensor:
    self.seen += 1
    return self.fc(x)


def frozen() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.bias.requires_grad_(False)
    return head(layer)


REFUSED = {
    "batch norm": (lambda: head(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))), ["'0.1' (BatchNorm1d)", "GroupNorm"]),
    "instance norm": (
        lambda: head(nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, track_running_stats=True)),
        ["'1' (InstanceNorm1d)", "track_running_stats=False"],
    ),
    "attention dropout": (lambda: Wrapped(nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)), ["'inner' (Multihead", "dropout=0"]),
    "lstm dropout": (lambda: Wrapped(nn.LSTM(8, 8, 2, dropout=0.1, batch_first=True)), ["'inner' (LSTM)", "dropout=0"]),
    "encoder dropout": (
        lambda: Wrapped(nn.TransformerEncoderLayer(8, 2, 8, dropout=0.1, batch_first=True)),
        ["'inner' (TransformerEncoderLayer)", "dropout=0"],
    ),
    "functional dropout": (lambda: Looks(lambda s, x: s.fc(nn.functional.dropout(x, 0.5, s.training))), ["(Looks)", "nn.Dropout"]),
    "another dropout": (lambda: head(nn.Linear(8, 8), nn.AlphaDropout(0.2)), ["'1' (AlphaDropout)", "nn.Dropout"]),
    "no parameters": (lambda: nn.AvgPool1d(2), ["(AvgPool1d) has no parameters", "nn.Linear"]),
    "frozen parameter": (frozen, ["'0.bias'", "register_buffer"]),
    "too many outputs": (lambda: nn.Linear(8, 5), ["into [2, 5]", "[2, 4]", "4 outputs"]),
    "not a tensor": (lambda: Looks(lambda s, x: (s.fc(x), x)), ["returns tuple", "[2, 4]"]),
    "wrong input": (lambda: nn.Linear(9, 4), ["[2, 8] of float32", "RuntimeError", "fit this shape"]),
    "changing buffer": (lambda: Looks(counting), ["'seen'", "parameters"]),
    "looks at training": (lambda: Looks(lambda s, x: s.fc(x) * (2 if s.training else 1)), ["training mode", "self.training"]),
    "shared dropout": (
        lambda: Looks(lambda s, x: s.drop(s.fc(s.drop(x))), drop=nn.Dropout(0.1)),
        ["'drop' runs more than once", "each place its own"],
    ),
    "dropout without batch": (lambda: Looks(lambda s, x: s.fc(s.drop(x.T).T), drop=nn.Dropout(0.1)), ["'drop' sees [8, 2]", "batch first"]),
    "certain dropout": (lambda: head(nn.Dropout(1.0)), ["below 1, not 1.0"]),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_refusals_name_the_layer_and_the_fix(case: str) -> None:
    make, words = REFUSED[case]
    with pytest.raises(ScenarioError) as caught:
        realise(Given(make), (8,), torch.float32, 4, None, 1, Classification(4))
    assert caught.value.field == "model"
    for word in words:
        assert word in caught.value.message, caught.value.message


def test_fused_layers_without_dropout_are_accepted() -> None:
    for inner in (nn.MultiheadAttention(8, 2, batch_first=True), nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)):
        module, w, draws = realise(Given(lambda inner=inner: Wrapped(inner)), (8,), torch.float32, 4, None, 1, Classification(4))
        assert loops(module)
        assert not draws
        assert w.size > 0


def test_other_tasks_and_dtypes() -> None:
    for task in (Regression(2), MultiLabel(2)):
        module, w, _ = realise(TypeAdapter(Model).validate_python("mlp"), (5,), torch.float64, 2, None, 1, task)
        assert module(torch.zeros(1, 5, dtype=torch.float64)).shape == (1, 2)
        assert all(v.dtype == torch.float64 for v in w.values())


def test_lazy_layers_get_their_shape_and_keyed_weights() -> None:
    made = [realise(Given(lambda: nn.LazyLinear(4)), (8,), torch.float32, 4, None, 1, Classification(4))[1] for _ in range(2)]
    assert made[0]["weight"].shape == (4, 8)
    assert torch.equal(made[0]["weight"], made[1]["weight"])


MISFITS: list[tuple[Any, tuple[int, ...], int | None, Task, str, list[str]]] = [
    ("cnn", (20,), 50, Classification(4), "model", ["'cnn' reads image", "tokens [20]", "models for tokens: text-classifier"]),
    ("cnn", (20,), 50, NextToken(50), "model", ["NextToken needs an answer at each position", "char-lstm, char-transformer"]),
    ("cnn", (9, 128), None, Classification(4), "model", ["signal [9, 128]", "cnn1d, logreg, mlp"]),
    ("cnn1d", (1, 28, 28), None, Classification(4), "model", ["image [1, 28, 28]", "lenet5", "vit"]),
    ("mlp", (20,), 50, Classification(4), "model", ["models for tokens: text-classifier"]),
    ("text-classifier", (6,), None, Classification(4), "model", ["features [6]", "logreg, mlp"]),
    ("char-lstm", (20,), 50, Classification(4), "model", ["Classification needs an answer once", "text-classifier"]),
    ("mlp", (2, 3, 4, 5), None, Classification(4), "model", ["array", "'python'"]),
    ("lenet5", (1, 8, 8), None, Classification(4), "model", ["at least 12 x 12 pixels", "logreg"]),
    ({"name": "vit", "patch": 5}, (1, 28, 28), None, Classification(4), "model.patch", ["28 x 28", "divides both"]),
    ({"name": "vit", "heads": 5}, (1, 28, 28), None, Classification(4), "model.heads", ["dim 64", "5 equal heads"]),
    ({"name": "resnet20-gn", "groups": 3}, (1, 28, 28), None, Classification(4), "model.groups", ["16 channels"]),
    ({"name": "cnn", "kernel": 4}, (1, 28, 28), None, Classification(4), "model.kernel", ["such as 5"]),
]


@pytest.mark.parametrize(("spec", "shape", "vocabulary", "task", "field", "words"), MISFITS, ids=str)
def test_misfits_say_what_fits(spec: Any, shape: tuple[int, ...], vocabulary: int | None, task: Task, field: str, words: list[str]) -> None:
    model = TypeAdapter(Model).validate_python(spec)
    dtype = torch.float32 if vocabulary is None else torch.int64
    with pytest.raises(ScenarioError) as caught:
        realise(model, shape, dtype, task.outputs, vocabulary, 1, task)
    assert caught.value.field == field
    for word in words:
        assert word in caught.value.message, caught.value.message


def test_smallest_images_work() -> None:
    for name, side in (("cnn", 4), ("lenet5", 12), ("pfl-cnn", 6), ("resnet20-gn", 4), ("resnet18-gn", 8), ("vgg16-gn", 32), ("vit", 4)):
        Row(name, (1, side, side), 2, 0).realise()
    Row("cnn1d", (1, 4), 2, 0).realise()


# what makes the text models right


def test_padding_does_not_change_an_answer() -> None:
    row = Row("text-classifier", (8,), 3, 0, vocabulary=20)
    module, w, draws = row.realise()
    problem = Problem(Network(module), row.task, torch.ones(1), draws)
    text = torch.tensor([[3, 4, 5, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(problem.output(w, text[:, :3]), problem.output(w, text))
    nothing = torch.zeros(1, 8, dtype=torch.int64)
    assert problem.output(w, nothing).isfinite().all()
    g, _ = problem.grad(w, Batch(nothing, torch.zeros(1, dtype=torch.int64), torch.ones(1)))
    assert all(v.isfinite().all() for v in g.values())


@pytest.mark.parametrize("name", ["char-transformer", "char-lstm"])
def test_the_future_does_not_change_the_past(name: str) -> None:
    row = Row(name, (8,), 20, 0, vocabulary=20)
    module, w, draws = row.realise()
    problem = Problem(Network(module), row.task, torch.ones(1), draws)
    a = inputs(row, 2)
    b = a.clone()
    b[:, 5:] = (b[:, 5:] + 1) % 20
    ya, yb = problem.output(w, a), problem.output(w, b)
    torch.testing.assert_close(ya[:, :5], yb[:, :5])
    assert not torch.allclose(ya[:, 5:], yb[:, 5:])


def test_attention_agrees_with_torch() -> None:
    from fedsim.models.attention import Attention

    torch.manual_seed(0)
    ours, theirs = Attention(12, 3), nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
    x = torch.randn(2, 5, 12)
    blocked = torch.ones(5, 5, dtype=torch.bool).triu(1)
    torch.testing.assert_close(ours(x, blocked), theirs(x, x, x, attn_mask=blocked, need_weights=False)[0])


def test_vit_cuts_patches_in_order() -> None:
    """With an embedding that copies, the first token after the class token is the upper left patch."""
    row = Row("vit", (1, 4, 4), 2, 0, spec=(("patch", 2), ("dim", 4), ("heads", 1), ("depth", 1)))
    module, _, _ = row.realise()
    with torch.no_grad():
        module.embed.weight.copy_(torch.eye(4))  # type: ignore[union-attr, operator]
        module.embed.bias.zero_()  # type: ignore[union-attr, operator]
    seen: list[Tensor] = []
    module.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[union-attr]
    module(torch.arange(16.0).view(1, 1, 4, 4))
    assert seen[0][0, 1:].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


# models from Python


def with_vocabulary(shape: tuple[int, ...], outputs: int, vocabulary: int) -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(vocabulary, 4), nn.Linear(4, outputs))


def broken(shape: tuple[int, ...], outputs: int) -> nn.Module:
    raise ValueError("too few layers")


def not_a_module(shape: tuple[int, ...], outputs: int) -> int:
    return math.prod(shape)


def test_python_model_gets_the_vocabulary() -> None:
    row = Row("python", (6,), 3, 0, vocabulary=11, spec=(("function", f"{__name__}:with_vocabulary"),))
    module, _, _ = row.realise()
    assert module[0].num_embeddings == 11  # type: ignore[index]


@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        ({"function": "small_net"}, "model.function", ["'module:function'"]),
        ({"function": "no_such_module:net"}, "model.function", ["no_such_module", "PYTHONPATH"]),
        ({"function": f"{__name__}:smal_net"}, "model.function", ["did you mean 'small_net'"]),
        ({"function": f"{__name__}:small_net"}, "model.args", ["missing a required argument: 'bias'"]),
        ({"function": f"{__name__}:small_net", "args": {"width": 3}}, "model.args", ["small_net(shape", "width"]),
        ({"function": f"{__name__}:broken"}, "model.function", ["ValueError: too few layers"]),
        ({"function": f"{__name__}:not_a_module"}, "model.function", ["returns int", "torch.nn.Module"]),
    ],
    ids=str,
)
def test_python_model_errors(spec: dict[str, Any], field: str, words: list[str]) -> None:
    model = TypeAdapter(Model).validate_python({"name": "python", **spec})
    with pytest.raises(ScenarioError) as caught:
        realise(model, (6,), torch.float32, 3, None, 1, Classification(3))
    assert caught.value.field == field
    for word in words:
        assert word in caught.value.message, caught.value.message


def test_fields_are_validated() -> None:
    for spec in ({"name": "mlp", "hidden": [0]}, {"name": "mlp", "width": 3}, {"name": "vit", "dropout": 1.0}, {"name": "resnet99"}):
        with pytest.raises(ValidationError):
            TypeAdapter(Model).validate_python(spec)
    assert "resnet18-gn" in str(TypeAdapter(Model).json_schema())
