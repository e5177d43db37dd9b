"""Sources, the federation they are made into, and the batches that clients see."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

import fedsim.data
from fedsim import rng
from fedsim.data import Data, Dataset, Examples, Lists, Proxy, Source, count_steps, plan, resolve_root
from fedsim.data.flower_partition import Dirichlet, Iid, Linear
from fedsim.data.partition import LabelSwap, Natural
from fedsim.data.source import held_out, named
from fedsim.errors import DataError
from fedsim.problem import Classification, MultiLabel, NextToken, Regression
from fedsim.registry import first_line

ROOT = Path(os.environ["FEDSIM_DATA"])


def make(name, **fields):
    return TypeAdapter(Source).validate_python({"name": name, **fields})


def load(name, root=ROOT, key=0, **fields):
    return make(name, **fields).load(Path(root), key)


# ---- the registry and the import law


def test_catalogue():
    assert len(Source.choices) == 19
    assert all(first_line(c) for c in Source.choices.values())
    with pytest.raises(ValidationError, match="vocabulry"):
        make("banking77", vocabulry=3)
    with pytest.raises(ValidationError):
        make("shakespeare", length=0)


def test_importing_the_room_is_light_and_stays_on_its_floor():
    code = (
        "import sys, fedsim.data; bad = {'flwr_datasets', 'datasets', 'pandas', 'sklearn', 'tokenizers', 'flwr', 'ray'} & set(sys.modules);"
        "above = tuple('fedsim.' + m for m in ('models', 'fleet', 'metrics', 'sim', 'scenario'));"
        "bad |= {m for m in sys.modules if m.startswith(above)};"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(fedsim.data.__file__).parents[2])


def test_root_comes_from_field_then_environment_then_home(monkeypatch):
    monkeypatch.setenv("FEDSIM_DATA", "/somewhere")
    assert resolve_root("here") == Path("here")
    assert resolve_root(None) == Path("/somewhere")
    monkeypatch.delenv("FEDSIM_DATA")
    assert resolve_root(None) == Path("~/.cache/fedsim").expanduser()


# ---- known data sets

REAL = [
    # name, fields, train x, test x, outputs, natural clients
    ("digits", {}, (1438, 1, 8, 8), (359, 1, 8, 8), 10, 0),
    ("fashion-mnist", {}, (60000, 1, 28, 28), (10000, 1, 28, 28), 10, 0),
    ("cifar10", {}, (10000, 3, 32, 32), (2000, 3, 32, 32), 10, 0),
    ("har", {}, (7971, 9, 128), (2328, 9, 128), 6, 30),
    ("heart", {}, (735, 13), (185, 13), 2, 4),
    ("shakespeare", {}, (19839, 80), (4875, 80), 79, 233),
    ("shakespeare", {"form": "leaf"}, (41990, 80), (3881, 80), 67, 10),
    ("banking77", {}, (10003, 32), (3080, 32), 77, 0),
    ("medquad", {"tokenizer": "bpe", "length": 16}, (13076, 16), (3331, 16), 16, 9),
    ("smsspam", {}, (4452, 32), (1122, 32), 2, 0),
]


@pytest.mark.parametrize(("name", "fields", "train", "test", "outputs", "groups"), REAL, ids=lambda v: v if isinstance(v, str) else "")
def test_real_data(name, fields, train, test, outputs, groups):
    data = load(name, **fields)
    assert (data.train.x.shape, data.test.x.shape, data.task.outputs, len(data.group_names)) == (train, test, outputs, groups)
    if data.groups is not None:
        assert set(data.groups) == set(range(groups))
    if data.train.x.dtype == np.float32:
        assert np.isfinite(data.train.x).all()
        assert abs(float(data.train.x.mean(dtype=np.float64))) < 0.02
        assert abs(float(data.train.x.std(dtype=np.float64)) - 1) < 0.02
    else:
        assert len(data.vocabulary) > data.train.x.max() >= 2
        assert data.vocabulary[:2] == ("[PAD]", "[UNK]")
        assert data.train.x.min() >= 0
    if isinstance(data.task, Classification):
        assert set(np.unique(data.train.y)) == set(range(outputs))


def test_pictures_may_stay_in_zero_to_one():
    x = load("cifar10", normalize=False).train.x
    assert (x.min(), x.max()) == (0, 1)


def test_har_never_divides_a_segment():
    data = load("har", normalize=False)
    with np.load(ROOT / "har/har_windows.npz", allow_pickle=False) as archive:
        held = ~np.isin(archive["segment"], data.blocks)
        assert held.sum() == len(data.test)
        assert (archive["x"][held].astype(np.float32) == data.test.x).all()
        assert len(np.unique(archive["subject"][held])) == 30
    federation = Data(make("har"), Natural(), client_test=0.3, proxy=Proxy(size=60), root=str(ROOT)).load(3)
    train, test = (set(data.blocks[lists.index]) for lists in (federation.train, federation.client_test))
    assert not train & test
    share = len(federation.client_test.index) / (len(federation.client_test.index) + len(federation.train.index))
    assert 0.27 < share < 0.33


def test_shakespeare_windows_share_nothing_and_predict_the_next_character():
    data = load("shakespeare", length=40, minimum=20000)
    texts = json.loads(gzip.decompress((ROOT / "shakespeare/by_role.json.gz").read_bytes()))
    assert (data.train.x[:, 1:] == data.train.y[:, :-1]).all()
    role = data.group_names[0]
    own = np.concatenate([data.train.x[data.groups == 0], data.train.y[data.groups == 0][:, -1:]], axis=1).ravel()
    assert "".join(data.vocabulary[t] for t in own) == texts[role][: len(own)]
    assert len(own) <= len(texts[role]) - round(0.2 * len(texts[role]))


def test_leaf_has_one_target_a_window():
    data = load("shakespeare", form="leaf", length=20)
    assert (data.train.y[:, :-1] == NextToken.IGNORE).all()
    assert (data.train.y[:, -1] >= 2).all()
    assert (data.blocks == data.groups).all()


def test_copies_of_a_text_are_on_one_side():
    def rows(part):
        return {row.tobytes() for row in part.x}

    raw = (ROOT / "text/smsspam/SMSSpamCollection").read_text(encoding="utf-8").split("\n")
    texts = [line.split("\t", 1)[1] for line in raw if line]
    assert len(set(texts)) < len(texts)
    data = load("smsspam", length=200, vocabulary=50000, tokenizer="word")
    # Different texts can have the same tokens (case), so allow for a handful.
    assert len(rows(data.train) & rows(data.test)) < 20
    assert len(np.unique(data.blocks)) < len(data.blocks)


TOKENS = """
import os, sys, hashlib
from pathlib import Path
from fedsim.data import Source
for kind in ("word", "bpe"):
    d = Source.choices["banking77"](tokenizer=kind, vocabulary=500).load(Path(os.environ["FEDSIM_DATA"]), 0)
    print(hashlib.sha256(d.train.x.tobytes() + d.test.x.tobytes() + repr(d.vocabulary).encode()).hexdigest())
