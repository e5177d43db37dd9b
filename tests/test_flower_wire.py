"""Pytrees on Flower's wire: what goes in comes out, and what is not as it should be is refused by name."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from flwr import app as flwr
from hypothesis import given
from hypothesis import strategies as st

from fedsim import flower
from fedsim.errors import FedsimError
from fedsim.flower import wire
from fedsim.flower.wire import Malformed
from fedsim.params import Params
from fedsim.tree import Leaf, record, tree_leaves


@record
class Pair:
    """A record of this file."""

    w: Params
    count: torch.Tensor


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]
LIKE = Pair(Params({"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(3, dtype=torch.bfloat16)}), torch.zeros((), dtype=torch.int64))


def sample(scale: float = 1.0) -> Pair:
    weight = torch.arange(6.0).view(2, 3) * scale
    return Pair(Params({"a.weight": weight, "a.bias": torch.tensor([0.5, -1.0, 3.0]).bfloat16()}), torch.tensor(7))


def stacked(*pairs: Pair) -> Pair:
    return torch.utils._pytree.tree_map(lambda *leaves: torch.stack(leaves), *pairs)


def same(a, b) -> None:
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)], ids=str)
def test_a_tensor_of_any_kind_comes_back(dtype, shape):
    tensor = torch.arange(max(1, int(np.prod(shape))))[: int(np.prod(shape))].view(shape).to(dtype)
    array = wire.encode(tensor)
    back = wire.decode(array, "x")
    assert back.dtype == dtype
    assert torch.equal(back, tensor)
    assert array.shape == shape
    if dtype != torch.bfloat16:  # Flower's own reader sees the same
        np.testing.assert_array_equal(array.numpy(), tensor.numpy())


def test_not_a_number_and_infinity_keep_their_bits():
    tensor = torch.tensor([float("nan"), float("inf"), -0.0]).bfloat16()
    assert torch.equal(wire.decode(wire.encode(tensor), "x").view(torch.uint16), tensor.view(torch.uint16))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_an_order_comes_back_whole(values):
    message = {"state": sample(), "rate": 0.5, "name": "x", "list": [torch.tensor(values), None, True], "pair": (1, 2)}
    back = wire.tree_of(*wire.arrays(message))
    assert back["rate"] == 0.5
    assert back["list"][1:] == [None, True]
    assert back["pair"] == (1, 2)
    assert isinstance(back["state"], Pair)
    assert torch.equal(back["list"][0], torch.tensor(values))
    same(back["state"], message["state"])


def test_a_tensor_transposed_by_the_sender_is_the_same_tensor():
    tensor = torch.arange(6.0).view(2, 3)
    array = flwr.Array(np.asfortranarray(tensor.numpy()))
    assert torch.equal(wire.decode(array, "x"), tensor)


def test_an_update_is_read_in_the_form_that_is_due():
    stack = stacked(sample(), sample(2.0))
    same(wire.read(wire.unpack(wire.arrays(stack)[0]), LIKE, 2), stack)
    same(wire.read(wire.unpack(wire.arrays(sample())[0]), LIKE), sample())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)], ids=str)
def test_tensors_of_any_kind_travel_as_one_array(dtype, shape):
    tensor = torch.arange(max(1, int(np.prod(shape))))[: int(np.prod(shape))].view(shape).to(dtype)
    sent = {"a": tensor, "the same again": tensor, "b": torch.arange(6.0).view(2, 3).T}
    record = wire.pack(sent)
    assert len(record) == 1
    back = wire.unpack(record)
    assert back.keys() == sent.keys()
    for name, value in sent.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value)


def test_a_record_without_tensors_is_empty():
    assert len(wire.pack({})) == 0
    assert wire.unpack(wire.pack({})) == {}


def packed(data: bytes, kind: str = "safetensors", name: str = "safetensors") -> flwr.ArrayRecord:
    return flwr.ArrayRecord({name: flwr.Array("uint8", (len(data),), kind, data)})


WHOLE = wire.pack({"a": torch.ones(3)})["safetensors"].data
UNREADABLE = {
    "bytes that are missing": packed(WHOLE[:-4]),
    "bytes that nobody named": packed(WHOLE + b"0000"),
    "bytes of something else": packed(b"cos\nsystem\n(S'true'\ntR."),
    "no bytes": packed(b""),
    "a header without end": packed(b"\xff" * 16),
    "a dtype that is none": packed(WHOLE.replace(b'"F32"', b'"O32"')),
    "a shape that is a lie": packed(WHOLE.replace(b"[3]", b"[4]")),
    "another format": packed(WHOLE, kind="pickle"),
    "another name": packed(WHOLE, name="a"),
    "arrays of NumPy's": flwr.ArrayRecord({"a": flwr.Array(np.ones(3))}),
    "one too many": flwr.ArrayRecord({**packed(WHOLE), "a": flwr.Array(np.ones(3))}),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_is_no_safetensors_is_refused(case):
    with pytest.raises(Malformed, match=r"not in the format of safetensors|not one of safetensors"):
        wire.unpack(UNREADABLE[case])


def altered(**changes):
    tensors = wire.unpack(wire.arrays(sample())[0])
    for name, tensor in changes.items():
        name = name.replace("_", "/", 1)
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    return tensors


BAD = {
    "a missing name": ({"w_a.bias": None}, "lacks w/a.bias"),
    "a foreign name": ({"w_evil": torch.zeros(2)}, "has w/evil"),
    "another shape": ({"w_a.weight": torch.zeros(3, 2)}, r"float32\[3, 2\] at w/a.weight"),
    "another dtype": ({"w_a.weight": torch.zeros(2, 3).double()}, r"float64\[2, 3\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_update_is_refused_by_name(case):
    changes, reason = BAD[case]
    with pytest.raises(Malformed, match=reason):
        wire.read(altered(**changes), LIKE)


NPY = flwr.Array(np.zeros((2, 3), dtype=np.float32))
BAD_ARRAYS = {
    "a shape that is a lie": (flwr.Array("float32", (2, 3), "numpy.ndarray", flwr.Array(np.zeros(1)).data), "says it is"),
    "bytes that are missing": (flwr.Array("float32", (2, 3), "numpy.ndarray", NPY.data[:-4]), "holds 20 bytes"),
    "bytes of something else": (flwr.Array("float32", (2, 3), "numpy.ndarray", b"cos\nsystem\n"), "not in NumPy's format"),
    "another format": (flwr.Array("float32", (2, 3), "pickle", NPY.data), "'pickle'"),
    "bfloat16 that is not": (flwr.Array("bfloat16", (3,), "numpy.ndarray", flwr.Array(np.zeros(3)).data), "says it is bfloat16"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_a_malformed_array_of_an_app_is_refused(case):
    array, reason = BAD_ARRAYS[case]
    with pytest.raises(Malformed, match=reason):
        wire.decode(array, "x")


def test_objects_are_never_unpickled():
    data = NPY.data.replace(b"'<f4'", b"'|O' ")
    with pytest.raises(Malformed, match=r"no object|not in NumPy"):
        wire.decode(flwr.Array("float32", (2, 3), "numpy.ndarray", data), "x")


def test_rows_that_are_not_finite_or_too_long_are_refused_and_the_others_kept():
    rows = [sample(), sample(float("nan")), sample(100.0), sample(float("inf"))]
    assert wire.faults(stacked(*rows)) == {1: "update is not finite", 3: "update is not finite"}
    assert wire.faults(stacked(*rows), 50.0) == {1: "update is not finite", 2: "update is longer than 50", 3: "update is not finite"}
    assert wire.faults({}) == {}


def test_metrics_come_back_for_each_client():
    metrics = {"loss": (torch.tensor([1.5, 2.0]).double(), torch.tensor([3.0, 4.0]).double())}
    back = wire.metrics_of(wire.metrics_record(metrics), 2)
    assert {name: [each.tolist() for each in pair] for name, pair in back.items()} == {"loss": [[1.5, 2.0], [3.0, 4.0]]}
    for sent, count in (
        (wire.metrics_record(metrics), 3),
        (flwr.MetricRecord({"loss.sum": [1.0]}), 1),
        (flwr.MetricRecord({"loss": 1.0}), 1),
        (flwr.MetricRecord({"loss.sum": [float("nan")], "loss.weight": [1.0]}), 1),
    ):
        with pytest.raises(Malformed, match="metric"):
            wire.metrics_of(sent, count)


def test_an_order_that_is_not_whole_is_refused():
    record, outline = wire.arrays({"w": torch.ones(2)})
    for broken, text in (
        (record, "{"),
        (record, outline.replace("/w", "/v")),
        (record, '{"record": "os.System", "fields": {}}'),
        (record, '{"leaf": "fedsim.table.Table", "saved": {}}'),
        (record, "1"),
        (wire.arrays({"w": torch.tensor([1.0, float("nan")])})[0], outline),
    ):
        with pytest.raises(FedsimError):
            wire.tree_of(broken, text)


def test_what_lies_in_files_is_not_sent():
    class Rows(Leaf):
        def save(self):
            return 1

        @classmethod
        def load(cls, saved, folder):
            raise AssertionError("never loaded")

    with pytest.raises(FedsimError, match="cannot be sent"):
        wire.arrays({"rows": Rows()})


@pytest.mark.parametrize("version", ["1.41.0", "1.42.0", "1.42.1.dev2"])
def test_supported_versions_pass(version):
    flower.check(version)


@pytest.mark.parametrize("version", ["1.40.9", "1.43.0", "2.0.0", "0.1", "weird", None])
def test_other_versions_are_refused_with_the_remedy(version):
    with pytest.raises(FedsimError, match=r"pip install 'flwr>=1\.41,<1\.43'"):
        flower.check(version)


def test_telemetry_is_off_before_flower_is_imported():
    script = "import fedsim.flower.wire\nfrom flwr.supercore import telemetry\nprint(telemetry.FLWR_TELEMETRY_ENABLED)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
