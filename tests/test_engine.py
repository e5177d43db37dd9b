"""Where chunks run does not change the answer; what clients send is checked; a round that nobody joins is a round."""

import itertools
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ray import cloudpickle
from safetensors.torch import load_file

from fedsim import experiment, rng
from fedsim.bundle import find
from fedsim.engine import run
from fedsim.errors import ClientError, FedsimError
from fedsim.fleet import Fleet
from fedsim.folder import Folder
from fedsim.local import Sgd
from fedsim.pace import Sync
from fedsim.scenario import Scenario, load
from fedsim.sim import pool as pools
from fedsim.sim.cohort import Trainer, choose_mode
from fedsim.sim.executor import Inline, Patience
from fedsim.sim.pool import Cluster, RayPool
from fedsim.sim.port import SimPort, default_chunk
from fedsim.tree import dump, tree_leaves
from fedsim.world import build

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

DENSE = ("rounds=4", "evaluate.every=2", "engine.chunk=2")
CONVOLUTIONAL = ("rounds=2", "model={name: cnn}", "strategy.local.epochs=1", "engine.chunk=2")


def quickstart(*assignments: str) -> Scenario:
    return load(find("quickstart"), assignments)[0]


def result(scenario: Scenario, folder: Path) -> tuple[bytes, bytes]:
    """The final model and the metrics of a run, as bytes."""
    world = build(scenario)
    run_folder = Folder.create(folder, scenario.name)
    experiment.start(scenario, world, run_folder)
    for _ in experiment.train(scenario, world, run_folder):
        pass
    return (folder / "model.safetensors").read_bytes(), (folder / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def inline(tmp_path_factory):
    return {
        settings: result(quickstart(*settings, "engine.workers=0"), tmp_path_factory.mktemp("inline") / "run")
        for settings in (DENSE, CONVOLUTIONAL)
    }


@pytest.mark.parametrize(("settings", "workers"), [(DENSE, 1), (DENSE, 2), (DENSE, 3), (DENSE, 4), (CONVOLUTIONAL, 2)])
def test_the_answer_does_not_depend_on_the_number_of_workers(settings, workers, inline, tmp_path):
    assert result(quickstart(*settings, f"engine.workers={workers}"), tmp_path / "run") == inline[settings]


def test_the_two_examples_run_in_different_modes():
    assert build(quickstart(*DENSE)).mode == "vmap"
    assert build(quickstart(*CONVOLUTIONAL)).mode == "loop"


def states(world, executor, rounds: int, strategy, key=5, interrupt=None, chunk=2):
    blank = strategy.memory(world.problem, world.w)
    participation = quickstart().fleet.participation
    port = SimPort(executor, Fleet(participation), None, world.data.sizes, blank, chunk, rng.fold(0, rng.FLEET))
    for round in itertools.islice(run(strategy, world.problem, world.w, port, Sync(), key), rounds):
        if interrupt:
            interrupt(round.version)
        yield round


def trainer_of(world) -> Trainer:
    return world.trainer()


def test_a_killed_worker_changes_nothing():
    scenario = quickstart(*DENSE, "strategy={name: scaffold}")
    world = build(scenario)
    expected = list(states(world, Inline(trainer_of(world)), 4, scenario.strategy))[-1].state
    pool = RayPool(trainer_of(world), workers=2)
    try:
        victims = []

        def kill(version: int) -> None:
            if version == 2:
                victims.append(pool.pids[0])
                os.kill(victims[0], signal.SIGKILL)

        last = list(states(world, pool, 4, scenario.strategy, interrupt=kill))[-1].state
        assert victims[0] not in pool.pids
        victims.append(pool.pids[1])
        os.kill(victims[1], signal.SIGKILL)
        while Path(f"/proc/{victims[1]}").exists() and "\nState:\tZ" not in Path(f"/proc/{victims[1]}/status").read_text():
            time.sleep(0.01)
        pool.freeze(world.w)  # a phase begins: nobody had an item then
        assert not set(victims) & set(pool.pids)
        frozen = [actor.__ray_call__.remote(lambda worker: worker._trainer.problem.frozen) for actor in pool._actors.values()]
        assert all(w is not None and w.keys() == world.w.keys() for w in pool._ray.get(frozen))
    finally:
        pool.close()
    (xs, _), (ys, _) = dump(last), dump(expected)
    assert all(torch.equal(xs[name], ys[name]) for name in ys)


def test_compiled_steps_give_the_same_bits_on_workers_of_which_one_was_killed():
    scenario = quickstart(*DENSE, "model=logreg")
    world = build(scenario)
    trainer = world.trainer(compile=True)
    expected = list(states(world, Inline(trainer), 3, scenario.strategy))[-1].state
    pool = RayPool(world.trainer(compile=True), workers=2)
    try:
        pids = pool.pids

        def kill(version: int) -> None:
            if version == 1:
                os.kill(pids[1], signal.SIGKILL)

        last = list(states(world, pool, 3, scenario.strategy, interrupt=kill))[-1].state
        assert pids[1] not in pool.pids
    finally:
        pool.close()
    assert all(torch.equal(last.w[name], expected.w[name]) for name in expected.w)
    stepped = list(states(world, Inline(trainer_of(world)), 3, scenario.strategy))[-1].state
    for name, value in stepped.w.items():
        torch.testing.assert_close(last.w[name], value, rtol=1e-5, atol=1e-6)


def test_auto_starts_as_many_workers_as_there_are_cores_and_memory_for(monkeypatch):
    long = quickstart("engine.workers=auto", "rounds=1000000")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 40))
    assert build(quickstart("engine.workers=auto")).workers == 0  # too little work
    assert build(quickstart("engine.workers=3")).workers == 3
    assert build(long).workers == 8
    assert build(replace(long, engine=replace(long.engine, threads=3))).workers == 2
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=3 << 30))
    assert build(long).workers == 4  # half a gibibyte each
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 29))
    assert build(long).workers == 0


