"""Pytrees: records, what is saved of them and comes back, and arithmetic over their leaves."""

import dataclasses
import json
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim import tree as trees
from fedsim.errors import FedsimError
from fedsim.params import Params
from fedsim.tree import add, concat, device_of, dump, finite, flatten, load, nbytes, record, rows, stack, tree_leaves, tree_map, unflatten


@record
class Pair:
    first: Any
    second: Any


@record
class Holder:
    w: Params
    inside: Pair
    note: Any = None


@dataclasses.dataclass(frozen=True)
class Stranger:
    """A dataclass that nobody declared."""

    w: Any


def same(a, b):
    """Equal structure, types, dtypes, shapes and bits."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    elif isinstance(a, (Params, dict)):
        assert list(a) == list(b)
        for name in a:
            same(a[name], b[name])
    elif dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            same(left, right)
    else:
        assert a == b or a != a


def through_json(tree):
    """What comes back from a checkpoint: arrays as they are, the outline by way of JSON."""
    arrays, outline = dump(tree)
    return load(arrays, json.loads(json.dumps(outline)))


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def tensor(shape, dtype):
    return torch.arange(1, 1 + int(np.prod(shape))).reshape(shape).to(dtype)


TENSORS = st.builds(tensor, st.lists(st.integers(0, 3), max_size=3).map(tuple), st.sampled_from(DTYPES))
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=5))
NAMES = st.text("abc.", min_size=1, max_size=3)
TREES = st.recursive(
    st.one_of(TENSORS, PLAIN, st.dictionaries(NAMES, TENSORS, max_size=3).map(Params)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(NAMES, inner, max_size=3),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=8,
)


@settings(derandomize=True, deadline=None)
@given(TREES)
def test_whatever_is_saved_comes_back_to_the_bit(tree):
    same(through_json(tree), tree)


def test_a_state_with_everything_in_it_comes_back():
    w = Params({"layer.weight": tensor((2, 3), torch.bfloat16), "layer.bias": tensor((3,), torch.float32)})
    state = Holder(w, Pair((1, 2.5, "x"), [None, True, Holder(w, Pair({}, ()), {"t": tensor((), torch.int64)})]))
    back = through_json(state)
    same(back, state)
    assert isinstance(back.inside.second[2], Holder)


def test_a_view_is_saved_as_what_it_shows():
    base = torch.arange(12.0).reshape(3, 4)
    same(through_json([base.T, base[:, 1], base[1:]]), [base.T.contiguous(), base[:, 1].contiguous(), base[1:].contiguous()])


def test_saving_detaches_from_the_tape():
    (value,) = dump([torch.ones(2, requires_grad=True) * 2])[0].values()
    assert not value.requires_grad


@pytest.mark.parametrize(
    "tree",
    [{"a/b": torch.tensor([1.0]), "a": {"b": torch.tensor([2.0])}}, {0: torch.tensor([1.0]), "0": torch.tensor([2.0])}],
    ids=["slash", "number and text"],
)
def test_two_tensors_are_never_saved_under_one_name(tree):
    same(through_json(tree), tree)


@pytest.mark.parametrize("tree", [torch.Size([1, 2]), namedtuple("Point", "x y")(1, 2)], ids=["torch.Size", "namedtuple"])
def test_a_tuple_of_a_kind_of_its_own_comes_back_or_is_refused_when_it_is_saved(tree):
    """Never a checkpoint that cannot be read."""
    try:
        arrays, outline = dump({"shape": tree})
    except FedsimError:
        return
    assert load(arrays, outline) == {"shape": tree}


def test_a_dataclass_that_is_no_record_is_refused_by_name():
    with pytest.raises(FedsimError, match=r"Stranger cannot be saved: declare it with @record"):
        dump({"state": Stranger(torch.ones(1))})


@pytest.mark.parametrize("value", [np.ones(2), np.int64(1), {1, 2}, object(), torch.nn.Linear(1, 1), Pair], ids=lambda v: type(v).__name__)
def test_what_cannot_be_saved_is_refused(value):
    with pytest.raises(FedsimError, match="cannot be saved"):
        dump({"here": value})


def test_the_place_of_what_cannot_be_saved_is_named():
    with pytest.raises(FedsimError, match=r"a set cannot be saved \(at /state/1\)"):
        dump({"state": [1, {2}]})


@pytest.mark.parametrize("name", ["nobody.Knows", "builtins.dict", f"{__name__}.Stranger", "os.system"])
def test_a_record_that_this_installation_does_not_know_is_refused_by_name(name):
    with pytest.raises(FedsimError, match=f"holds a {name}, which this installation does not know"):
        load({}, {"list": [{"record": name, "fields": {}}]})


def test_a_record_is_frozen_and_a_container_for_its_fields():
    pair = Pair(torch.ones(2), (torch.zeros(1), torch.ones(3)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        pair.first = 1
    assert [tuple(leaf.shape) for leaf in tree_leaves(pair)] == [(2,), (1,), (3,)]
    doubled = tree_map(lambda leaf: 2 * leaf, pair)
    same(doubled, Pair(2 * torch.ones(2), (torch.zeros(1), 2 * torch.ones(3))))


def test_vmap_goes_through_records():
    stacked = Pair(torch.arange(6.0).reshape(3, 2), Params({"a": torch.arange(3.0)}))
    out = torch.vmap(lambda p: Pair(p.first.sum(), p.second * 2))(stacked)
    same(out, Pair(torch.tensor([1.0, 5, 9]), Params({"a": torch.tensor([0.0, 2, 4])})))


TENSOR_TREES = st.recursive(
    st.one_of(TENSORS, st.dictionaries(NAMES, TENSORS, max_size=3).map(Params)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(NAMES, inner, max_size=3),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=8,
)


@settings(derandomize=True, deadline=None)
@given(TENSOR_TREES)
def test_a_flattened_tree_comes_back_from_one_vector_for_each_dtype(tree):
    vectors, form = flatten(tree)
    assert all(v.ndim == 1 and v.is_contiguous() for v in vectors)
    assert len({v.dtype for v in vectors}) == len(vectors) == len({leaf.dtype for leaf in tree_leaves(tree)})
    assert sum(v.numel() for v in vectors) == sum(leaf.numel() for leaf in tree_leaves(tree))
    same(unflatten(vectors, form), tree)


@pytest.mark.parametrize("tree", [{}, (), Params({}), Pair((), {}), None, (None, torch.ones(2), None)], ids=str)
def test_empty_trees_and_empty_places_are_flattened_too(tree):
    same(unflatten(*flatten(tree)), tree)


def test_unflattened_leaves_are_their_own():
    """A view into the vector could be written through, and could be aligned otherwise."""
    vectors, form = flatten(Pair(torch.ones(3), torch.zeros(2)))
    back = unflatten(vectors, form)
    vectors[0].fill_(7)
    same(back, Pair(torch.ones(3), torch.zeros(2)))
    assert back.second.storage_offset() == 0


def stacked():
    """Three rows: a vector, a matrix and a number of each."""
    return Pair(torch.arange(6.0).reshape(3, 2), (Params({"m": torch.arange(12.0).reshape(3, 2, 2)}), torch.tensor([1.0, 2, 4])))


def test_a_weighted_sum_by_hand():
    out = trees.weighted_sum(stacked(), torch.tensor([1.0, 0.0, 0.5]))
    same(out, Pair(torch.tensor([2.0, 3.5]), (Params({"m": torch.tensor([[4.0, 5.5], [7, 8.5]])}), torch.tensor(3.0))))


def test_a_weighted_sum_keeps_each_leafs_dtype():
    out = trees.weighted_sum((torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3)), torch.tensor([0.25, 0.5]))
    same(out, (torch.full((3,), 0.75, dtype=torch.float64), torch.full((3,), 0.75)))


def test_stacking_concatenating_and_taking_rows_undo_each_other():
    tree = stacked()
    parts = [rows(tree, c) for c in range(3)]
    assert parts[1].second[1].shape == ()
    same(stack(parts), tree)
    same(concat([rows(tree, slice(0, 1)), rows(tree, slice(1, 3))]), tree)
    same(concat([tree]), tree)
    same(rows(tree, torch.tensor([2, 0])), stack([parts[2], parts[0]]))
    same(rows(tree, torch.tensor([True, False, True])), stack([parts[0], parts[2]]))


def test_plain_numbers_are_stacked_into_tensors():
    same(stack([{"n": 1.0}, {"n": 2.0}]), {"n": torch.tensor([1.0, 2.0])})


def test_adding_is_leaf_by_leaf():
    same(add(stacked(), stacked()), tree_map(lambda leaf: 2 * leaf, stacked()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_is_finite_if_all_of_its_leaves_are(bad):
    tree = {"m": torch.zeros(4, 2, 3), "v": torch.zeros(4, 5), "n": torch.zeros(4, 1, dtype=torch.int64)}
    assert finite(tree).tolist() == [True] * 4
    tree["m"][1, 0, 2] = bad
    tree["v"][3, 4] = bad
    assert finite(tree).tolist() == [True, False, True, False]


def test_a_row_may_be_a_single_number():
    """`[C]` is `[C, ...]`, too: a client's payload may hold a count or a loss."""
    assert finite({"loss": torch.tensor([1.0, float("nan"), 2.0]), "v": torch.zeros(3, 2)}).tolist() == [True, False, True]
    assert finite({"counts": torch.ones(3, 2, dtype=torch.int64)}).tolist() == [True] * 3
    huge = torch.tensor([[3e38, 3e38], [3e38, -3e38], [3e38, float("-inf")]])  # a sum that overflows is not yet an infinity
    assert finite({"v": huge}).tolist() == [True, True, False]


def test_nbytes_counts_what_tensors_weigh():
    assert nbytes(Pair(torch.zeros(3, dtype=torch.bfloat16), [torch.zeros(2, 2, dtype=torch.float64), None, "text", 5])) == 3 * 2 + 4 * 8
    assert nbytes({}) == 0


def test_only_what_was_not_in_ram_goes_to_a_device():
    arrays, outline = dump({"a": torch.ones(2), "b": torch.zeros(3)})
    outline["dict"][1][1]["accelerated"] = True  # as `dump` says of a tensor on a GPU
    here, there = (load(arrays, outline, device=device) for device in ("cpu", "meta"))
    same(here, {"a": torch.ones(2), "b": torch.zeros(3)})
    assert (there["a"].device.type, there["b"].device.type) == ("cpu", "meta")
    vectors, empty = flatten({"a": torch.ones(2), "b": torch.zeros(3)})
    empty["b"] = dataclasses.replace(empty["b"], accelerated=True)
    there = unflatten(vectors, empty, "meta")
    assert (there["a"].device.type, there["b"].device.type) == ("cpu", "meta")
    assert (device_of(there).type, device_of(here).type) == ("meta", "cpu")
