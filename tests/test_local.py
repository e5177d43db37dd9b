"""The client programs that everyone shares, by hand and against torch.optim, and the schedules of their rates."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from toy import Listed, close, path, problem_of

from fedsim.local import Adam, Constant, Cosine, Exponential, InverseSqrt, Sgd, StepDecay, clip
from fedsim.params import Params
from fedsim.strategy import NOTHING
from fedsim.types import Batch
from strategies.fedavg import FedAvg

X, Y = [[0, 1], [2, 1], [1, -1]], [0, 3, 1]
SGD = Sgd(lr=0.1, steps=3, batch_size=None)


def train(program, rounds=2, **more):
    """The models of a lone client after each round of full-batch steps, `[rounds, 2]`: what the program does and nothing else."""
    return path(FedAvg(program), problem_of([X], [Y], w=[1, -1]), rounds, **more)


@pytest.mark.parametrize("mode", ["vmap", "loop"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[1.24074074, -0.64762963], [1.35425182, -0.40782076]]),
        ({"momentum": 0.9}, [[1.46374074, -0.32962963], [1.45782082, -0.06831946]]),
        ({"momentum": 0.9, "nesterov": True}, [[1.53923074, -0.14234163], [1.41786115, 0.06438346]]),
        ({"weight_decay": 0.5}, [[1.10381019, -0.53256019], [1.12277629, -0.25113517]]),
        ({"clip": 0.4}, [[1.07098704, -0.90325411], [1.13860986, -0.80412953]]),
        ({"proximal": 2.0}, [[1.19318519, -0.71562963], [1.30424807, -0.50443613]]),
        ({"schedule": Exponential(0.5)}, [[1.24074074, -0.64762963], [1.30494277, -0.52030229]]),
        (
            {"momentum": 0.9, "nesterov": True, "weight_decay": 0.5, "clip": 0.4, "proximal": 2.0, "schedule": Exponential(0.5)},
            [[0.88173138, -0.59986156], [0.83739062, -0.41976898]],
        ),
    ],
    ids=["plain", "momentum", "nesterov", "weight decay", "clip", "proximal", "schedule", "all together"],
)
def test_two_rounds_of_three_sgd_steps_by_hand(options, expected, mode):
    """Momentum starts anew in the second round; clipping comes before decay and proximal term. The numbers come from

    import numpy as np
    x, y = np.array([[0., 1.], [2., 1.], [1., -1.]]), np.array([0., 3., 1.])
    def sgd(momentum=0, nesterov=False, decay=0, clip=None, mu=0, factor=lambda t: 1):
        w, after = np.array([1., -1.]), []
        for t in range(2):
            received, v = w, 0
            for _ in range(3):
                g = x.T @ (x @ w - y) / 3
                if clip:
                    g = g * min(1, clip / np.linalg.norm(g))
                g = g + decay * w + mu * (w - received)
                v = momentum * v + g
                w = w - 0.1 * factor(t) * (g + momentum * v if nesterov else v)
            after.append(w.round(8).tolist())
        return after
    print(sgd())
    print(sgd(momentum=0.9))
    print(sgd(momentum=0.9, nesterov=True))
    print(sgd(decay=0.5))
    print(sgd(clip=0.4))
    print(sgd(mu=2))
    print(sgd(factor=lambda t: 0.5**t))
    print(sgd(momentum=0.9, nesterov=True, decay=0.5, clip=0.4, mu=2, factor=lambda t: 0.5**t))
    """
    close(train(replace(SGD, **options), mode=mode), expected)


def by_torch(make, rounds=2, steps=3, change=lambda g, w, received: g, factors=(1, 1)):
    """The same models from an optimiser of torch, `make(parameters, factor)`, which is new in every round."""
    w = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    x, y, after = torch.tensor(X).double(), torch.tensor(Y).double(), []
    for t in range(rounds):
        received, optimiser = w.detach().clone(), make([w], factors[t])
        for _ in range(steps):
            g = x.T @ (x @ w.detach() - y) / len(y)
            w.grad = change(g, w.detach(), received)
            optimiser.step()
        after.append(w.detach().clone().numpy())
    return np.stack(after)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"weight_decay": 0.5, "momentum": 0.3}])
def test_sgd_is_torchs(options):
    close(train(replace(SGD, **options)), by_torch(lambda p, f: torch.optim.SGD(p, lr=0.1, **options)), within=1e-14)


@pytest.mark.parametrize("mode", ["vmap", "loop"])
@pytest.mark.parametrize("options", [{}, {"beta1": 0.5, "beta2": 0.7, "eps": 0.1}, {"beta1": 0.0}, {"weight_decay": 0.3}], ids=str)
def test_adam_is_torchs(options, mode):
    def make(parameters, factor):
        betas = (options.get("beta1", 0.9), options.get("beta2", 0.999))
        return torch.optim.Adam(parameters, 0.1, betas, options.get("eps", 1e-8), options.get("weight_decay", 0))

    close(train(Adam(lr=0.1, steps=3, batch_size=None, **options), mode=mode), by_torch(make), within=1e-12)


@pytest.mark.parametrize("mode", ["vmap", "loop"])
def test_adam_with_decoupled_decay_is_torchs_adamw_also_under_a_schedule(mode):
    """The schedule's factor scales the decay as well, as torch's learning rate does."""
    program = Adam(lr=0.1, steps=3, batch_size=None, weight_decay=0.3, decoupled=True, schedule=Exponential(0.5))
    expected = by_torch(lambda p, factor: torch.optim.AdamW(p, 0.1 * factor, weight_decay=0.3), factors=(1, 0.5))
    close(train(program, mode=mode), expected, within=1e-12)


def test_adam_decoupled_and_coupled_decay_differ():
    coupled, decoupled = (train(Adam(lr=0.1, steps=3, batch_size=None, weight_decay=0.3, decoupled=d)) for d in (False, True))
    assert np.abs(coupled - decoupled).min() > 0.01


def test_adams_proximal_term_and_clipping_change_the_gradient_it_sees():
    def change(g, w, received):
        return g * min(1, 0.4 / g.norm()) + 2 * (w - received)

    program = Adam(lr=0.1, steps=3, batch_size=None, clip=0.4, proximal=2.0, eps=0.1)
    close(train(program), by_torch(lambda p, f: torch.optim.Adam(p, 0.1, eps=0.1), change=change), within=1e-12)


@dataclass(frozen=True)
class Stepwise(Sgd):
    """SGD that does not say that it is a plain descent."""

    def descent(self, problem):
        return None


@pytest.mark.parametrize(
    "options",
    [
        {"nesterov": True},
        {"momentum": 1e-300},
        {"momentum": 1e-300, "nesterov": True},
        {"proximal": 1e-300},
        {"weight_decay": 1e-300},
        {"clip": 1e300},
    ],
    ids=str,
)
def test_an_option_too_small_to_matter_is_the_option_left_out_to_the_bit(options):
    stepped = Stepwise(**vars(SGD))  # whichever options are set, the program's own `step` runs
    assert (train(replace(stepped, **options)) == train(stepped)).all()


@pytest.mark.parametrize("mode", ["vmap", "loop"])
@pytest.mark.parametrize("program", [Sgd(lr=0.1, momentum=0.9, weight_decay=0.5), Adam(lr=0.1)])
def test_a_client_with_fewer_steps_than_its_neighbours_ends_as_it_would_alone(program, mode):
    """Padded steps would move momentum, decay and Adam's clock. One, two and three steps in one chunk of three clients."""
    program = replace(program, epochs=1, batch_size=1)
    toy = problem_of([X[:1], X[:2], X], [Y[:1], Y[:2], Y], w=[1, -1])
    strategy = FedAvg(program, weights="uniform")
    together = path(strategy, toy, 1, mode=mode, chunk=3)
    alone = [path(strategy, toy, 1, participation=Listed(((i,),)), mode=mode) for i in range(3)]
    close(together, np.mean(alone, axis=0), within=1e-14)


