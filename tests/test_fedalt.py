"""FedAlt, FedSim, local training and Ditto: rounds by hand, what they come to at the ends of the split, and the split itself."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from toy import Listed, Toy, close, path, problem_of, rounds_of

from fedsim import rng
from fedsim.engine import run
from fedsim.errors import FedsimError
from fedsim.fleet import Fleet
from fedsim.local import Adam, Sgd
from fedsim.models.attention import Vit
from fedsim.pace import Sync
from fedsim.params import Params
from fedsim.private import DpSgd
from fedsim.problem import Network
from fedsim.sim.cohort import Trainer
from fedsim.sim.executor import Inline
from fedsim.sim.port import SimPort
from fedsim.split import owned, split
from fedsim.types import Batch
from strategies.ditto import Ditto, DittoSgd
from strategies.fedalt import AlternatingSgd, FedAlt, FedSim
from strategies.fedavg import FedAvg
from strategies.local_only import LocalOnly, OwnSgd

X = [[[1, 2], [0, 1]], [[0, 1], [2, 1], [1, -1]]]
Y = [[1, 2], [0, 3, 1]]
BODY = [[1.0, -1.0], [0.5, 0.25]]
HEAD = [[0.5, 1.0]]


def two_layers() -> Toy:
    """Two clients, and `head.weight @ body.weight @ x` instead of `weight @ x`."""
    toy = problem_of(X, Y)
    make = {"body": nn.Linear(2, 2, bias=False), "head": nn.Linear(2, 1, bias=False)}
    module = nn.Sequential(OrderedDict(make)).double()
    w = Params({"body.weight": torch.tensor(BODY).double(), "head.weight": torch.tensor(HEAD).double()})
    problem = type(toy.problem)(Network(module), toy.problem.task, toy.problem.sizes, version=toy.problem.version)
    return Toy(problem, w, toy.x, toy.y, toy.lists)


def deployed(strategy, toy: Toy, count: int, participation=None, mode: str = "vmap", chunk: int | None = None):
    """The state after `count` rounds, and every client's model."""
    executor = Inline(Trainer(toy.problem, toy.x, toy.y, toy.lists, mode))
    blank = strategy.memory(toy.problem, toy.w)
    fleet = Fleet() if participation is None else Fleet(participation)
    port = SimPort(executor, fleet, None, toy.problem.sizes, blank, chunk, rng.fold(0, rng.FLEET))
    for each in run(strategy, toy.problem, toy.w, port, Sync(), rng.fold(0, 1000)):
        if each.version == count:
            return each.state, [strategy.deploy(each.state, port.memory_of(i)) for i in range(toy.problem.clients)]
    raise AssertionError


def array(w: Params) -> np.ndarray:
    return np.concatenate([w[name].numpy().ravel() for name in sorted(w)])


both_modes = pytest.mark.parametrize("mode", ["vmap", "loop"])


@both_modes
def test_fedalt_two_rounds_the_second_with_one_client_by_hand(mode):
    """The numbers come from

    import numpy as np
    X = [np.array([[1., 2.], [0., 1.]]), np.array([[0., 1.], [2., 1.], [1., -1.]])]
    Y = [np.array([1., 2.]), np.array([0., 3., 1.])]
    def grads(u, v, i):
        e = (X[i] @ u.T @ v.T)[:, 0] - Y[i]
        return v.T @ (e @ X[i])[None] / len(e), (e @ (X[i] @ u.T))[None] / len(e)
    u, v = np.array([[1., -1.], [.5, .25]]), [np.array([[.5, 1.]]) for _ in range(2)]
    lr, own_lr, decay, server_lr = 0.1, 0.2, 0.5, 0.5
    for S in ([0, 1], [1]):
        moves = []
        for i in S:
            for _ in range(2):
                v[i] = v[i] - own_lr * (grads(u, v[i], i)[1] + decay * v[i])
            u_i = u
            for _ in range(2):
                u_i = u_i - lr * grads(u_i, v[i], i)[0]
            moves.append((len(Y[i]), u_i - u))
        u = u + server_lr * sum(n * d for n, d in moves) / sum(n for n, _ in moves)
    print(u.ravel().round(8).tolist(), [x.ravel().round(8).tolist() for x in v])
    """
    program = AlternatingSgd(lr=0.1, personal_lr=0.2, steps=2, batch_size=None, personal_decay=0.5)
    _, (first, second) = deployed(FedAlt(program, own="head", server_lr=0.5), two_layers(), 2, Listed(((0, 1), (1,))), mode)
    body = [1.04754728, -0.96688323, 0.60011953, 0.35294714]
    close(array(first), [*body, -0.05171875, 0.97058594])
    close(array(second), [*body, 0.46660128, 1.01190608])


