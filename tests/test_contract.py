"""What every strategy must do, at every pace it declares. A new strategy is a new row of STRATEGIES."""

import itertools
import math
import random
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch

from fedsim import rng, tree
from fedsim.conformal import ConformalStrategy, Pooled, Residual, weighted_quantile
from fedsim.data import Data
from fedsim.data.federation import Proxy
from fedsim.data.partition import Partition
from fedsim.data.source import Source
from fedsim.engine import Received, Round, merge, run
from fedsim.fleet import Fleet, Latency, Participation, Spread
from fedsim.local import Adam, Exponential, Sgd
from fedsim.models import Model
from fedsim.pace import Buffered, Deadline, Pace, Sync
from fedsim.registry import lookup
from fedsim.scenario import Engine, Scenario, load_plugins
from fedsim.sim.cohort import Trainer
from fedsim.sim.executor import Inline
from fedsim.sim.port import SimPort
from fedsim.staleness import Staleness
from fedsim.strategy import LocalProgram, Strategy, WeightedStrategy
from fedsim.tree import tree_map
from fedsim.types import Updates
from fedsim.world import World, build

load_plugins()


def strategy(name: str, **fields) -> Strategy:
    return lookup(Strategy, name)(**fields)


def conformal(name: str, program: str, counting: int | None = None, **fields) -> Strategy:
    """A conformal strategy for the pooled residuals of the least-squares federation."""
    local = lookup(LocalProgram, program)(score=Residual(), **fields)
    more = {} if counting is None else {"counting": counting, "start": 1.0}
    return strategy(name, local=local, **({} if name in {"conformal-qq", "conformal-local"} else {"target": Pooled()}), **more)


LOCAL = Sgd(lr=0.1, steps=4, batch_size=10)
ALONE = lookup(LocalProgram, "own-sgd")(lr=0.1, steps=4, batch_size=10)
TURNS = lookup(LocalProgram, "alternating-sgd")(lr=0.1, steps=4, batch_size=10)


@dataclass(frozen=True)
class Case:
    """A strategy, and the distance to the optimum that it must reach within some rounds. w starts at distance about 2."""

    strategy: Strategy
    rounds: int = 60
    within: float = 1e-5