def test_a_partial_last_batch_is_averaged_over_its_own_examples():
    """Of three copies of one example any batch has the same mean gradient, so batches of 2 and 1 are two full-batch steps."""
    toy = problem_of([[[1, 2]] * 3], [[5] * 3])
    partial, full = (path(FedAvg(p), toy, 1) for p in (Sgd(lr=0.1, batch_size=2), Sgd(lr=0.1, batch_size=None, steps=2)))
    close(partial, full, within=1e-14)


def test_steps_may_end_in_the_middle_of_an_epoch_and_run_into_the_next():
    toy = problem_of([[[1, 2]] * 3], [[5] * 3])
    for steps in (1, 3, 5):
        part, full = (path(FedAvg(Sgd(lr=0.1, batch_size=b, steps=steps)), toy, 1) for b in (2, None))
        close(part, full, within=1e-14)


def test_the_reply_is_the_models_change_and_the_mean_loss_along_the_way():
    """Two steps of rate 0.5 on 0.5 (w - 4)^2 and 0.5 (w - 2)^2 at once: w = 0, 1.5, 2.25; mean losses 5, 1.625."""
    toy = problem_of([[[1], [1]]], [[4, 2]])
    batch = Batch(toy.x, toy.y, torch.ones(2, dtype=torch.float64))
    program = Sgd(lr=0.5)
    carry = program.begin(toy.problem, toy.w, NOTHING)
    for _ in range(2):
        carry = program.step(toy.problem, carry, batch, {}, "train")
    reply = program.finish(toy.problem, toy.w, carry, torch.tensor(2.0))
    assert reply.payload["weight"].item() == 2.25
    assert [float(v) for v in reply.metrics["loss"]] == [2 * 5 + 2 * 1.625, 4]
    assert reply.memory == {}