@dataclass(frozen=True)
class Sleepy(Sgd):
    """SGD that hangs until the file `woken` is there; it makes the file itself, so the second attempt runs."""

    woken: str = ""

    def begin(self, problem, message, memory):
        try:
            Path(self.woken).touch(exist_ok=False)  # of two that begin at once, one hangs
        except FileExistsError:
            return super().begin(problem, message, memory)
        time.sleep(600)
        return super().begin(problem, message, memory)


def test_a_worker_that_hangs_is_replaced_and_changes_nothing(tmp_path):
    scenario = quickstart(*DENSE)
    world = build(scenario)
    expected = list(states(world, Inline(trainer_of(world)), 2, scenario.strategy))[-1].state
    pool = RayPool(trainer_of(world), workers=2, patience=Patience(timeout=8))
    try:
        sleepy = replace(scenario.strategy, local=Sleepy(**vars(scenario.strategy.local), woken=str(tmp_path / "woken")))
        before = set(pool.pids)
        last = list(states(world, pool, 2, sleepy))[-1].state
        assert len(before & set(pool.pids)) == 1
    finally:
        pool.close()
    assert all(torch.equal(last.w[name], expected.w[name]) for name in expected.w)


def test_a_program_that_raises_on_a_worker_ends_the_run_or_loses_its_clients():
    scenario = quickstart(*DENSE)
    world = build(scenario)
    broken = replace(scenario.strategy, local=Broken(fail=True))
    pool = RayPool(trainer_of(world), workers=1, patience=Patience(retries=1))
    try:
        with pytest.raises(ClientError, match=r"Broken failed in round 1, among clients .*: ValueError: out of cheese"):
            next(iter(states(world, pool, 1, broken, chunk=8)))
        pool._patience = Patience(retries=0, lose=True)
        on_ray = next(iter(states(world, pool, 1, broken, chunk=8)))
        inline = Inline(trainer_of(world), patience=Patience(lose=True))
        for executor in (pool, inline):  # what is no client's training is never lost
            with pytest.raises(ClientError, match=r"^evaluation on clients' test data failed: IndexError: "):
                executor.map("score", world.w, [np.array([1 << 40])])
    finally:
        pool.close()
    here = next(iter(states(world, inline, 1, broken, chunk=8)))
    for round in (on_ray, here):
        assert round.received.arrivals is None
        assert round.state.w is world.w
        assert len(round.received.lost) > 3
        assert all("out of cheese" in reason for reason in round.received.lost.values())
        assert round.received.bytes_down > 0 == round.received.bytes_up
    assert on_ray.received.lost.keys() == here.received.lost.keys()