STRATEGIES = {
    "fedavg": Case(strategy("fedavg", local=LOCAL)),
    "fedavg uniform": Case(strategy("fedavg", local=LOCAL, weights="uniform")),
    "fedavg all": Case(strategy("fedavg", local=LOCAL, weights="all"), rounds=120),
    "fedavg adam": Case(
        strategy("fedavg", local=Adam(lr=0.05, steps=4, batch_size=10, schedule=Exponential(decay=0.97))), rounds=200, within=1e-3
    ),
    "fedavgm": Case(strategy("fedavgm", local=LOCAL, server_lr=0.5, beta=0.5)),
    "fedadagrad": Case(strategy("fedadagrad", local=LOCAL, server_lr=0.5), rounds=150, within=1e-3),
    "fedadam": Case(strategy("fedadam", local=LOCAL, server_lr=0.05, tau=0.1), rounds=300, within=1e-3),
    "fedyogi": Case(strategy("fedyogi", local=LOCAL, server_lr=0.05, tau=0.1), rounds=300, within=1e-3),
    "fedprox": Case(strategy("fedprox", local=LOCAL, mu=0.1)),
    "scaffold": Case(strategy("scaffold", local=lookup(LocalProgram, "scaffold-sgd")(lr=0.05, steps=4, batch_size=None)), rounds=300),
    "fedamd": Case(strategy("fedamd", local=lookup(LocalProgram, "fedamd-miner")(lr=0.05, steps=4, batch_size=10), p=0.4), rounds=400),
    "fedamd optimal": Case(
        strategy("fedamd", local=lookup(LocalProgram, "fedamd-miner")(lr=0.05, steps=4, batch_size=10), p="optb", coin="round"), rounds=600
    ),
    "median": Case(strategy("median", local=LOCAL)),
    "trimmed-mean": Case(strategy("trimmed-mean", local=LOCAL, trim=0.2)),
    "krum": Case(strategy("krum", local=LOCAL)),
    "multi-krum": Case(strategy("krum", local=LOCAL, keep=4)),
    "fedavg stale": Case(strategy("fedavg", local=LOCAL, staleness=lookup(Staleness, "exponential")(half_life=3))),
    "fedbuff": Case(strategy("fedbuff", local=LOCAL), rounds=90),
    "fedbuff hinge": Case(strategy("fedbuff", local=LOCAL, staleness=lookup(Staleness, "hinge")(a=1, b=1)), rounds=90),
    "fedasync": Case(strategy("fedasync", local=LOCAL), rounds=150),
    "weight-prediction": Case(strategy("weight-prediction", local=LOCAL), rounds=120),
    "fedau": Case(strategy("fedau", local=LOCAL, cutoff=5), rounds=120),
    "known-p": Case(strategy("known-p", local=LOCAL)),
    "fedstale": Case(strategy("fedstale", local=LOCAL, beta=0.5), rounds=120),
    "fedstale known": Case(strategy("fedstale", local=LOCAL, beta=0.2, rates="known"), rounds=120),
    "fedvarp": Case(strategy("fedvarp", local=LOCAL), rounds=200),
    "fedawe": Case(strategy("fedawe", local=Sgd(lr=0.05, steps=2, batch_size=10)), rounds=250),
    "fedadmm": Case(strategy("fedadmm", local=lookup(LocalProgram, "admm-sgd")(lr=0.1, steps=4, batch_size=10)), rounds=250),
    "fedadmm solve": Case(strategy("fedadmm", local=lookup(LocalProgram, "admm-solve")()), rounds=200),
    "fedadmm eliminated": Case(
        strategy("fedadmm", local=lookup(LocalProgram, "admm-solve")(form="eliminated", continues=2), weights="samples"), rounds=200
    ),
    "mifa": Case(strategy("mifa", local=LOCAL), rounds=200),
    "mifa wait": Case(strategy("mifa", local=LOCAL, wait=True), rounds=200),
    "fedlaw": Case(strategy("fedlaw", local=LOCAL), rounds=60, within=2e-2),
    "fedlaw quad sgd": Case(strategy("fedlaw", local=LOCAL, form="quad", optimiser="sgd")),
    "fedlaw swa": Case(strategy("fedlaw", local=LOCAL, order="lambda-then-gamma", swa=True), rounds=60, within=2e-2),
    "server-finetune": Case(strategy("server-finetune", local=LOCAL, tune=Sgd(lr=0.1, epochs=2))),
    "dp": Case(strategy("dp", inner=strategy("fedavg", local=LOCAL, weights="uniform"), noise=1e-9, clip=10.0)),
    "dp adaptive": Case(
        strategy("dp", inner=strategy("fedavgm", local=LOCAL, weights="uniform", server_lr=0.5, beta=0.5), noise=1e-9, quantile=0.9),
        rounds=200,
    ),
    "dp-lora": Case(strategy("dp-lora", local=LOCAL)),  # without adapters it is an average; tests/test_dp_lora.py has the rest
    "fedalt": Case(strategy("fedalt", local=TURNS, own="bias"), rounds=90),
    "fedalt uniform": Case(strategy("fedalt", local=TURNS, own="bias", weights="uniform", server_lr=0.8), rounds=120),
    "fedsim": Case(strategy("fedsim", local=LOCAL, own="bias"), rounds=90),
    "fedsim alone": Case(strategy("fedsim", local=LOCAL, own=".*"), rounds=400, within=1e-4),
    "pfedpara": Case(strategy("pfedpara", local=LOCAL, own="bias"), rounds=90),
    "local-only": Case(strategy("local-only", local=ALONE), rounds=400, within=1e-4),
    "ditto": Case(strategy("ditto", local=lookup(LocalProgram, "ditto-sgd")(lr=0.1, lam=0.5, steps=4, batch_size=10)), rounds=200),
    "feddf": Case(strategy("feddf", local=LOCAL, tune=Sgd(lr=0.1, epochs=2))),
    "flower fedavg": Case(strategy("flower", local=LOCAL)),
    "flower fedavgm": Case(strategy("flower", cls="FedAvgM", args={"server_learning_rate": 0.5, "server_momentum": 0.5}, local=LOCAL)),
    "flower fedadam": Case(strategy("flower", cls="FedAdam", args={"eta": 0.05, "tau": 0.1}, local=LOCAL), rounds=300, within=1e-3),
    "unstale": Case(strategy("unstale", inner=strategy("fedavg", local=LOCAL), examples=4, iterations=3)),
    "dc-asgd": Case(strategy("dc-asgd", inner=strategy("fedavg", local=LOCAL))),
    "conformal": Case(conformal("conformal", "pinball-sgd", lr=1.0, gamma=0.02, counting=2), rounds=120, within=0.04),
    "conformal two steps": Case(conformal("conformal", "pinball-sgd", lr=1.0, gamma=0.02, steps=2, counting=2), rounds=120, within=0.08),
    "conformal-weights": Case(strategy("conformal-weights", local=LOCAL, score=Residual(), every=3)),
    "conformal-weights gap": Case(strategy("conformal-weights", local=LOCAL, score=Residual(), every=3, rule="gap")),
    "conformal-exact": Case(conformal("conformal-exact", "send-scores"), rounds=8, within=1e-12),
    "conformal-sketch": Case(conformal("conformal-sketch", "send-digests"), rounds=8, within=2e-2),
    "conformal-qq": Case(conformal("conformal-qq", "send-quantile"), rounds=8, within=0.3),
    "conformal-local": Case(conformal("conformal-local", "send-quantile"), rounds=8, within=0.3),
}
PACES = {"sync": Sync(), "deadline": Deadline(seconds=2.0, cohort=8), "buffered": Buffered(concurrency=12, buffer=8)}
DEVICES = Latency(compute=lookup(Spread, "lognormal")(median=0.05, sigma=0.7), jitter=0.3)
"""Devices that take about two virtual seconds for a job of 40 examples, and every so often three times as long."""