def test_padding_in_a_batch_changes_neither_gradient_nor_loss():
    toy = problem_of([[[1], [1]]], [[4, 2]])
    x, y, mask = (torch.tensor(v, dtype=torch.float64) for v in ([[1], [1], [7]], [[4], [2], [-9]], [1, 1, 0]))
    carry = Sgd().begin(toy.problem, toy.w, NOTHING)
    steps = [Sgd(lr=0.5).step(toy.problem, carry, b, {}, "train") for b in (Batch(x, y, mask), Batch(x[:2], y[:2], mask[:2]))]
    assert [s.w["weight"].item() for s in steps] == [1.5, 1.5]
    assert [s.seen.item() for s in steps] == [2, 2]
    assert [s.loss.item() for s in steps] == [10, 10]


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (Constant(), {0: 1, 1: 1, 1000: 1}),
        (Exponential(0.5), {0: 1, 1: 0.5, 2: 0.25, 10: 2**-10}),
        (Exponential(1.0), {0: 1, 7: 1}),
        (StepDecay(every=3, decay=0.5), {0: 1, 2: 1, 3: 0.5, 5: 0.5, 6: 0.25, 30: 2**-10}),
        (StepDecay(every=1, decay=0.1), {0: 1, 1: 0.1, 2: 0.01}),
        (Cosine(rounds=4, floor=0.2), {0: 1, 1: 0.6 + 0.4 * math.sqrt(0.5), 2: 0.6, 3: 0.6 - 0.4 * math.sqrt(0.5), 4: 0.2, 9: 0.2}),
        (Cosine(rounds=3), {0: 1, 1: 0.75, 2: 0.25, 3: 0, 100: 0}),
        (InverseSqrt(scale=3), {0: 1, 1: math.sqrt(0.75), 9: 0.5, 45: 0.25}),
    ],
    ids=str,
)
def test_schedules_by_hand(schedule, factors):
    for version, expected in factors.items():
        factor = torch.as_tensor(schedule.factor(torch.tensor(version, dtype=torch.float64)), dtype=torch.float64)
        assert factor.shape == ()
        assert factor.item() == pytest.approx(expected, abs=1e-15, rel=1e-14), version


@pytest.mark.parametrize("every", [3, 10, 41, 83])
def test_a_step_falls_exactly_at_its_round_in_float32(every):
    """41 * (1 / 41) is below 1 in float32."""
    for k in range(1, 60):
        before, at = (StepDecay(every, 0.5).factor(torch.tensor(float(v))).item() for v in (k * every - 1, k * every))
        assert at < 0.75 * before, k * every


def test_the_rate_of_a_round_is_that_of_its_version_and_not_of_its_step():
    """Three steps in round t = 0, 1, 2, all at lr 2^-t: checked against the recursion w - b <- (I - r H)(w - b)."""
    x = np.array(X, float)
    h, optimum, w, expected = x.T @ x / 3, np.linalg.lstsq(x, np.array(Y, float))[0], np.array([1.0, -1.0]), []
    for t in range(3):
        w = optimum + np.linalg.matrix_power(np.eye(2) - 0.1 * 2.0**-t * h, 3) @ (w - optimum)
        expected.append(w)
    close(train(replace(SGD, schedule=Exponential(0.5)), rounds=3), expected, within=1e-14)


def params(**tensors):
    return Params({k: torch.tensor(v, dtype=torch.float64) for k, v in tensors.items()})


def test_clipping_keeps_the_direction_and_bounds_the_length_over_all_names():
    g = params(a=[3.0, 0.0], b=[[0.0], [4.0]])
    clipped = clip(g, 2.5)
    assert clipped["a"].tolist() == [1.5, 0]
    assert clipped["b"].tolist() == [[0], [2]]
    for limit in (5.0, 5.1, None):
        assert clip(g, limit)["b"].tolist() == [[0], [4]]


def test_clipping_a_zero_gradient_gives_zero():
    assert clip(params(a=[0.0, 0.0]), 1.0)["a"].tolist() == [0, 0]
