"""On a GPU: the same rounds as on a CPU, the same bits again, resumed, and for any number of workers. Runs with FEDSIM_TEST_GPU=1."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedsim import experiment, rng, tree
from fedsim.engine import Round
from fedsim.folder import Folder
from fedsim.scenario import Engine, load
from fedsim.world import build
from tests import test_contract as contract
from tests.test_contract import every_strategy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU, or FEDSIM_TEST_GPU is not set")


@pytest.fixture(scope="module")
def worlds():
    """The federation of the contract, on the CPU and on the GPU; with a bias for strategies that give each client a model (True)."""

    def made(device, personal):
        scenario = contract.scenario(contract.STRATEGIES["fedavg"].strategy, bias=personal)
        one = build(replace(scenario, engine=Engine(dtype="float64", device=device)))
        return replace(one, problem=replace(one.problem, calibration=one.problem.sizes, frozen=one.w))

    return {(device, personal): made(device, personal) for device in ("cpu", "cuda") for personal in (False, True)}


def same(a, b) -> None:
    for x, y in zip(contract.tensors(a), contract.tensors(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-10)


@every_strategy
def test_rounds_are_those_of_a_cpu_and_a_resumed_run_has_the_same_bits(case, pace, worlds):
    here, there = (worlds[device, case.strategy.personal] for device in ("cpu", "cuda"))
    straight = contract.rounds(case.strategy, there, 4, pace).state
    same(contract.rounds(case.strategy, here, 4, pace).state, straight)
    port = contract.port_of(case.strategy, there, pace=pace)
    half = contract.rounds(case.strategy, there, 2, pace, port=port)
    saved = tree.load(*tree.dump({"state": half.state, "port": port.save()}), device="cuda")
    fresh = contract.port_of(case.strategy, there, pace=pace)
    fresh.restore(saved["port"])
    resumed = contract.rounds(case.strategy, there, 2, pace, port=fresh, start=Round(2, saved["state"], half.received)).state
    assert contract.same_bits(resumed, straight)


SCENARIO = """
name: gpu
data: {source: {name: synthetic-images, train: 600, test: 200}, clients: 20, partition: {name: dirichlet, alpha: 0.5}, client_test: 0.2}
model: pfl-cnn
fleet: {participation: {name: uniform, clients: 8}}
strategy: {name: scaffold, local: {name: scaffold-sgd, lr: 0.05, epochs: 1, batch_size: 8}}
rounds: 4
evaluate: {clients: true}
engine: {device: cuda, workers: 0, chunk: 3}
output: {checkpoint: 1}
"""


def run(place: Path, *assignments: str, rounds: int | None = None) -> tuple[Folder, dict]:
    (place / "gpu.yaml").write_text(SCENARIO)
    scenario, _ = load(place / "gpu.yaml", assignments)
    world = build(scenario)
    folder = Folder.create(place / "run", scenario.name) if not (place / "run").exists() else Folder.open(place / "run")
    if not folder.rows():
        experiment.start(scenario, world, folder)
    row = {}
    with closing(experiment.train(scenario, world, folder)) as rows:
        for row in rows:
            if row["round"] == rounds:
                break
    return folder, row


def bits(place: Path, *assignments: str) -> dict[str, np.ndarray]:
    place.mkdir()
    folder, _ = run(place, *assignments)
    return {name: tensor.numpy() for name, tensor in load_file(folder.path / "model.safetensors").items()}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def near(a, b) -> None:
    """Equal up to rounding, which may turn a ReLU on or off."""
    for name in b:
        assert np.linalg.norm(a[name] - b[name]) < 2e-3 * np.linalg.norm(b[name]), name


DESCENT = ("strategy={name: fedavg, local: {name: sgd, lr: 0.05, epochs: 1, batch_size: 8}}",)


@pytest.mark.parametrize("more", [(), DESCENT], ids=["scaffold", "fedavg"])
def test_a_run_gives_the_same_bits_again_on_workers_and_resumed(tmp_path, more):
    first = bits(tmp_path / "a", *more)
    assert equal(first, bits(tmp_path / "b", *more))
    assert equal(first, bits(tmp_path / "c", "engine.workers=2", *more))
    (tmp_path / "d").mkdir()
    run(tmp_path / "d", *more, rounds=2)
    folder, _ = run(tmp_path / "d", *more)
    assert equal(first, {k: v.numpy() for k, v in load_file(folder.path / "model.safetensors").items()})


@pytest.mark.parametrize("more", [(), DESCENT], ids=["scaffold", "fedavg"])
def test_a_run_is_that_of_a_cpu_but_for_rounding(tmp_path, more):
    there, here = (bits(tmp_path / device, f"engine.device={device}", *more) for device in ("cuda", "cpu"))
    near(there, here)


@pytest.mark.parametrize("more", [(), DESCENT], ids=["scaffold", "fedavg"])
def test_a_compiled_run_is_the_run(tmp_path, more):
    plain, compiled = (bits(tmp_path / str(on), f"engine.compile={on}", "engine.chunk=8", *more) for on in ("false", "true"))
    near(compiled, plain)


SHAPES = {"momentum": "momentum: 0.5", "proximal": "proximal: 0.1", "decay": "weight_decay: 0.01"}


@pytest.mark.parametrize("more", SHAPES.values(), ids=SHAPES)
def test_a_recorded_step_is_the_step(tmp_path, more):
    local = f"strategy={{name: fedavg, local: {{name: sgd, lr: 0.05, epochs: 2, batch_size: 8, {more}}}}}"
    plain, recorded = (bits(tmp_path / str(on), f"engine.compile={on}", "engine.chunk=8", local) for on in ("false", "true"))
    assert equal(plain, recorded)


def test_random_numbers_are_the_cpu_s():
    philox = pytest.importorskip("fedsim.sim.philox")
    keys = rng.fold_each(7, np.arange(70))
    for shape in ((3,), (85,), (17, 200)):
        assert np.array_equal(philox.uniform(keys, shape, torch.device("cuda")).cpu().numpy(), rng.uniform(keys, shape))


def test_what_a_gpu_has_no_memory_for_runs_in_parts(tmp_path):
    few = [*DESCENT, "engine.chunk=8", "data.source.test=10", "evaluate.clients=false", "data.client_test=0"]
    whole = bits(tmp_path / "whole", *few)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 250e6) / total)
    try:
        with pytest.warns(RuntimeWarning, match="do not fit into the GPU's memory"):
            parts = bits(tmp_path / "parts", *few)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    near(parts, whole)