ROWS = [
    pytest.param(case, pace, id=f"{name}-{pace.paced}")
    for (name, case), pace in itertools.product(STRATEGIES.items(), PACES.values())
    if pace.paced in case.strategy.paces
]
every_strategy = pytest.mark.parametrize(("case", "pace"), ROWS)


ELSEWHERE = {"fedperfix"}
"""It needs a transformer: tests/test_fedperfix.py has it equal to `fedsim`, which has rows, bit for bit."""


def test_every_registered_strategy_has_a_row_and_every_row_a_pace():
    ours = {name for name, cls in Strategy.choices.items() if cls.__module__.startswith("strategies.") and cls.asks}
    assert {type(case.strategy).registered_name for case in STRATEGIES.values()} == ours - ELSEWHERE
    assert len(ROWS) == sum(len(case.strategy.paces) for case in STRATEGIES.values())
    assert set(Pace.choices) == set(PACES)


@pytest.fixture(scope="module")
def worlds() -> dict[bool, World]:
    """A federation of twelve clients of unequal size that share one optimum, with no noise: every sound strategy finds it.

    For strategies that give each client a model of its own (True), the model has a bias, which is zero at the optimum.
    """
    made = {personal: build(scenario(STRATEGIES["fedavg"].strategy, bias=personal)) for personal in (False, True)}
    # The data that clients train on are those that they calibrate on, and the model of an earlier phase is the initial one.
    return {k: replace(one, problem=replace(one.problem, calibration=one.problem.sizes, frozen=one.w)) for k, one in made.items()}


@pytest.fixture
def world(request, worlds) -> World:
    """The federation for the strategy at hand."""
    given = request.node.callspec.params
    case = given["case"] if "case" in given else STRATEGIES[given["name"]]
    return worlds[case.strategy.personal]


def scenario(chosen: Strategy, seed: int = 0, bias: bool = False) -> Scenario:
    return Scenario(
        name="contract",
        seed=seed,
        data=Data(
            source=lookup(Source, "least-squares")(clients=12, per_client=20, dim=4, noise=0.0),
            partition=lookup(Partition, "linear")(),
            clients=12,
            proxy=Proxy(source="test", size=40),
        ),
        model=lookup(Model, "logreg")(bias=bias),
        fleet=Fleet(lookup(Participation, "uniform")(clients=8)),
        strategy=chosen,
        rounds=1,
        engine=Engine(dtype="float64"),
    )


def port_of(chosen: Strategy, world: World, mode: str = "vmap", seed: int = 0, pace: Pace = PACES["sync"], chunk: int = 3) -> SimPort:
    trainer = Trainer(world.problem, world.data.x, world.data.y, world.data.train, mode, calibration=world.data.train)
    blank = chosen.memory(world.problem, world.w)
    participation = lookup(Participation, "uniform")(clients=8)
    fleet = Fleet(participation) if pace.paced == "sync" else Fleet(latency=DEVICES)
    return SimPort(Inline(trainer), fleet, None, world.data.sizes, blank, chunk, rng.fold(seed, rng.FLEET))