@both_modes
def test_fedsim_two_rounds_the_second_with_one_client_by_hand(mode):
    """The numbers come from the script above with this loop:

    u, lr, mu = np.array([[1., -1.], [.5, .25]]), 0.1, 0.9
    for S in ([0, 1], [1]):
        moves = []
        for i in S:
            u_i, mu_u, mu_v = u, 0, 0
            for _ in range(2):
                gu, gv = grads(u_i, v[i], i)
                mu_u, mu_v = mu * mu_u + gu, mu * mu_v + gv
                u_i, v[i] = u_i - lr * mu_u, v[i] - lr * mu_v
            moves.append((len(Y[i]), u_i - u))
        u = u + sum(n * d for n, d in moves) / sum(n for n, _ in moves)
    """
    program = Sgd(lr=0.1, momentum=0.9, steps=2, batch_size=None)
    _, (first, second) = deployed(FedSim(program, own="head"), two_layers(), 2, Listed(((0, 1), (1,))), mode)
    body = [1.08464648, -0.8601289, 0.6713295, 0.54347667]
    close(array(first), [*body, 0.15659113, 1.1318175])
    close(array(second), [*body, 0.54329845, 1.18030431])


@both_modes
def test_fine_tuning_of_one_part_by_hand(mode):
    """The numbers come from the script above with this loop:

    u = np.array([[1., -1.], [.5, .25]])
    for i in (0, 1):
        for _ in range(3):
            v[i] = v[i] - 0.2 * (grads(u, v[i], i)[1] + 0.1 * v[i])
    """
    toy = two_layers()
    program = OwnSgd(lr=0.2, steps=3, batch_size=None, weight_decay=0.1)
    state, (first, second) = deployed(LocalOnly(program, own="head"), toy, 1, mode=mode)
    assert torch.equal(state.w["body.weight"], toy.w["body.weight"])
    close(array(first)[4:], [-0.15653638, 1.13426537])
    close(array(second)[4:], [0.52434954, 1.21565223])


@both_modes
def test_ditto_two_rounds_the_first_with_one_client_by_hand(mode):
    """The numbers come from

    import numpy as np
    X, Y = ...                                                                    as above
    g = lambda w, i: X[i].T @ (X[i] @ w - Y[i]) / len(Y[i])
    w, v, lr, own_lr, lam = np.array([1., -1.]), [None, None], 0.1, 0.2, 0.5
    for S in ([0], [0, 1]):
        moves = []
        for i in S:
            v[i] = w if v[i] is None else v[i]
            for _ in range(2):
                v[i] = v[i] - own_lr * (g(v[i], i) + lam * (v[i] - w))
            w_i = w
            for _ in range(2):
                w_i = w_i - lr * g(w_i, i)
            moves.append((len(Y[i]), w_i - w))
        w = w + sum(n * d for n, d in moves) / sum(n for n, _ in moves)
    print(w.round(8).tolist(), [x.round(8).tolist() for x in v])
    """
    program = DittoSgd(lr=0.1, personal_lr=0.2, lam=0.5, steps=2, batch_size=None)
    toy = problem_of(X, Y, w=[1, -1])
    state, (first, second) = deployed(Ditto(program), toy, 2, Listed(((0,), (0, 1))), mode)
    close(array(state.w), [1.23465, -0.1942375])
    close(array(first), [1.16075, 0.15635])
    close(array(second), [1.31781667, -0.17425])
    state, (_, absent) = deployed(Ditto(program), toy, 1, Listed(((0,),)), mode)
    assert torch.equal(absent["weight"], state.w["weight"])  # who has never taken part runs the shared model


