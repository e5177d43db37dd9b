"""Descent in place is the program's own step: along a chain in closed form, under vmap, and on the autograd tape."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedsim import rng
from fedsim.data import Lists
from fedsim.errors import ClientError
from fedsim.local import Exponential, Sgd
from fedsim.models import chain_of
from fedsim.models.dropout import Dropout
from fedsim.params import Params
from fedsim.problem import Classification, MultiLabel, Network, Problem, Regression, Task
from fedsim.sim.chunk import Chunk
from fedsim.sim.cohort import Trainer
from fedsim.sim.footprint import Flops, footprint
from fedsim.tree import tree_leaves
from fedsim.types import Draw


@dataclass(frozen=True)
class Stepwise(Sgd):
    """The same SGD, which does not say that it is a descent: the platform runs its `step`."""

    def descent(self, problem):
        return None


NETWORKS = {
    "linear": (nn.Linear(12, 3), {}),
    "chain": (nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Sequential(nn.Linear(7, 5, bias=False), nn.Sigmoid()), nn.Linear(5, 3)), {}),
    "dropout": (
        nn.Sequential(nn.Linear(12, 7), nn.ReLU(), Dropout(0.4), nn.Linear(7, 3)),
        {"2.uniform": Draw("uniform", (7,))},
    ),
    "no chain": (nn.Sequential(nn.Unflatten(1, (3, 4)), nn.Flatten(), nn.Linear(12, 7), nn.GELU(), nn.Linear(7, 3)), {}),
    "convolution": (
        nn.Sequential(nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.ReLU(), nn.Linear(24, 3)),
        {},
    ),
}
CHAINS = {"linear", "chain", "dropout"}
SIZES = np.array([11, 4, 4, 9, 1])
IDS = np.array([0, 3, 1, 2, 4])  # by falling number of steps


def trainer_of(name: str, mode: str, task: Task) -> tuple[Trainer, Params]:
    torch.manual_seed(3)
    module, draws = NETWORKS[name]
    module = module.double()
    w = Params({k: torch.randn_like(p) for k, p in module.named_parameters()}) * 0.5
    x = torch.randn(int(SIZES.sum()), 12, dtype=torch.float64)
    labels = torch.randint(3, (len(x),))
    y = labels if isinstance(task, Classification) else torch.nn.functional.one_hot(labels, 3).double()
    lists = Lists.of_clients(np.split(np.arange(len(x)), SIZES.cumsum()[:-1]))
    version = torch.zeros((), dtype=torch.float64)
    problem = Problem(Network(module), task, torch.from_numpy(SIZES.astype(np.float32)), draws, version=version)
    return Trainer(problem, x, y, lists, mode), w


def train(program: Sgd, name: str, mode: str, task: Task):
    trainer, w = trainer_of(name, mode, task)
    return trainer.train((program, w), Chunk(IDS, 4, rng.fold(9), {}, None))


PROGRAMS = {
    "plain": Sgd(lr=0.2, epochs=2, batch_size=4, schedule=Exponential(decay=0.9)),
    "momentum": Sgd(lr=0.1, epochs=2, batch_size=4, momentum=0.8),
    "decay": Sgd(lr=0.1, epochs=2, batch_size=None, weight_decay=0.3),
    "proximal": Sgd(lr=0.1, steps=5, batch_size=3, proximal=0.5, weight_decay=0.1),
    "all": Sgd(lr=0.1, steps=4, batch_size=3, momentum=0.5, proximal=0.5, weight_decay=0.1),
}


@pytest.mark.parametrize("mode", ["vmap", "loop"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_descending_in_place_equals_stepping(program, network, mode):
    fast = train(program, network, mode, Classification(3))
    slow = train(Stepwise(**vars(program)), network, mode, Classification(3))
    assert program.descent(trainer_of(network, mode, Classification(3))[0].problem) is not None
    assert all(leaf.abs().max() > 1e-3 for leaf in tree_leaves(slow.payload))
    for a, b in zip(tree_leaves(fast.payload), tree_leaves(slow.payload), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for a, b in zip(fast.metrics["loss"], slow.metrics["loss"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


IMAGES = {
    "padded": nn.Sequential(
        nn.Conv2d(2, 3, (3, 2), padding=(1, 0)),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 3),
    ),
    "dropout": nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Sequential(Dropout(0.3), nn.MaxPool2d(3)), nn.Flatten(), nn.Linear(6, 3)),
}
"""Chains for images of 2 x 8 x 7, which a CPU does not run as such."""


@pytest.mark.parametrize("network", IMAGES)
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_convolutions_descend_along_a_chain(program, network, monkeypatch):
    module = IMAGES[network].double()
    draws = {"2.0.uniform": Draw("uniform", (3, 6, 5))} if network == "dropout" else {}
    monkeypatch.setitem(NETWORKS, "images", (module, draws))
    trainer, w = trainer_of("images", "vmap", Classification(3))
    trainer = replace(trainer, x=torch.randn(len(trainer.x), 2, 8, 7, dtype=torch.float64))
    chained = replace(trainer)
    vars(chained)["_chain"] = chain_of(module, (2, 8, 7), convolutions=True)
    assert chained._chain is not None
    assert trainer._chain is None
    chunk = Chunk(IDS, 4, rng.fold(9), {}, None)
    fast, slow = chained.train((program, w), chunk), trainer.train((Stepwise(**vars(program)), w), chunk)
    for name, leaf in slow.payload.items():
        assert leaf.abs().max() > 1e-3
        torch.testing.assert_close(fast.payload[name], leaf, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fast.metrics["loss"], slow.metrics["loss"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("task", [Regression(3), MultiLabel(3), Classification(3)])
def test_every_task_descends_along_a_chain(task):
    fast, slow = (train(p, "chain", "vmap", task) for p in (PROGRAMS["plain"], Stepwise(**vars(PROGRAMS["plain"]))))
    for a, b in zip(tree_leaves(fast.payload), tree_leaves(slow.payload), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_how_many_descend_together_changes_nothing_but_rounding(monkeypatch):
    together = train(PROGRAMS["all"], "chain", "vmap", Classification(3))
    monkeypatch.setattr("fedsim.sim.descent.CACHE", 3000)  # a model has 1192 bytes: groups of two
    apart = train(PROGRAMS["all"], "chain", "vmap", Classification(3))
    for a, b in zip(tree_leaves(apart.payload), tree_leaves(together.payload), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_a_chain(name):
    assert (chain_of(NETWORKS[name][0], (12,)) is not None) == (name in CHAINS)


def test_what_is_no_chain():
    flat, shared, hooked = nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    assert chain_of(nn.Sequential(flat, nn.Linear(4, 2)), (1, 2, 2)) is not None
    assert chain_of(nn.Sequential(flat, nn.Linear(4, 2)), (4,)) is not None
    assert chain_of(nn.Sequential(nn.Linear(2, 2), nn.Flatten()), (1, 2, 2)) is None  # a linear layer over the last dimension
    assert chain_of(nn.Sequential(shared, nn.ReLU(), shared), (4,)) is None
    assert chain_of(nn.Sequential(hooked), (4,)) is None
    assert chain_of(nn.Sequential(nn.ReLU()), (4,)) is None
    for layer in (nn.Conv2d(1, 2, 3, stride=2), nn.Conv2d(1, 2, 3, padding="same"), nn.Conv2d(2, 2, 3, groups=2), nn.MaxPool2d(3, 2)):
        network = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(2))
        assert chain_of(network, (1, 8, 8), convolutions=True) is None
    assert chain_of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2)), (1, 3, 3), convolutions=True) is not None
    assert chain_of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2)), (1, 3, 3)) is None
    assert chain_of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(1, 2), nn.Flatten()), (1, 3, 3), convolutions=True) is None


def test_a_program_with_a_step_of_its_own_or_more_than_descent_is_stepped():
    trainer, _ = trainer_of("linear", "vmap", Classification(3))

    @dataclass(frozen=True)
    class Own(Sgd):
        def step(self, problem, carry, batch, draws, passname):
            return carry

    for program in (Own(), replace(Sgd(), clip=1.0), replace(Sgd(), momentum=0.5, nesterov=True)):
        assert program.descent(trainer.problem) is None


def test_a_compiled_step_equals_the_step():
    program = PROGRAMS["all"]
    trainer, w = trainer_of("dropout", "vmap", Classification(3))
    compiled = replace(trainer, compile=True)
    for version in (4, 7):  # the second without compiling again
        chunk = Chunk(IDS, version, rng.fold(9), {}, None)
        fast, slow = compiled.train((program, w), chunk), trainer.train((Stepwise(**vars(program)), w), chunk)
        assert (fast.examples, len(fast.accepted)) == (slow.examples, 5)
        for a, b in zip(tree_leaves(fast.payload), tree_leaves(slow.payload), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert len(compiled._compiled) == 1


def test_a_stack_that_a_gpu_has_no_memory_for_is_cut_with_the_same_sums(monkeypatch):
    whole = Trainer._stack

    def small(self, problem, program, message, memory, feeds, apart=False):
        if len(feeds[0].keys) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return whole(self, problem, program, message, memory, feeds, apart)

    trainer, w = trainer_of("chain", "vmap", Classification(3))
    job, weight = (PROGRAMS["all"], w), torch.tensor([3.0, 1, 2, 4, 5], dtype=torch.float64)
    chunk = Chunk(IDS, 4, rng.fold(9), {}, weight)
    expected = trainer.train(job, chunk)
    monkeypatch.setattr(Trainer, "_stack", small)
    cut = trainer.train(job, chunk)
    assert (expected.parts, cut.parts) == (1, 3)
    for a, b in zip(cut.metrics["loss"], expected.metrics["loss"], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(tree_leaves(cut.total), tree_leaves(expected.total), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    monkeypatch.setattr(Trainer, "_stack", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all")))
    with pytest.raises(ClientError, match="OutOfMemoryError"):
        trainer.train(job, chunk)


def test_the_footprint_of_a_chunk_is_what_its_stack_needs():
    trainer, w = trainer_of("chain", "vmap", Classification(3))
    model = sum(leaf.nbytes for leaf in tree_leaves(w))
    chunks = [Chunk(ids, 0, 1, {}, None) for ids in (IDS[:1], IDS)]
    one, five = (footprint(trainer, PROGRAMS["plain"], w, chunk) for chunk in chunks)
    assert one > 2 * model  # the copy that moves, and the change
    assert five > 2.5 * one


def test_operations_are_counted_as_pytorch_counts_them():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    x = torch.zeros(2, 1, 8, 8)
    with Flops() as ours, torch.no_grad():
        net(x)
    with FlopCounterMode(display=False) as theirs, torch.no_grad():
        net(x)
    assert ours.total == theirs.get_total_flops() == 2 * 2 * (4 * 9 * 36 + 4 * 36 * 5)