def rounds(chosen: Strategy, world: World, count: int, pace=PACES["sync"], mode="vmap", seed=0, port=None, start=None) -> Round:
    port = port or port_of(chosen, world, mode, seed, pace)
    return next(itertools.islice(run(chosen, world.problem, world.w, port, pace, rng.fold(seed, 1000), start), count - 1, None))


def models(chosen: Strategy, world: World, count: int, pace=PACES["sync"], mode="vmap", seed=0, chunk=3) -> list:
    """What clients run after some rounds: the server's model, or each one's own."""
    port = port_of(chosen, world, mode, seed, pace, chunk)
    state = rounds(chosen, world, count, pace, port=port, seed=seed).state
    if not chosen.personal:
        return [state.w]
    return [chosen.deploy(state, port.memory_of(i)) for i in range(world.data.clients)]


def tensors(state) -> list[torch.Tensor]:
    """Everything a state holds, the rows of its tables included."""
    return list(tree.dump(state)[0].values())


def same_bits(a, b) -> bool:
    (xs, outline), (ys, other) = tree.dump(a), tree.dump(b)
    return outline == other and xs.keys() == ys.keys() and all(torch.equal(xs[k], ys[k]) for k in xs)


@every_strategy
def test_reaches_the_known_optimum(case, pace, world):
    if isinstance(case.strategy, ConformalStrategy):
        return reaches_the_quantile(case, rounds(case.strategy, world, case.rounds, pace).state, world)
    assert (weight_of(world.w) - world.data.optimum).norm() > 1
    for i, w in enumerate(models(case.strategy, world, case.rounds, pace, chunk=world.data.clients)):  # one chunk: many rounds, soon
        if not case.strategy.personal or world.data.sizes[i] >= ENOUGH:
            assert (weight_of(w) - world.data.optimum).norm().item() < case.within


ENOUGH = 20
"""Examples from which a client alone finds the optimum soon."""


def weight_of(w) -> torch.Tensor:
    return next(value for name, value in w.items() if name.endswith("weight"))


def reaches_the_quantile(case, state, world):
    """The optimum of a conformal strategy is the quantile of the residuals of the clients it has heard; the median of local ones is near.

    Far from the exact quantile are those that only see quantiles, of about 20 examples a client.
    """
    assert same_bits(state.w, world.w)
    heard = (state.known if hasattr(state, "known") else state.heard).numpy()
    own = np.flatnonzero(heard[world.data.train.owners()])
    assert heard.sum() >= 10
    scores = (world.data.x @ next(iter(world.w.values())).T - world.data.y).abs()[world.data.train.index[own], 0]
    alpha, problem = case.strategy.alpha, world.problem
    exact = weighted_quantile(scores, torch.zeros(len(scores)).long(), torch.ones(1, 1), alpha)
    got = case.strategy.thresholds(problem, state)
    assert got.shape[1] == 1
    assert abs(got.quantile(0.5, 0) - exact).item() < case.within * exact.item()