def federation() -> Toy:
    """Five clients of sizes 4..8 and three features."""
    random = np.random.default_rng(3)
    xs = [random.normal(size=(4 + i, 3)) for i in range(5)]
    return problem_of(xs, [x @ random.normal(size=3) for x in xs])


SOME = Listed(((0, 1, 3), (2, 4), (0, 2, 3)))
MINI = {"lr": 0.1, "epochs": 2, "batch_size": 3, "momentum": 0.5}


@both_modes
def test_with_nothing_of_ones_own_it_is_fedavg_bit_for_bit(mode):
    expected = path(FedAvg(Sgd(**MINI)), federation(), 3, participation=SOME, mode=mode)
    np.testing.assert_array_equal(path(FedSim(Sgd(**MINI), own=()), federation(), 3, participation=SOME, mode=mode), expected)
    alternating = path(FedAlt(AlternatingSgd(**MINI), own=()), federation(), 3, participation=SOME, mode=mode)
    close(alternating, expected, within=1e-14)  # plain SGD is done in place, which rounds otherwise; that with clipping is not
    fedavg, fedalt = FedAvg(Sgd(**MINI, clip=1e9)), FedAlt(AlternatingSgd(**MINI, clip=1e9), own=())
    np.testing.assert_array_equal(*(path(each, federation(), 3, participation=SOME, mode=mode) for each in (fedalt, fedavg)))


@both_modes
def test_with_everything_of_ones_own_it_is_local_training(mode):
    plain = {"lr": 0.1, "epochs": 2, "batch_size": 3}
    alone, sim = (
        deployed(strategy, federation(), 3, SOME, mode)[1] for strategy in (LocalOnly(OwnSgd(**plain)), FedSim(Sgd(**plain), own=".*"))
    )
    full = {"lr": 0.1, "steps": 3, "batch_size": None}
    whole, alt = (
        deployed(strategy, federation(), 3, SOME, mode)[1]
        for strategy in (LocalOnly(OwnSgd(**full)), FedAlt(AlternatingSgd(**full), own=".*"))
    )
    for i in range(5):
        close(array(sim[i]), array(alone[i]), within=1e-14)
        close(array(alt[i]), array(whole[i]), within=1e-14)
    assert not np.allclose(array(alone[0]), array(alone[1]))


def test_dittos_shared_model_is_fedavgs_and_without_a_pull_its_own_are_local():
    plain = {"lr": 0.1, "epochs": 2, "batch_size": 3}
    ditto = Ditto(DittoSgd(**plain, lam=0.3))
    close(path(ditto, federation(), 3, participation=SOME), path(FedAvg(Sgd(**plain)), federation(), 3, participation=SOME), within=1e-14)
    full = {"lr": 0.1, "steps": 3, "batch_size": None}
    everyone = Listed(((0, 1, 2, 3, 4),))
    free, alone = (
        deployed(strategy, federation(), 4, everyone)[1] for strategy in (Ditto(DittoSgd(**full, lam=0.0)), LocalOnly(OwnSgd(**full)))
    )
    for a, b in zip(free, alone, strict=True):
        close(array(a), array(b), within=1e-14)


def test_what_is_ones_own_does_not_travel_and_who_stays_away_keeps_the_first():
    toy = two_layers()
    program = AlternatingSgd(lr=0.1, steps=1, batch_size=None)
    received = rounds_of(FedAlt(program, own="head"), toy, 1)[0].received
    assert (received.bytes_down, received.bytes_up) == (2 * 4 * 8, 2 * 4 * 8)  # the body of each, in float64
    received = rounds_of(LocalOnly(OwnSgd(steps=1)), toy, 1)[0].received
    assert (received.bytes_down, received.bytes_up) == (0, 0)
    _, (first, second) = deployed(FedAlt(program, own="head"), toy, 1, Listed(((1,),)))
    assert torch.equal(first["head.weight"], toy.w["head.weight"])
    assert not torch.equal(second["head.weight"], toy.w["head.weight"])