@pytest.mark.filterwarnings("ignore:.* workers do not start")  # in time, on a busy machine
def test_two_raylets_give_the_same_bits_and_nothing_is_left_behind():
    from ray.cluster_utils import Cluster

    scenario = quickstart(*DENSE)
    world = build(scenario)
    expected = list(states(world, Inline(trainer_of(world)), 3, scenario.strategy))[-1].state
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        pool = RayPool(trainer_of(world), workers=2, address=cluster.address)
        try:
            import ray

            nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            last = list(states(world, pool, 3, scenario.strategy))[-1].state
            workers = pool.pids
        finally:
            pool.close()
    finally:
        cluster.shutdown()
    assert len(nodes) == 2
    assert len(set(workers)) == 2
    assert all(torch.equal(last.w[name], expected.w[name]) for name in expected.w)


@pytest.fixture
def made(monkeypatch) -> list[Path]:
    """The folders that a test makes for Ray; other runs on this machine make some, too."""
    folders: list[Path] = []
    make = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **more: folders.append(Path(make(**more))) or str(folders[-1]))
    return folders


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_a_pool_leaves_no_process_no_file_and_no_setting_behind(made, three_threads):
    world = build(quickstart(*DENSE))
    pool = RayPool(trainer_of(world), workers=2)
    pids = pool.pids
    assert torch.get_num_threads() == 1
    assert [folder.exists() for folder in made] == [True]
    pool.close()
    assert torch.get_num_threads() == 3
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists()]
    assert [folder.exists() for folder in made] == [False]


class Sealed:
    """What travels, but cannot be opened."""

    def __reduce__(self):
        return int, ("seven",)


def test_nor_does_one_that_could_not_start(made, three_threads, monkeypatch):
    trainer = trainer_of(build(quickstart(*DENSE)))
    with pytest.raises(FedsimError, match=r"^a worker did not start: ValueError: invalid literal for int"):
        RayPool(replace(trainer, problem=Sealed()), workers=1)

    def refuse(*_):
        raise FedsimError("no Ray today")

    monkeypatch.setattr(pools, "_start_ray", refuse)
    with pytest.raises(FedsimError, match="no Ray today"):
        RayPool(trainer, workers=1)
    assert [folder.exists() for folder in made] == [False, False]
    assert torch.get_num_threads() == 3


def test_a_ray_that_is_too_small_for_the_next_pool_starts_anew(made):
    cluster = Cluster()
    try:
        assert cluster.start(1, 0, None).cluster_resources()["CPU"] == 1
        assert cluster.start(2, 1 << 20, None).cluster_resources()["CPU"] == 2
        assert cluster.start(1, 1 << 20, None).cluster_resources()["CPU"] == 2
        assert [folder.exists() for folder in made] == [False, True]
        cluster.start(1, 2 << 20, None)
        assert [folder.exists() for folder in made] == [False, False, True]
    finally:
        cluster.close()
    assert not any(folder.exists() for folder in made)