"""


def test_tokenizers_are_the_same_in_every_process():
    seen = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command, home = [sys.executable, "-c", TOKENS], Path(__file__).parents[1]
        seen.add(subprocess.run(command, check=True, capture_output=True, env=environment, cwd=home).stdout)
    data = load("banking77", vocabulary=500)
    here = hashlib.sha256(data.train.x.tobytes() + data.test.x.tobytes() + repr(data.vocabulary).encode()).hexdigest()
    (printed,) = seen
    assert printed.decode().split()[0] == here
    assert len(data.vocabulary) == 500


# ---- files that are not there, or broken

FILES = {
    "mnist": "mnist/train-images-idx3-ubyte.gz",
    "fashion-mnist": "fashion-mnist/train-images-idx3-ubyte.gz",
    "cifar10": "cifar10/cifar10_x.npz",
    "cifar100": "cifar100/train.bin",
    "har": "har/har_windows.npz",
    "heart": "heart-disease/processed.cleveland.data",
    "shakespeare": "shakespeare/by_role.json.gz",
    "banking77": "text/banking77/train.csv",
    "medquad": "text/medquad/medquad.jsonl.gz",
    "smsspam": "text/smsspam/SMSSpamCollection",
}


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_says_where_it_belongs_and_where_to_get_it(name, tmp_path):
    with pytest.raises(DataError) as caught:
        load(name, tmp_path)
    assert caught.value.field == "data.source"
    assert str(tmp_path) in caught.value.message
    assert "https://" in caught.value.message


JUNK = [b"", b"\x00\x00\x08\x03 junk", b"PK\x03\x04junk", b"a,b\n1,2\n", b"[1, 2]\n", gzip.compress(b"{}x", mtime=0), b"\xff\xfe"]


@pytest.mark.parametrize("content", JUNK)
@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_named(name, content, tmp_path):
    path = tmp_path / FILES[name]
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    if name == "cifar100":
        (path.parent / "test.bin").write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(name, tmp_path)
    assert caught.value.field == "data.source"


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "evil.npz", x=np.array([{"a": 1}, None], dtype=object), y=np.array([0, 1]))
    with pytest.raises(DataError, match="allow_pickle=False"):
        load("npz", tmp_path, path="evil.npz")


def write_idx(path, array, header=None):
    head = bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((header or head) + array.tobytes())


def test_idx_files_are_read_raw_and_checked(tmp_path):
    pictures = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"mnist/{part}-images-idx3-ubyte", pictures)
        write_idx(tmp_path / f"mnist/{part}-labels-idx1-ubyte", np.array([7, 2], dtype=np.uint8))
    data = load("mnist", tmp_path, normalize=False)
    assert (np.round(data.train.x[:, 0] * 255) == pictures).all()
    assert list(data.test.y) == [7, 2]
    header = bytes((0, 0, 8, 3)) + b"".join(n.to_bytes(4, "big") for n in (2, 3, 3))
    write_idx(tmp_path / "mnist/train-images-idx3-ubyte", pictures[:1], header)
    with pytest.raises(DataError, match="9 bytes of content where its header says 2 x 3 x 3"):
        load("mnist", tmp_path)


def test_cifar_binary_versions(tmp_path):
    draw = np.random.default_rng(0)
    pictures = draw.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    for folder, labels, files in (
        ("cifar10/cifar-10-batches-bin", [[3], [9]], [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]),
        ("cifar100", [[1, 3], [2, 99]], ["train.bin", "test.bin"]),
    ):
        (tmp_path / folder).mkdir(parents=True)
        for file in files:
            (tmp_path / folder / file).write_bytes(b"".join(bytes(y) + x.tobytes() for x, y in zip(pictures, labels, strict=True)))
    ten, hundred = load("cifar10", tmp_path, normalize=False), load("cifar100", tmp_path, normalize=False)
    assert list(ten.train.y) == [3, 9] * 5
    assert list(hundred.test.y) == [3, 99]
    assert (np.round(ten.train.x[8:] * 255) == pictures).all()
    (tmp_path / "cifar10/cifar-10-batches-bin/data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_3\.bin"):
        load("cifar10", tmp_path)


# ---- your own files


def test_npz(tmp_path, monkeypatch):
    x, y = np.random.default_rng(0).normal(size=(60, 4)), np.arange(60) % 3
    np.savez(tmp_path / "a.npz", x=x, y=y, who=np.array(["b", "a"] * 30), xt=x[:5], yt=y[:5], many=np.ones((60, 2)))
    data = load("npz", tmp_path, path="a.npz", client="who")
    assert data.task == Classification(3)
    assert (len(data.train), len(data.test), data.group_names) == (48, 12, ("a", "b"))
    given_test = load("npz", tmp_path, path="a.npz", x_test="xt", y_test="yt", client="who")
    assert len(given_test.test) == 5
    assert list(given_test.groups[:2]) == [1, 0]
    assert load("npz", tmp_path, path="a.npz", y="many", task="multi-label").task == MultiLabel(2)
    assert load("npz", tmp_path, path="a.npz", task="regression").task == Regression(1)
    monkeypatch.chdir(tmp_path)
    assert len(load("npz", tmp_path / "elsewhere", path="a.npz").train) == 48  # then the current directory
    with pytest.raises(DataError, match="has no array nobody; it has x, y, who"):
        load("npz", tmp_path, path="a.npz", client="nobody")
    with pytest.raises(DataError, match="labels are whole numbers"):
        load("npz", tmp_path, path="a.npz", y="many")
    x[7, 2] = np.nan
    np.savez(tmp_path / "b.npz", x=x, y=y)
    with pytest.raises(DataError, match="x has nan in row 7, column 2"):
        load("npz", tmp_path, path="b.npz")
    np.savez(tmp_path / "b.npz", x=np.full((4, 1), 1e300), y=np.arange(4))
    with pytest.raises(DataError, match="x has inf in row 0, column 0"):
        load("npz", tmp_path, path="b.npz")


TABLE = "age,town,sick,ward\n" + "".join(
    f"{20 + i},{'ABC'[i % 3]},{'yes' if i % 2 else 'no'},{'north' if i < 15 else 'south'}\n" for i in range(30)
)


def test_csv(tmp_path):
    (tmp_path / "t.csv").write_text(TABLE)
    data = load("csv", tmp_path, path="t.csv", target="sick", client="ward")
    assert data.task == Classification(2, ("no", "yes"))
    assert data.train.x.shape == (24, 4)  # age, and one column a town
    assert abs(data.train.x[:, 0].mean()) < 1e-6
    assert set(np.unique(data.train.x[:, 1:])) == {0, 1}
    assert data.group_names == ("north", "south")
    regression = load("csv", tmp_path, path="t.csv", target="age", task="regression", normalize=False)
    assert regression.train.y.min() >= 20
    assert regression.train.y.shape == (24, 1)
    with pytest.raises(DataError, match="has no column illness; its columns are age, town"):
        load("csv", tmp_path, path="t.csv", target="illness")
    (tmp_path / "t.csv").write_text(TABLE.replace("\n25,", "\n,"))
    with pytest.raises(DataError, match=r"has '' in row 7 \(the header is row 1\), column 'age'"):
        load("csv", tmp_path, path="t.csv", target="sick")
    (tmp_path / "t.csv").write_text(TABLE + "1,2\n")
    with pytest.raises(DataError, match="row 32 has 2 cells, the header has 4"):
        load("csv", tmp_path, path="t.csv", target="sick")


def test_jsonl(tmp_path):
    rows = [{"q": f"word{i} and {'good' if i % 2 else 'bad'}", "kind": i % 2, "by": f"p{i % 3}"} for i in range(40)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load("jsonl", tmp_path, path="t.jsonl", text="q", label="kind", client="by", length=5, vocabulary=10)
    assert (data.train.x.shape, data.task, data.group_names) == ((32, 5), Classification(2, ("0", "1")), ("p0", "p1", "p2"))
    assert "and" in data.vocabulary
    assert (data.train.x[:, 3:] == 0).all()
    with pytest.raises(DataError, match="line 1 lacks one of the fields text"):
        load("jsonl", tmp_path, path="t.jsonl")


# ---- made up, and from elsewhere


def test_synthetic_is_keyed_and_natural():
    one, again, other = (load("synthetic", key=k, clients=8) for k in (1, 1, 2))
    assert (one.train.x == again.train.x).all()
    assert one.train.x.shape != other.train.x.shape
    sizes = np.bincount(one.groups)
    assert len(sizes) == 8
    assert sizes.min() >= 45
    assert abs(load("synthetic", iid=True, alpha=0, beta=0).train.x.mean()) < 0.05
    # Inputs' deviations are j^-0.6 around each client's centre.
    mine = one.train.x[one.groups == sizes.argmax()].astype(np.float64)
    assert mine[:, 0].std() > 3 * mine[:, 30].std()


def test_synthetic_images_are_keyed_and_lie_around_one_pattern_a_class():
    one, again, other = (load("synthetic-images", key=k, train=4000, test=50, shape=(1, 4, 5), signal=0.5) for k in (1, 1, 2))
    assert one.train.x.shape == (4000, 1, 4, 5)
    assert one.test.x.shape == (50, 1, 4, 5)
    assert (one.train.x == again.train.x).all()
    assert not (one.train.x == other.train.x).all()
    means = np.stack([one.train.x[one.train.y == k].mean(0) for k in range(10)])
    assert -0.1 < means.min() < means.max() < 0.6  # U(0, 1/2), give or take 5 deviations of a mean of 400
    noise = one.train.x - means[one.train.y]
    assert abs(noise.std() - 12**-0.5) < 0.01


@pytest.mark.parametrize("heterogeneity", [0.0, 2.0])
def test_least_squares_optimum_has_no_gradient(heterogeneity):
    federation = Data(make("least-squares", heterogeneity=heterogeneity), Natural()).load(4)
    x, y = federation.x.double(), federation.y.double()
    residual = x @ federation.optimum.T - y  # [M, 1]
    assert (x.T @ residual / len(x)).abs().max() < 1e-10
    assert federation.clients == 10
    own = [torch.linalg.lstsq(x[i], y[i]).solution for i in map(federation.train.of, range(10))]
    distance = torch.stack([(w.T - federation.optimum).norm() for w in own]).mean()
    assert (distance > 1) == (heterogeneity > 0)
    # The optimum of all examples is not that of those which are left.
    assert Data(make("least-squares"), Natural(), client_test=0.2).load(4).optimum is None


def test_huggingface(monkeypatch):
    import datasets

    string = datasets.Value("string")
    features = datasets.Features({"text": string, "label": datasets.ClassLabel(names=["neg", "pos"]), "who": string})
    rows = {"text": [f"this is {i}" for i in range(10)], "label": [0, 1] * 5, "who": ["u", "v"] * 5}
    asked = []

    def fake(path, name, split):
        asked.append((path, name, split))
        if split == "nope":
            raise ConnectionError("offline")
        if path == "me/pixels":
            numbers = [np.full((2, 2), i).tolist() for i in range(10)]
            return datasets.Dataset.from_dict({"image": numbers, "label": [0, 10, 2, 10, 0] * 2})
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    data = load("huggingface", path="me/texts", client="who", length=4)
    assert asked == [("me/texts", None, "train"), ("me/texts", None, "test")]
    assert (data.task, data.group_names, data.train.x.shape) == (Classification(2, ("neg", "pos")), ("u", "v"), (10, 4))
    numbers = load("huggingface", path="me/pixels", input="image", test_split=None)
    assert numbers.task.names == ("0", "2", "10")
    assert numbers.train.x.shape == (8, 2, 2)
    with pytest.raises(DataError, match=r"cannot load split 'nope' of https://huggingface.co/datasets/me/texts: ConnectionError: offline"):
        load("huggingface", path="me/texts", train_split="nope")
    with pytest.raises(DataError, match="has no column body; its columns are text, label, who"):
        load("huggingface", path="me/texts", input="body")


def test_python_function(tmp_path, monkeypatch):
    (tmp_path / "my_own_data.py").write_text(
        "import numpy as np\nfrom fedsim.data import Dataset, Examples\nfrom fedsim.problem import Regression\n"
        "def tiny():\n    e = Examples(np.ones((4, 2), np.float32), np.ones((4, 1), np.float32))\n    return Dataset(Regression(1), e, e)\n"
        "def wrong():\n    return 3\n"
        "def short():\n    return Dataset(Regression(1), *[Examples(np.ones((4, 2), np.float32), np.ones((3, 1), np.float32))] * 2)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(load("python", function="my_own_data:tiny").train) == 4
    for function, message in (
        ("my_own_data", "must be written 'module:function'"),
        ("no_such_module_x:f", "cannot be imported"),
        ("my_own_data:tinny", r"has no function 'tinny' \(did you mean 'tiny'\?\)"),
        ("my_own_data:wrong", "returned a int"),
        ("my_own_data:short", "train has 4 inputs and 3 targets"),
    ):
        with pytest.raises(DataError, match=message):
            load("python", function=function)


def test_held_out_takes_whole_units_of_each_stratum():
    units = np.repeat(np.arange(50), 4)
    strata = units % 2
    out = held_out(strata, units)
    assert out.sum() == 40
    assert out[strata == 0].sum() == 20
    assert all(len(set(out[units == u])) == 1 for u in range(50))
    assert named(["10", "9", "b", "9"])[1] == ("9", "10", "b")


# ---- the federation


@dataclass(frozen=True)
class Toy(Source):
    """A source for tests."""

    n: int = 120
    classes: int = 4
    blocks: int = 0

    def load(self, root, key):
        y = np.arange(self.n) % self.classes
        x = np.arange(self.n, dtype=np.float32)[:, None]
        test = Examples(1e6 + np.arange(30, dtype=np.float32)[:, None], np.arange(30) % self.classes)
        blocks = np.arange(self.n) // self.blocks if self.blocks else None
        groups = np.arange(self.n) * 5 // self.n
        return Dataset(Classification(self.classes), Examples(x, y), test, groups, tuple("abcde"), blocks)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([Iid(), Natural(), Linear(), Dirichlet(1.0), LabelSwap(0.5, odd=(2, 3))]),
    st.integers(1, 5),
    st.floats(0, 0.9),
    st.one_of(st.none(), st.builds(Proxy, source=st.sampled_from(["train", "test"]), size=st.integers(1, 25), balanced=st.booleans())),
    st.sampled_from([0, 3, 7]),
    st.integers(0, 2**64 - 1),
)
def test_no_example_is_in_two_places(partition, clients, client_test, proxy, blocks, key):
    data = Data(Toy(blocks=blocks), partition, clients, client_test, proxy)
    try:
        federation = data.load(key)
    except DataError as error:  # a fraction or a division that so few examples do not allow
        if error.field not in ("data.client_test", "data.partition"):
            raise
        return
    places = [federation.x[federation.train.index], federation.x[federation.client_test.index], federation.test_x]
    places += [] if federation.proxy is None else [federation.proxy.x]
    everything = torch.cat(places).flatten()
    assert len(everything.unique()) == len(everything)
    assert (federation.train.sizes > 0).all()
    assert federation.clients == clients == len(federation.sizes)
    if proxy is not None:
        assert len(federation.proxy.x) == proxy.size
        assert federation.proxy.mask is None
        if proxy.balanced:
            counts = torch.bincount(federation.proxy.y, minlength=4)
            assert counts.max() - counts.min() <= 1
    if blocks:
        for i in range(clients):
            assert not set(federation.train.of(i) // blocks) & set(federation.client_test.of(i) // blocks)
    elif client_test:
        total = federation.train.sizes + federation.client_test.sizes
        assert (federation.client_test.sizes == np.minimum(np.round(client_test * total), total - 1)).all()
    assert (federation.label_counts().sum(1) == federation.train.sizes).all()


def test_keyed_and_fingerprinted():
    data = Data(Toy(), Dirichlet(1.0), 4, client_test=0.25, proxy=Proxy(fraction=0.1))
    assert data.load(5).fingerprint() == data.load(5).fingerprint() != data.load(6).fingerprint()
    swapped = [Data(Toy(), LabelSwap(level, odd=(2, 3)), 4).load(5).fingerprint() for level in (0.5, 1.0)]
    assert swapped[0] != swapped[1]  # the same lists, other labels


def test_label_swap_reaches_clients_and_not_the_server():
    federation = Data(Toy(), LabelSwap(1.0, odd=(2, 3)), 2, client_test=0.2).load(0)
    true = torch.arange(120) % 4
    for i, map_ in ((0, [1, 0, 2, 3]), (1, [0, 1, 3, 2])):
        for lists in (federation.train, federation.client_test):
            own = torch.from_numpy(lists.of(i))
            assert (federation.y[own] == torch.tensor(map_)[true[own]]).all()
    assert (federation.test_y == torch.arange(30) % 4).all()


def test_names_and_errors():
    assert Data(Toy(), Natural()).load(0).names == tuple("abcde")
    assert Data(Toy(), clients=2).load(0).names == ("client 0", "client 1")
    with pytest.raises(DataError, match="say how many clients"):
        Data(Toy()).load(0)
    with pytest.raises(DataError, match="130 examples cannot be taken out of 120"):
        Data(Toy(), clients=2, proxy=Proxy(size=130)).load(0)
    with pytest.raises(ValueError, match="either `size` or `fraction`"):
        Proxy()
    with pytest.raises(DataError, match="leaves every client without a test example"):
        Data(Toy(blocks=120), clients=1, client_test=0.5).load(0)


def test_the_data_section_validates():
    section = {"source": "digits", "partition": {"name": "dirichlet", "alpha": 0.3}, "clients": 5, "proxy": {"size": 50}}
    federation = TypeAdapter(Data).validate_python(section).load(1)
    assert federation.input_shape == (1, 8, 8)
    assert len(federation.proxy.x) == 50
    assert federation.label_counts().sum() == 1438 - 50
    schema = TypeAdapter(Data).json_schema()
    assert "client_test" in schema["properties"]
    with pytest.raises(ValidationError):
        TypeAdapter(Data).validate_python({**section, "client_test": 1.0})


# ---- batches


@dataclass
class Program:
    epochs: int = 1
    steps: int | None = None
    batch_size: int | None = 4

    def chances(self, sizes):
        return None


def lists_of(sizes):
    offset = np.concatenate([[0], np.cumsum(sizes)])
    return Lists(rng.generator(1).permutation(int(offset[-1])) + 1000, offset)


def planned(program, sizes, ids, lists=None, keys=None):
    lists = lists or lists_of(sizes)
    keys = rng.fold_each(7, np.arange(len(sizes))) if keys is None else keys
    return plan(program, lists, np.asarray(ids), keys[ids]), lists


def test_an_epoch_is_cut_into_batches_the_last_one_partial():
    work, lists = planned(Program(epochs=2, batch_size=4), [10, 3], [0, 1])
    assert work.index.shape == (2, 6, 4)
    assert list(work.steps) == [6, 2]
    assert work.mask[0].sum(1).tolist() == [4, 4, 2, 4, 4, 2]
    assert work.mask[1].sum(1).tolist() == [3, 3, 0, 0, 0, 0]
    for epoch in range(2):
        steps = slice(3 * epoch, 3 * epoch + 3)
        assert sorted(work.index[0, steps][work.mask[0, steps] > 0]) == sorted(lists.of(0))
    assert (work.index[work.mask == 0] == 0).all()
    assert (work.index[0, :3] != work.index[0, 3:]).any()
    assert (work.index.dtype, work.mask.dtype, work.n.dtype) == (np.int64, np.float32, np.float32)


def test_steps_cut_and_extend_epochs():
    sizes = [10, 3, 0]
    assert list(count_steps(Program(steps=5), np.array(sizes))) == [5, 5, 0]
    assert list(count_steps(Program(epochs=3), np.array(sizes))) == [9, 3, 0]
    assert list(count_steps(Program(epochs=3, batch_size=None), np.array(sizes))) == [3, 3, 0]
    five, _ = planned(Program(steps=5), sizes, [0, 1, 2])
    whole, _ = planned(Program(epochs=5), sizes, [0, 1, 2])
    assert (five.index[0] == whole.index[0, :5]).all()
    assert (five.mask[1].sum(1) == 3).all()
    assert (five.index[1, :, :3] == whole.index[1, :5, :3]).all()
    full, lists = planned(Program(batch_size=None), sizes, [0, 1])
    assert full.index.shape == (2, 1, 10)
    assert sorted(full.index[0, 0]) == sorted(lists.of(0))
    with pytest.raises(ValueError, match="decreasing"):
        planned(Program(), sizes, [1, 0])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.integers(1, 3),
    st.one_of(st.none(), st.integers(1, 12)),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_work_covers_each_epoch_once_and_does_not_depend_on_the_chunk(sizes, epochs, steps, batch_size):
    program = Program(epochs, steps, batch_size)
    ids = np.argsort(-count_steps(program, np.array(sizes)), kind="stable")
    work, lists = planned(program, sizes, ids)
    for row, i in enumerate(ids):
        alone, _ = planned(program, sizes, np.array([i]), lists)
        s, b = alone.index.shape[1:]
        assert s == work.steps[row]
        assert (work.index[row, :s, :b] == alone.index[0]).all()
        assert (work.mask[row, :s, :b] == alone.mask[0]).all()
        assert work.mask[row, s:].sum() == work.mask[row, :, b:].sum() == 0
        if steps is None:
            used = work.index[row][work.mask[row] > 0]
            assert (np.bincount(used - 1000, minlength=sum(sizes))[lists.of(i) - 1000] == epochs).all()
            assert len(used) == epochs * sizes[i]
            first = alone.index[0, : s // epochs][alone.mask[0, : s // epochs] > 0]
            assert sorted(first) == sorted(lists.of(i))