def test_a_pull_back_is_towards_where_the_round_began():
    """One step moves by the gradient alone; in the second the pull is mu times that move."""
    toy = two_layers()
    moves = []
    for mu in (0.0, 0.5):
        program = AlternatingSgd(lr=0.1, steps=2, batch_size=None, personal_proximal=mu)
        moves.append(array(deployed(FedAlt(program, own="head"), toy, 1)[1][0])[4:])
    once = array(deployed(FedAlt(AlternatingSgd(lr=0.1, steps=1, batch_size=None), own="head"), toy, 1)[1][0])[4:]
    close(moves[1] - moves[0], -0.1 * 0.5 * (once - HEAD[0]), within=1e-12)


def test_adam_trains_a_split_model_too():
    toy = two_layers()
    state, (first, _) = deployed(FedSim(Adam(lr=0.1, steps=1, batch_size=None), own="head"), toy, 1)
    close(np.abs(array(first)[4:] - HEAD[0]), [0.1, 0.1])  # Adam's first step is lr times the sign
    assert list(state.w) == ["body.weight"]


def test_a_program_that_does_not_know_of_the_split_is_refused():
    for strategy in (FedAlt, FedSim):
        with pytest.raises(ValueError, match="local: dp-sgd does not train what a client's memory holds"):
            strategy(local=DpSgd(noise=1.0))
    with pytest.raises(ValueError, match=r"own: '\(' is no regular expression"):
        FedAlt(own="(")


def test_a_gradient_in_some_parameters_is_that_part_of_the_whole_gradient():
    toy = two_layers()
    batch = Batch(toy.x, toy.y)
    everything, loss = toy.problem.grad(toy.w, batch)
    for own in ("head", "body"):
        rest, mine = split(toy.problem, toy.w, own)
        for taped in (False, True):
            problem = type(toy.problem)(**(vars(toy.problem) | {"taped": taped}))
            g, same = problem.holding(rest).grad(mine, batch)
            assert list(g) == [f"{own}.weight"]
            close(g[f"{own}.weight"].numpy(), everything[f"{own}.weight"].numpy(), within=1e-14)
            assert torch.equal(same, loss)


# The split by name.


def names(own, *there: str) -> tuple[str, ...]:
    toy = two_layers()
    return owned(toy.problem, Params(dict.fromkeys(there or tuple(toy.w), torch.zeros(1))), own)


def test_a_pattern_is_whole_parts_of_a_name():
    there = ("overhead.weight", "head.weight", "layers.3.norm.bias", "layers.30.norm.bias", "layers.4.head2.bias")
    assert names("head", *there) == ("head.weight",)
    assert names(r"layers\.3", *there) == ("layers.3.norm.bias",)
    assert names(r"layers\.\d", *there) == ("layers.3.norm.bias", "layers.4.head2.bias")
    assert names("norm|head", *there) == there[1:4]
    assert names((r"head\d", "norm"), *there) == there[2:]
    assert names(".*", *there) == there
    assert names((), *there) == ()


def test_a_pattern_that_matches_nothing_says_so():
    with pytest.raises(FedsimError, match=r"'head' matches no whole part .* a piece of a word in overhead\.weight, which does not count"):
        names("head", "overhead.weight", "body.weight")
    with pytest.raises(FedsimError, match=r"'tail' matches no whole part of a parameter's name; there are: body\.weight, head\.weight"):
        names("tail")
    with pytest.raises(FedsimError, match="'tail' matches"):
        names(("head", "tail"))
    with pytest.raises(FedsimError, match="the model has no adapters"):
        names("adapters")


def test_layers_and_adapters_have_names_of_their_own():
    assert names("input") == ("body.weight",)
    assert names("output") == ("head.weight",)
    assert names(("input", "output")) == ("body.weight", "head.weight")
    assert names("adapters", "a.lora_A", "a.lora_B", "a.weight", "b.prefix.up.weight", "b.prefixed") == (
        "a.lora_A",
        "a.lora_B",
        "b.prefix.up.weight",
    )
    module = Vit(depth=1).build((1, 8, 8), 3, None)
    problem = type(two_layers().problem)(Network(module), None, torch.ones(2))
    w = Params({name: p.detach() for name, p in module.named_parameters()})
    assert owned(problem, w, "input") == ("embed.weight", "embed.bias")
    assert owned(problem, w, "output") == ("head.weight", "head.bias")