@every_strategy
def test_stacked_equals_one_by_one(case, pace, world):
    stacked, single = (
        [rounds(case.strategy, world, 5, pace, mode).state, models(case.strategy, world, 5, pace, mode)] for mode in ("vmap", "loop")
    )
    for a, b in zip(tensors(stacked), tensors(single), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@every_strategy
def test_resumed_equals_straight(case, pace, world):
    whole = port_of(case.strategy, world, pace=pace)
    straight = rounds(case.strategy, world, 6, pace, port=whole).state
    port = port_of(case.strategy, world, pace=pace)
    half = rounds(case.strategy, world, 3, pace, port=port)
    saved = tree.load(*tree.dump({"state": half.state, "port": port.save()}))
    fresh = port_of(case.strategy, world, pace=pace)
    fresh.restore(saved["port"])
    resumed = rounds(case.strategy, world, 3, pace, port=fresh, start=Round(3, saved["state"], half.received)).state
    assert pace.paced == "sync" or len(port.save()["clock"]["groups"]) > 0  # something was under way
    assert same_bits(resumed, straight)
    assert same_bits(fresh.save()["memory"], whole.save()["memory"])


@every_strategy
def test_same_key_same_bits_and_another_seed_other_bits(case, pace, world):
    if isinstance(case.strategy, ConformalStrategy):  # they leave the model as it is
        first, again, other = (rounds(case.strategy, world, 3, pace, seed=s).state for s in (0, 0, 1))
    else:
        first, again, other = (models(case.strategy, world, 3, pace, seed=s) for s in (0, 0, 1))
    assert same_bits(first, again)
    assert not same_bits(first, other)


@pytest.mark.parametrize("name", [name for name, case in STRATEGIES.items() if len(case.strategy.paces) > 1])
def test_where_nothing_takes_time_every_pace_is_the_same_rounds(name, world):
    chosen = STRATEGIES[name].strategy
    paces = [Sync(cohort=6), Deadline(seconds=1.0, cohort=6), Buffered(concurrency=6, buffer=6)]
    states = [rounds(chosen, world, 3, pace, port=port_of(chosen, world)).state for pace in paces if pace.paced in chosen.paces]
    assert len(states) == len(chosen.paces)
    assert all(same_bits(states[0], state) for state in states[1:])


def one_round(case: Case, world: World, summed: bool = False) -> tuple[Received, object]:
    """What comes in during a first round in which all are back, kept apart or summed, and the state it belongs to."""
    port, state = port_of(case.strategy, world), case.strategy.init(world.problem, world.w)
    port.begin()
    for job in case.strategy.plan(world.problem, state, port.idle(), 7):
        port.send(job, 0, 8)
    assert port.wait(None, math.inf, step=False) == 8
    return port.recv(0, partial(case.strategy.weigh, world.problem, state) if summed else None, case.strategy.recalls), state


@every_strategy
def test_the_order_of_arrivals_is_forgotten(case, pace, world):
    received, state = one_round(case, world)
    updates = received.updates
    assert updates.arrivals.ids.tolist() == sorted(updates.arrivals.ids.tolist())
    singles = [updates.take(slice(i, i + 1)) for i in range(len(updates))]
    random.Random(0).shuffle(singles)
    shuffled = merge([Received(arrivals=one.arrivals, updates=one) for one in singles]).updates
    assert same_bits(case.strategy.server(world.problem, state, shuffled, 9), case.strategy.server(world.problem, state, updates, 9))


@every_strategy
def test_a_state_is_a_value_that_later_rounds_do_not_change(case, pace, world):
    """What a server makes of a state and updates is the same after the state was used for something else, and after what came of it was."""
    received, start = one_round(case, world)
    updates, problem = received.updates, world.problem
    first = case.strategy.server(problem, start, updates, 9)
    before = tree.dump(first)[0]
    kept = {name: tensor.clone() for name, tensor in before.items()}
    opposite = Updates(updates.arrivals, tree_map(lambda leaf: -leaf, updates.payload), updates.started)
    for state in (start, first, case.strategy.server(problem.at(1), first, opposite, 10)):
        case.strategy.server(problem.at(2), state, opposite, 11)
    assert all(torch.equal(kept[name], tensor) for name, tensor in tree.dump(first)[0].items())
    assert same_bits(case.strategy.server(problem, start, updates, 9), first)


@every_strategy
def test_a_report_is_numbers_and_one_value_an_arrival(case, pace, world):
    received, start = one_round(case, world)
    after = case.strategy.server(world.problem, start, received.updates, 9)
    for name, value in case.strategy.report(world.problem, start, after, received.arrivals).items():
        assert isinstance(value, float) or value.shape == (8,), name


WEIGHTED = [row for row in ROWS if isinstance(row.values[0].strategy, WeightedStrategy)]


@pytest.mark.parametrize(("case", "pace"), WEIGHTED)
def test_summing_where_updates_arise_equals_summing_on_the_server(case, pace, world):
    kept, state = one_round(case, world)
    summed, _ = one_round(case, world, summed=True)
    assert summed.updates is None
    here = case.strategy.server(world.problem, state, kept.updates, 9)
    there = case.strategy.apply(world.problem, state, summed.total, summed.arrivals, 9)
    for a, b in zip(tensors(here), tensors(there), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("case", "pace"), WEIGHTED)
def test_a_weight_depends_on_its_own_row(case, pace, world):
    received, state = one_round(case, world)
    everyone = case.strategy.weigh(world.problem, state, received.arrivals)
    some = received.updates.take(torch.tensor([5, 1]))
    assert everyone.shape == (8,)
    assert torch.equal(case.strategy.weigh(world.problem, state, some.arrivals), everyone[[5, 1]])
