"""pFedPara: a round by hand, what it is at the ends of the split, and what travels."""

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from test_fedalt import deployed
from torch import nn
from toy import Listed, Toy, close, problem_of

from fedsim.experiment import open_executor, start, train
from fedsim.folder import Folder
from fedsim.local import Sgd
from fedsim.models.factors import Factored
from fedsim.params import Params
from fedsim.problem import Network
from fedsim.scenario import load
from fedsim.split import owned
from fedsim.world import build
from strategies.fedavg import FedAvg
from strategies.fedpara import PFedPara
from strategies.local_only import LocalOnly, OwnSgd

X = [[[1, 2], [0, 1]], [[0, 1], [2, 1], [1, -1]]]
Y = [[1, 2], [0, 3, 1]]
FACTORS = {"x1": [[0.5]], "y1": [[1.0], [-1.0]], "x2": [[0.2]], "y2": [[0.5], [-0.3]]}


def factored() -> Toy:
    """Two clients, and one linear layer of rank 1: `W = x1 y1' (.) (x2 y2' + 1)`, `[1, 2]`."""
    toy = problem_of(X, Y)
    layer = Factored(nn.Linear(2, 1, bias=False).double(), 1, "personal", "he")
    w = Params({f"fc.{name}": torch.tensor(value).double() for name, value in FACTORS.items()})
    network = Network(nn.Sequential(OrderedDict(fc=layer)))
    problem = type(toy.problem)(network, toy.problem.task, toy.problem.sizes, version=toy.problem.version)
    return Toy(problem, w, toy.x, toy.y, toy.lists)


def array(w: Params) -> np.ndarray:
    return np.concatenate([w[f"fc.{name}"].numpy().ravel() for name in FACTORS])


@pytest.mark.parametrize("mode", ["vmap", "loop"])
def test_two_rounds_the_second_with_one_client_by_hand(mode: str) -> None:
    """The numbers come from

    import numpy as np
    X = [np.array([[1., 2.], [0., 1.]]), np.array([[0., 1.], [2., 1.], [1., -1.]])]
    Y = [np.array([1., 2.]), np.array([0., 3., 1.])]
    x1, y1, lr = .5, np.array([1., -1.]), .1
    own = [(.2, np.array([.5, -.3])) for _ in range(2)]
    for S in ([0, 1], [1]):
        sent = []
        for i in S:
            a, b, (c, d) = x1, y1, own[i]
            for _ in range(2):
                w = a * b * (c * d + 1)
                g = X[i].T @ (X[i] @ w - Y[i]) / len(Y[i])
                two = c * d + 1
                a, b, c, d = a - lr * g @ (b * two), b - lr * a * g * two, c - lr * g @ (a * b * d), d - lr * c * g * a * b
            own[i] = c, d
            sent.append((len(Y[i]), a - x1, b - y1))
        n = sum(k for k, *_ in sent)
        x1, y1 = x1 + sum(k * da for k, da, _ in sent) / n, y1 + sum(k * db for k, _, db in sent) / n
        for c, d in own:
            print(np.round([x1, *y1, c, *d], 8).tolist())
    """
    strategy = PFedPara(Sgd(lr=0.1, steps=2, batch_size=None))
    for count, expected in ((1, FIRST), (2, SECOND)):
        _, models = deployed(strategy, factored(), count, Listed(((0, 1), (1,))), mode)
        close([array(model) for model in models], expected)


FIRST = [
    [0.48251646, 1.12757424, -0.86591008, 0.28811878, 0.51197169, -0.34313334],
    [0.48251646, 1.12757424, -0.86591008, 0.31269218, 0.53679252, -0.32283841],
]
SECOND = [
    [0.69124163, 1.28051123, -0.78683846, 0.28811878, 0.51197169, -0.34313334],
    [0.69124163, 1.28051123, -0.78683846, 0.41993259, 0.58766537, -0.34852458],
]


def test_without_a_shared_factor_it_is_local_training() -> None:
    """own: everything. The same numbers as each client by itself, and as each client as the only one of a federation."""
    local = Sgd(lr=0.1, epochs=2, batch_size=2)
    state, models = deployed(PFedPara(local, own=".*"), factored(), 3)
    assert len(state.w) == 0
    _, alone = deployed(LocalOnly(OwnSgd(lr=0.1, epochs=2, batch_size=2)), factored(), 3)
    for a, b in zip(models, alone, strict=True):
        close(array(a), array(b), within=1e-14)
    assert np.abs(array(models[0]) - array(models[1])).max() > 0.01


def test_with_everything_shared_it_is_fedavg() -> None:
    state, models = deployed(PFedPara(Sgd(lr=0.1, epochs=2, batch_size=2), own=()), factored(), 3)
    other, _ = deployed(FedAvg(Sgd(lr=0.1, epochs=2, batch_size=2)), factored(), 3)
    close(array(state.w), array(other.w), within=1e-14)
    close(array(models[0]), array(models[1]), within=0)


SCENARIO = """
name: small
data: {source: digits, clients: 4, client_test: 0.2}
model: {name: cnn, channels: [8, 16], factors: {name: fedpara, targets: [conv2, fc1], ratio: 0.3, personal: true}}
strategy: {name: pfedpara, local: {name: sgd, lr: 0.1, epochs: 2}}
rounds: 3
evaluate: {every: 3, clients: true}
engine: {workers: 0}
"""


def test_second_factors_stay_at_home_and_only_the_rest_travels(tmp_path: Any) -> None:
    (tmp_path / "small.yaml").write_text(SCENARIO)
    scenario, _ = load(tmp_path / "small.yaml")
    world, folder = build(scenario), Folder.create(tmp_path / "run", "small")
    names = owned(world.problem, world.w, PFedPara().own)
    assert names == ("conv2.t2", "conv2.x2", "conv2.y2", "fc1.x2", "fc1.y2")
    start(scenario, world, folder)
    executor = open_executor(scenario, world)
    rows = list(train(scenario, world, folder, executor))
    executor.close()
    shared = world.w.size - sum(world.w[name].numel() for name in names)
    assert rows[1]["bytes_down"] == rows[1]["bytes_up"] == 4 * 4 * shared
    assert rows[-1]["train.loss"] < rows[1]["train.loss"] - 0.1


def test_a_model_without_factors_is_refused_before_anything_trains(tmp_path: Any) -> None:
    (tmp_path / "small.yaml").write_text(
        SCENARIO.replace(", factors: {name: fedpara, targets: [conv2, fc1], ratio: 0.3, personal: true}", "")
    )
    scenario, _ = load(tmp_path / "small.yaml")
    with pytest.raises(Exception, match="matches no whole part of a parameter's name"):
        build(scenario)