def test_workers_for_which_a_cluster_has_no_room_are_not_waited_for_without_end(monkeypatch):
    from ray.cluster_utils import Cluster as Raylets

    monkeypatch.setattr(pools, "LATE", 1.0)
    monkeypatch.setattr(pools, "STARTING", 2.0)
    trainer = trainer_of(build(quickstart(*DENSE)))
    raylets = Raylets(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    shortage = r"workers do not start: each takes 2 CPUs, and the Ray cluster at .* has 1, of which 1 are free; lower engine.workers or"
    try:
        with pytest.warns(RuntimeWarning, match=shortage), pytest.raises(FedsimError, match=f"^2 of 2 {shortage}.*, or add nodes$"):
            RayPool(trainer, workers=2, threads=2, address=raylets.address)
    finally:
        raylets.shutdown()


def test_a_gpu_has_room_for_every_worker_that_shares_it():
    for cards, workers in itertools.product(range(1, 9), range(1, 33)):
        each = pools._share(cards, workers)
        assert 0 < each <= 1
        assert cards * int(1 / each + 1e-9) >= workers


def test_workers_share_one_copy_of_the_data():
    import ray
    from ray._private.internal_api import node_stats

    x = torch.zeros((32, 1 << 18))  # 32 MiB
    pool = RayPool(replace(trainer_of(build(quickstart(*DENSE))), x=x), workers=2)
    try:
        node = ray.nodes()[0]
        used = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats.object_store_bytes_used
    finally:
        pool.close()
    assert x.nbytes <= used < 1.5 * x.nbytes


def test_a_cluster_that_is_not_there_is_said_so():
    world = build(quickstart(*DENSE))
    with pytest.raises(FedsimError, match=r"cannot join the Ray cluster at 127\.0\.0\.1:1"):
        RayPool(trainer_of(world), workers=2, address="127.0.0.1:1")


@dataclass(frozen=True)
class Broken(Sgd):
    """SGD of which some clients (those with fewer than `limit` examples) send NaN, or fail."""

    limit: int = 60
    fail: bool = False

    def finish(self, problem, message, carry, n):
        if self.fail:
            raise ValueError("out of cheese")
        reply = super().finish(problem, message, carry, n)
        return replace(reply, payload=reply.payload * torch.where(n < self.limit, torch.nan, 1.0))


@pytest.mark.parametrize("mode", ["vmap", "loop"])
@pytest.mark.parametrize("name", ["fedavg", "median"])
def test_an_update_that_is_not_finite_is_rejected_counted_and_named(mode, name):
    scenario = quickstart(*DENSE, f"strategy={{name: {name}}}")
    world = build(scenario)
    strategy = replace(scenario.strategy, local=Broken())
    executor = Inline(replace(trainer_of(world), mode=mode))
    round = next(iter(states(world, executor, 1, strategy)))
    small = {i for i, n in enumerate(world.data.sizes.tolist()) if n < 60}
    asked = set(round.received.rejected) | set(round.received.arrivals.ids.tolist())
    assert set(round.received.rejected) == asked & small
    assert 0 < len(round.received.rejected) < len(asked)
    assert set(round.received.rejected.values()) == {"update is not finite"}
    assert all(torch.isfinite(v).all() for v in round.state.w.values())
    good = replace(scenario.strategy, local=Sgd())
    port = SimPort(executor, Fleet(AllOf(sorted(asked - small), len(world.data.sizes))), None, world.data.sizes, {}, 2, 1)
    alone = next(run(good, world.problem, world.w, port, Sync(), 5))
    for key, value in alone.state.w.items():
        torch.testing.assert_close(round.state.w[key], value, rtol=1e-5, atol=1e-7)


@dataclass(frozen=True)
class AllOf:
    """Participation of exactly these clients."""

    ids: list[int]
    clients: int

    def start(self, clients, labels, key):
        return {}

    def active(self, state, t, key):
        return np.isin(np.arange(self.clients), self.ids), state


def test_a_program_that_raises_is_named_with_round_and_clients():
    scenario = quickstart(*DENSE)
    world = build(scenario)
    strategy = replace(scenario.strategy, local=Broken(fail=True))
    with pytest.raises(ClientError, match=r"Broken failed in round 1, among clients \d+, \d+: ValueError: out of cheese"):
        next(iter(states(world, Inline(trainer_of(world)), 1, strategy)))


class Spying(Inline):
    """Remembers the replies."""

    def map(self, method, shared, items):
        self.replies = super().map(method, shared, items)
        return self.replies


def test_sums_of_convolutions_lie_in_memory_as_those_that_come_from_a_worker():
    """Else a norm on the server would be added up in another order."""
    scenario = quickstart(*CONVOLUTIONAL)
    world = build(scenario)
    spying = Spying(trainer_of(world))
    next(iter(states(world, spying, 1, scenario.strategy)))
    assert spying.mode == "loop"
    leaves = tree_leaves([reply.total for reply in spying.replies])
    assert any(leaf.ndim == 4 for leaf in leaves)
    assert all(leaf.is_contiguous() for leaf in leaves)


def test_a_round_without_participants_leaves_the_model_alone_and_counts():
    scenario = quickstart(*DENSE)
    world = build(scenario)
    port = SimPort(Inline(trainer_of(world)), Fleet(AllOf([], 20)), None, world.data.sizes, {}, None, 1)
    rounds = list(itertools.islice(run(scenario.strategy, world.problem, world.w, port, Sync(), 5), 3))
    assert [r.version for r in rounds] == [1, 2, 3]
    assert all(r.received.arrivals is None and r.received.bytes_down == 0 for r in rounds)
    assert rounds[-1].state.w is world.w


def test_a_smaller_cohort_is_drawn_from_those_available():
    idle = np.arange(100)
    drawn = [Sync(cohort=10).choose(idle, 0, key) for key in range(500)]
    assert all(len(set(ids.tolist())) == 10 and (np.diff(ids) > 0).all() for ids in drawn)
    frequency = np.bincount(np.concatenate(drawn), minlength=100) / 500
    assert abs(frequency - 0.1).max() < 5 * (0.1 * 0.9 / 500) ** 0.5
    assert Sync(cohort=200).choose(idle, 0, 0).tolist() == idle.tolist()


def test_bytes_and_examples_are_what_travelled_and_trained():
    scenario = quickstart(*DENSE)
    world = build(scenario)
    round = next(iter(states(world, Inline(trainer_of(world)), 1, scenario.strategy)))
    ids = round.received.arrivals.ids
    assert round.received.bytes_down == round.received.bytes_up == len(ids) * world.w.size * 4
    assert round.received.examples == 2 * int(world.data.sizes[ids].sum())  # two epochs
    assert round.received.metrics["loss"][1] == round.received.examples


def test_the_rule_of_chunks():
    for device in ("cpu", "cuda"):
        assert [default_chunk(n, "loop", device) for n in (1, 4, 5, 10, 40, 1000)] == [1, 1, 2, 3, 10, 10]
    assert [default_chunk(n, "vmap", "cuda") for n in (1, 4, 50, 1000)] == [1, 4, 50, 64]
    assert [default_chunk(n, "vmap", "cpu") for n in (1, 4, 5, 10, 40, 1000)] == [1, 2, 3, 5, 20, 25]


def test_the_rule_of_modes():
    small, wide = torch.nn.Linear(4, 2), torch.nn.Linear(700, 300)
    convolution, recurrent = torch.nn.Conv2d(1, 1, 3), torch.nn.LSTM(2, 2)
    assert choose_mode(small, 10, "cpu") == "vmap"
    assert choose_mode(wide, 210_300, "cpu") == "loop"
    assert choose_mode(wide, 210_300, "cuda") == "vmap"
    assert choose_mode(convolution, 10, "cpu") == "loop"
    assert choose_mode(convolution, 10, "cuda") == "vmap"
    assert choose_mode(recurrent, 10, "cuda") == "loop"


@pytest.mark.parametrize("other", [("mode=loop", "chunk=2"), ("mode=vmap", "chunk=7"), ("mode=loop", "chunk=1")])
def test_grouping_changes_results_by_rounding_only_dropout_included(other, tmp_path):
    """Dropout is drawn by client, round and step: a padded batch, a trimmed one and other neighbours see the same masks."""
    settings = ("rounds=2", "model=pfl-cnn", "engine.dtype=float64", "engine.workers=0", "strategy.local.momentum=0")
    models = []
    for i, grouping in enumerate([("mode=vmap", "chunk=2"), other]):
        result(quickstart(*settings, *(f"engine.{field}" for field in grouping)), tmp_path / str(i))
        models.append(load_file(tmp_path / str(i) / "model.safetensors"))
    assert models[0].keys() == models[1].keys()
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=1e-7, atol=1e-9)


def test_other_number_types_train():
    for dtype in ("bfloat16", "float64"):
        scenario = quickstart(*DENSE, f"engine.dtype={dtype}")
        world = build(scenario)
        executed = list(states(world, Inline(trainer_of(world)), 4, scenario.strategy))[-1]
        state = executed.state
        assert {v.dtype for v in state.w.values()} == {getattr(torch, dtype)}
        loss, seen = executed.received.metrics["loss"]
        assert seen == executed.received.examples > 256
        assert 0 < loss / seen < 3
        assert all(torch.isfinite(v).all() for v in state.w.values())
