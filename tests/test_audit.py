"""The audit: the attack, how pictures are judged, whose update it is, and the command."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from fedsim import session
from fedsim.audit import Attack, Seen, attack, compare
from fedsim.audit.likeness import psnr, ssim
from fedsim.audit.sme import _mismatch, total_variation
from fedsim.cli import app
from fedsim.params import Params
from fedsim.problem import Classification, Inputs, Network, Problem
from fedsim.report.audit_page import png
from fedsim.scenario import load
from fedsim.types import Batch
from fedsim.world import build

SIDE = 6
SCENARIO = """\
name: leaky
seed: 3
data: {source: digits, clients: 300, partition: iid}
model: {name: mlp, hidden: [32]}
fleet: {participation: {name: uniform, clients: 4}}
strategy: {name: fedavg, local: {name: sgd, lr: 0.01, steps: 1, batch_size: null}}
rounds: 4
evaluate: {every: 4}
output: {checkpoint: 1, keep: 2}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("leaky.yaml").write_text(SCENARIO)


def fedsim(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def victim(steps: int = 1, examples: int = 2) -> tuple[Problem, Seen, torch.Tensor]:
    """A small perceptron on 6 x 6 pictures, one client's change, and its pictures."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 24), nn.Tanh(), nn.Linear(24, 4)).double()
    x, y = torch.rand(examples, 1, SIDE, SIDE, dtype=torch.float64), torch.arange(examples) % 4
    low, high = torch.zeros(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
    problem = Problem(Network(module), Classification(4), torch.ones(1), inputs=Inputs((1, SIDE, SIDE), low, high))
    w0 = w = Params({name: p.detach().clone() for name, p in module.named_parameters()})
    for s in range(steps):
        batch = Batch(x, y) if steps == 1 else Batch(x[s % examples][None], y[s % examples][None])
        w = w.plus(problem.grad(w, batch)[0], -0.5)
    return problem, Seen(w0, w - w0, y), x


# The attack


def test_one_step_gives_its_pictures_away():
    problem, seen, x = victim()
    found = attack(problem, seen, Attack(iterations=300, lr=0.1, tv=0.0, start=0.0), key=1)
    like = compare(found.x, x, problem.inputs)
    assert found.a == 0
    assert found.objective < 1e-3
    assert like.psnr.min() > 25
    assert like.ssim.min() > 0.9


def test_after_many_steps_the_surrogate_explains_the_change_better():
    """Twenty steps of one picture each: no gradient at the first model points where they went."""
    problem, seen, _ = victim(steps=20)
    how = Attack(120, lr=0.1, a_lr=1e-2, tv=0.0)
    plain, sme = (attack(problem, seen, replace(how, start=start), key=1) for start in (0.0, 0.5))
    assert 0 < sme.a < 1
    assert plain.a == 0
    assert sme.objective < plain.objective - 0.05


def test_noise_on_the_update_defeats_it():
    problem, seen, x = victim()
    size = seen.change.norm() / seen.change.size**0.5
    noisy = seen.change.map(lambda v: v + 3 * size * torch.randn(v.shape, generator=torch.Generator().manual_seed(1), dtype=v.dtype))
    found = attack(problem, Seen(seen.started, noisy, seen.y), Attack(300, lr=0.1, tv=0.0, start=0.0), key=1)
    assert compare(found.x, x, problem.inputs).psnr.mean() < 12


def test_gradients_of_the_objective_are_those_of_finite_differences():
    problem, seen, _ = victim(steps=4)
    x, a, e = torch.rand(2, 1, SIDE, SIDE, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64), 1e-6
    toward = seen.change * (-1 / seen.change.norm())
    _, slope, slope_a = _mismatch(problem, seen, toward, x, a, 0.1)
    ahead, behind = (_mismatch(problem, seen, toward, x, a + d, 0.1)[0] for d in (e, -e))
    assert slope_a == pytest.approx(float((ahead - behind) / (2 * e)), rel=1e-4)
    d = torch.zeros_like(x)
    d[1, 0, 2, 3] = e
    ahead, behind = (_mismatch(problem, seen, toward, x + sign * d, a, 0.1)[0] for sign in (1, -1))
    assert slope[1, 0, 2, 3] == pytest.approx(float((ahead - behind) / (2 * e)), rel=1e-4)


def test_a_picture_stays_within_what_it_can_be_and_a_start_at_an_end_stays_there():
    problem, seen, _ = victim()
    found = attack(problem, seen, Attack(5, lr=10.0, start=1.0), key=1)
    assert found.a == 1
    assert found.x.min() >= 0
    assert found.x.max() <= 1


def test_total_variation_by_hand():
    x = torch.tensor([[[[0.0, 1.0], [3.0, 5.0]]]])
    assert total_variation(x) == (1.5 + 3.5) / 2  # |1|, |2| along rows; |3|, |4| along columns


# How pictures are judged


def test_pictures_are_matched_so_that_the_error_is_least():
    true = torch.rand(4, 1, 12, 12, generator=torch.Generator().manual_seed(2))
    inputs = Inputs.of(true)
    like = compare((true + 0.01)[[2, 0, 3, 1]], true, inputs)
    assert like.order.tolist() == [1, 3, 0, 2]
    torch.testing.assert_close(like.psnr, torch.full((4,), -20 * np.log10(0.01 / float(inputs.high - inputs.low))), rtol=1e-3, atol=0)


def test_ssim_is_the_formula_place_by_place():
    random = np.random.default_rng(0)
    a, b = random.random((13, 12)), random.random((13, 12))
    line = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for i in range(3):
        for j in range(2):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq, cov = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum(), (window * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    got = ssim(torch.from_numpy(a)[None, None], torch.from_numpy(b)[None, None])
    assert got.item() == pytest.approx(np.mean(values), rel=1e-9)
    assert ssim(got.new_ones(1, 3, 8, 8) / 2, got.new_ones(1, 3, 8, 8) / 2).item() == pytest.approx(1)
    assert psnr(got.new_zeros(1, 1, 8, 8), got.new_ones(1, 1, 8, 8) / 10).item() == pytest.approx(20)


def test_png_is_read_by_another_program(tmp_path):
    from matplotlib.image import imread

    pixels = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    (tmp_path / "x.png").write_bytes(png(pixels))
    np.testing.assert_array_equal((imread(tmp_path / "x.png") * 255).round().astype(np.uint8)[..., :3], pixels)


# The command


def audit(*arguments: object) -> dict:
    result = fedsim("audit", *arguments, "--iterations", "3", "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_a_client_of_a_scenario_is_attacked_and_its_pictures_shown():
    result = fedsim("audit", "leaky.yaml", "--iterations", "250", "--start", "0.5")
    assert result.exit_code == 0, result.stderr
    assert "dB nearer to the pictures than the mean picture" in result.stdout
    page = Path(re.search(r"^Page: (.+)$", result.stdout, re.MULTILINE)[1])
    assert page.parent == Path("runs/audits/leaky")
    html = page.read_text()
    assert html.count('<img src="data:image/png;base64,') == 4 * 5  # true, blind, baseline, SME; the client has five of 1,437 examples
    assert "labels are known" in html


def test_the_update_of_a_run_is_made_again_from_its_last_checkpoint_before():
    assert fedsim("run", "leaky.yaml", "--output", "run", "-q").exit_code == 0
    ids = json.loads(Path("run/clients.jsonl").read_text().splitlines()[3])["ids"]
    from_run, anew = (audit(target, "--round", 4, "--client", ids[1]) for target in ("run", "leaky.yaml"))
    assert from_run["page"] == f"run/audit-4-{ids[1]}.html"
    for name in ("baseline", "sme"):
        assert from_run["methods"][name]["psnr"] == anew["methods"][name]["psnr"]
    assert len(list(Path("run/checkpoints").glob("*.json"))) == 2  # the run's own are left as they were


def test_the_update_is_the_one_that_the_server_had():
    """With a single client a round, the server's model moves by exactly that."""
    from fedsim.replay import update_of

    scenario, _ = load(Path("leaky.yaml"), ("fleet.participation.clients=1", "rounds=3"))
    world = build(scenario)
    second, third = (update_of(scenario, world, None, r, None) for r in (2, 3))
    for name, moved in (second.started + second.change).items():
        torch.testing.assert_close(third.started[name], moved, rtol=0, atol=1e-7)
    assert len(second.data.y) == world.data.train.sizes[second.client]


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["leaky.yaml", "--round", "9"], ["--round 9", "rounds 1 to 4"], 1),
        (["leaky.yaml", "--client", "300"], ["--client 300", "clients 0 to 299"], 1),
        (["leaky.yaml", "--client", "1"], ["--client 1", "sent no update in round 1", "these did: 0, "], 1),
        (["nowhere.yaml"], ["nowhere.yaml: no such file"], 2),
        (["empty"], ["empty: not a run folder (no scenario.yaml in it)"], 1),
        (["leaky.yaml", "--set", "data.source=synthetic", "--set", "data.clients=30"], ["data", "audit reconstructs labelled pictures"], 2),
        (["leaky.yaml", "--set", "strategy.server_lrr=1"], ["server_lrr"], 2),
    ],
)
def test_what_cannot_be_audited_is_refused_with_the_way_out(arguments, words, code):
    Path("empty").mkdir()
    result = fedsim("audit", *arguments)
    assert result.exit_code == code, result.stderr
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize("runtime", ["flower", "flower-simulation"])
def test_a_run_elsewhere_is_refused_and_its_scenario_is_not(runtime):
    _, folder = session.begin(load(Path("leaky.yaml"))[0], Path("run"), runtime)
    folder.unlock()
    result = fedsim("audit", "run")
    assert result.exit_code == 1
    assert f"this run's clients were in the runtime '{runtime}'" in result.stderr
    assert "fedsim audit run/scenario.yaml" in result.stderr
    assert audit("run/scenario.yaml")["round"] == 1


def test_set_does_not_go_with_a_run_folder():
    assert fedsim("run", "leaky.yaml", "--output", "run", "-q").exit_code == 0
    result = fedsim("audit", "run", "--set", "rounds=2")
    assert result.exit_code == 1
    assert "audit the scenario file instead" in result.stderr
