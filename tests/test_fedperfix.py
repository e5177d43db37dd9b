"""FedPerfix: what a plug-in adds to attention, how it starts, what stays with its client; it is `fedsim` with that."""

import numpy as np
import pytest
import torch
from test_fedalt import SOME, array, deployed
from toy import Toy, close

from fedsim.data import Lists
from fedsim.errors import FedsimError
from fedsim.local import Sgd
from fedsim.models.attention import Attention, Vit
from fedsim.models.model import realise
from fedsim.models.prefix import PrefixedAttention, PrefixVit
from fedsim.params import Params
from fedsim.problem import Classification, Network, Problem
from fedsim.split import owned
from strategies.fedalt import FedSim
from strategies.fedperfix import FedPerfix

SMALL = Vit(patch=4, dim=8, depth=2, heads=2)
TASK = Classification(3)


def net(model, seed: int = 1) -> tuple[torch.nn.Module, Params]:
    module, w, _ = realise(model, (1, 8, 8), torch.float64, 3, None, seed, TASK)
    return module, w


def test_a_plug_in_by_hand():
    """One head, two tokens of two numbers. The numbers come from

    import numpy as np
    z = np.array([[1., 2.], [0., -1.]])
    wq, wk, wv = np.eye(2), np.array([[1., 1.], [0., 1.]]), np.array([[2., 0.], [0., 1.]])
    down, up, s = np.array([[1., -1.]]), np.array([[.5], [1.], [-1.], [2.]]), 1.5
    p = np.tanh(z @ down.T) @ up.T
    q, k, v = z @ wq.T, z @ wk.T + s * p[:, :2], z @ wv.T + s * p[:, 2:]
    a = np.exp(q @ k.T / 2**.5)
    print((a / a.sum(1, keepdims=True) @ v).round(8).tolist())
    """
    plain = Attention(2, 1).double()
    down, up = torch.nn.Linear(2, 1, bias=False).double(), torch.nn.Linear(1, 4, bias=False).double()
    given = [(plain.query, np.eye(2)), (plain.key, [[1, 1], [0, 1]]), (plain.value, [[2, 0], [0, 1]]), (plain.out, np.eye(2))]
    with torch.no_grad():
        for layer, weight in [*given, (down, [[1, -1]]), (up, [[0.5], [1], [-1], [2]])]:
            layer.weight.copy_(torch.tensor(np.array(weight)))
            if layer.bias is not None:
                layer.bias.zero_()
    layer = PrefixedAttention(plain, torch.nn.Sequential(down, torch.nn.Tanh(), up), 1.5)
    z = torch.tensor([[[1.0, 2.0], [0.0, -1.0]]]).double()
    close(layer(z, None)[0].detach().numpy(), [[2.94530677, -0.21258817], [0.46951751, 0.69432182]])


def test_it_starts_as_the_plain_network_where_plug_ins_are_zero_and_with_its_weights_anyhow():
    kinds = (SMALL, PrefixVit(SMALL, mid=5, start="zero"), PrefixVit(SMALL, mid=5))
    (plain, w), (zero, w_zero), (random, w_random) = map(net, kinds)
    for name, value in w.items():
        assert torch.equal(value, w_zero[name])
        assert torch.equal(value, w_random[name])
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    outputs = [Network(module)(dict(p), x) for module, p in ((plain, w), (zero, w_zero), (random, w_random))]
    close(outputs[0].detach(), outputs[1].detach(), within=1e-12)
    assert (outputs[0] - outputs[2]).abs().max() > 1e-3
    assert len([name for name in w_random if ".prefix." in name]) == 2 * 4
    assert len([name for name in net(PrefixVit(SMALL, form="linear"))[1] if ".prefix." in name]) == 2 * 2


def pictures(model) -> Toy:
    """Five clients with five small pictures each."""
    module, w = net(model)
    random = np.random.default_rng(4)
    x, y = torch.from_numpy(random.normal(size=(25, 1, 8, 8))), torch.from_numpy(random.integers(0, 3, 25))
    problem = Problem(Network(module), TASK, torch.full((5,), 5.0), version=torch.zeros((), dtype=torch.float64))
    return Toy(problem, w, x, y, Lists.of_clients(np.split(np.arange(25), 5)))


@pytest.mark.parametrize("mode", ["vmap", "loop"])
def test_it_is_fedsim_with_plug_ins_and_head_of_ones_own(mode):
    toy, program = pictures(PrefixVit(SMALL, mid=5)), Sgd(lr=0.1, epochs=2, batch_size=2)
    state, models = deployed(FedPerfix(program), toy, 3, SOME, mode)
    other, same = deployed(FedSim(program, own=("prefix", "head")), toy, 3, SOME, mode)
    for a, b in zip([state.w, *models], [other.w, *same], strict=True):
        np.testing.assert_array_equal(array(a), array(b))
    mine = FedPerfix().owned(toy.problem, toy.w)
    assert {name.split(".")[-3 if "prefix" in name else -2] for name in mine} == {"prefix", "head"}
    assert len(mine) == 2 * 4 + 2
    moved = [name for name in mine if not torch.equal(models[0][name], toy.w[name])]
    assert moved == list(mine)
    assert set(state.w) == set(toy.w) - set(mine)
    assert all(torch.equal(models[0][name], models[4][name]) for name in state.w)


def test_more_may_stay_and_a_model_without_plug_ins_is_refused():
    toy = pictures(PrefixVit(SMALL, mid=5))
    also = FedPerfix(also=r"layers\.1").owned(toy.problem, toy.w)
    assert set(FedPerfix().owned(toy.problem, toy.w)) < set(also)
    assert "encoder.layers.1.up.weight" in also
    assert "encoder.layers.0.up.weight" not in also
    assert set(owned(toy.problem, toy.w, "attention")) == {n for n in toy.w if ".attention." in n}
    plain = pictures(SMALL)
    with pytest.raises(FedsimError, match="the model has no adapters"):
        FedPerfix().owned(plain.problem, plain.w)
