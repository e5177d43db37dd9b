"""Tables with a row for each client: values, in RAM and in a file, in checkpoints and after a crash."""

import gc
import os
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim import tree
from fedsim.errors import FedsimError
from fedsim.folder import Folder
from fedsim.params import Params
from fedsim.scenario import load, load_plugins
from fedsim.table import FOLDER, Storage, Table

load_plugins()
BLANK = Params({"a": torch.zeros(2, 3), "b": torch.full((1,), 7.0, dtype=torch.float64), "c": torch.tensor(1, dtype=torch.int32)})


def rows_of(seed: int, count: int) -> Params:
    random = np.random.default_rng(seed)
    return BLANK.map(lambda v: torch.from_numpy(np.asarray(random.integers(100, size=(count, *v.shape)))).to(v.dtype))


def same(a: Params, b: Params) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.fixture(params=["ram", "temporary file", "file in the run folder"])
def storage(request, tmp_path: Path) -> Storage:
    return {"ram": Storage(), "temporary file": Storage(limit=0), "file in the run folder": Storage(0, tmp_path)}[request.param]


def test_reads_what_was_written_and_the_blank_elsewhere(storage):
    table = Table.of(BLANK, 9, storage)
    assert same(table.get(np.array([3, 3, 0])), BLANK.map(lambda v: v.expand(3, *v.shape)))
    first, second = rows_of(0, 2), rows_of(1, 3)
    table = table.put(torch.tensor([1, 4]), first).put(np.array([8, 4, 0]), second)
    read = table.get(torch.tensor([4, 1, 2, 8]))
    for name, column in read.items():
        assert torch.equal(column, torch.stack([second[name][1], first[name][0], BLANK[name], second[name][0]]))
    assert np.flatnonzero(table.written).tolist() == [0, 1, 4, 8]
    assert table.on_disk == (storage.limit == 0)


def test_a_table_is_a_value_whatever_becomes_of_it_later(storage):
    """A random tree of tables, each compared with a dict that was copied: what one puts, the others do not see."""
    random = np.random.default_rng(0)
    ids = np.arange(9)
    tables = [(Table.of(BLANK, 9, storage), BLANK.map(lambda v: v.expand(9, *v.shape).clone()))]
    for step in range(200):
        table, model = tables[random.integers(len(tables))]
        chosen = random.choice(9, size=random.integers(1, 6), replace=False)
        new = rows_of(step, len(chosen))
        model = model.map(lambda v, u, chosen=chosen: v.index_copy(0, torch.from_numpy(chosen), u), new)
        tables.append((table.put(chosen, new), model))
        if len(tables) > 6:
            tables.pop(random.integers(len(tables)))
        assert all(same(t.get(ids), m) for t, m in tables)


def test_places_are_used_again_when_no_table_refers_to_them(storage):
    table = Table.of(BLANK, 100, storage)
    for step in range(50):
        table = table.put(np.arange(10), rows_of(step, 10))
    gc.collect()
    assert table._store.size <= 40
    assert (table._store.references > 0).sum() == 10


def test_rows_that_are_empty_cost_nothing():
    table = Table.of({}, 5).put(np.array([1]), {})
    assert table.get(np.array([1, 2])) == {}
    assert not table.written.any()


def test_a_checkpoint_in_ram_holds_the_rows_and_in_a_file_only_says_where_they_are(tmp_path):
    rows = rows_of(0, 3)
    for limit in (0, 1 << 20):
        folder = Folder(tmp_path / str(limit))
        folder.path.mkdir()
        table = Table.of(BLANK, 50, Storage(limit, folder.path)).put(np.array([2, 7, 40]), rows)
        arrays, outline = tree.dump({"h": table})
        assert any(a.shape == (3, 2, 3) for a in arrays.values()) == (limit > 0)
        again = tree.load(arrays, outline, folder.path)["h"]
        assert same(again.get(np.array([2, 7, 40])), rows)
        assert np.flatnonzero(again.written).tolist() == [2, 7, 40]


def test_what_a_checkpoint_refers_to_is_not_overwritten_while_it_is_kept(tmp_path):
    folder = Folder(tmp_path)
    table = Table.of(BLANK, 20, Storage(0, tmp_path))
    everyone, said = np.arange(20), {}
    for number in range(1, 9):
        for step in range(3):
            table = table.put(everyone[:15], rows_of(10 * number + step, 15))
        folder.save(number, {"h": table, "w": torch.ones(2)}, keep=2)
        said[number] = table.get(everyone)
    table = table.put(everyone[:15], rows_of(1, 15)).put(everyone[:5], rows_of(2, 5))  # rounds that a crash will lose
    size = table._store.size
    assert size <= 90  # twenty, twice fifteen kept, and what was being written
    del table, folder
    gc.collect()

    folder = Folder(tmp_path)  # another process
    number, saved = folder.latest()
    assert number == 8
    assert same(saved["h"].get(everyone), said[8])
    for step in range(5):
        saved = {"h": saved["h"].put(everyone, rows_of(step, 20))}
    (tmp_path / "checkpoints/round-00000008.json").unlink()  # back to the one before
    assert same(Folder(tmp_path).latest()[1]["h"].get(everyone), said[7])


def test_a_table_whose_file_is_gone_is_missed(tmp_path):
    table = Table.of(BLANK, 5, Storage(0, tmp_path)).put(np.array([0]), rows_of(0, 1))
    arrays, outline = tree.dump(table)
    with pytest.raises(FedsimError, match="no folder to look for it"):
        tree.load(arrays, outline)
    with pytest.raises(FedsimError, match="missing, and the checkpoint needs it"):
        tree.load(arrays, outline, tmp_path / "elsewhere")
    assert [file.name for file in (tmp_path / FOLDER).iterdir()] == ["0000"]


def test_a_file_that_is_cut_short_is_noticed(tmp_path):
    table = Table.of(BLANK, 5, Storage(0, tmp_path)).put(np.array([0, 1]), rows_of(0, 2))
    os.truncate(tmp_path / FOLDER / "0000", 10)
    with pytest.raises(FedsimError, match="0000: the file is shorter"):
        table.get(np.array([1]))


def test_a_disk_that_is_full_is_an_error_and_not_a_crash(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "pwritev", lambda *_: 3)
    with pytest.raises(FedsimError, match="a client's row of 36 bytes cannot be written: No space left on device"):
        Table.of(BLANK, 5, Storage(0, tmp_path)).put(np.array([0]), rows_of(0, 1))


def test_a_run_with_its_memory_in_a_file_is_the_run_in_ram_and_resumes_to_the_same_bits(tmp_path, monkeypatch):
    from fedsim import experiment
    from fedsim.world import build

    quickstart = Path(__file__).parents[1] / "scenarios/quickstart.yaml"
    fields = ("rounds=12", "output.checkpoint=3", "engine.workers=0", "evaluate.every=12", "evaluate.clients=false")
    for strategy in ("fedvarp", "{name: scaffold, local: scaffold-sgd}"):
        scenario, _ = load(quickstart, (*fields, f"strategy={strategy}"))
        world = build(scenario)
        logs = {}
        for name, limit, stop in (("ram", 1 << 30, 99), ("file", 0, 99), ("resumed", 0, 7)):
            path = tmp_path / strategy[:6] / name
            path.mkdir(parents=True)
            monkeypatch.setattr(Folder, "storage", property(lambda self, limit=limit: Storage(limit, self.path)))
            for most in (stop, 99):
                for row in islice(experiment.train(scenario, world, Folder(path)), most):
                    last = row
                if last["round"] == 12:
                    break
            logs[name] = (path / "metrics.jsonl").read_text()
            assert bool(list(path.glob("tables/*"))) == (limit == 0)
        assert logs["ram"] == logs["file"] == logs["resumed"]


def test_tables_of_one_folder_have_files_of_their_own(tmp_path):
    one, other = (Table.of(BLANK, 5, Storage(0, tmp_path)) for _ in range(2))
    one, other = one.put(np.array([0]), rows_of(0, 1)), other.put(np.array([0]), rows_of(1, 1))
    assert sorted(file.name for file in (tmp_path / FOLDER).iterdir()) == ["0000", "0001"]
    assert same(one.get(np.array([0])), rows_of(0, 1))
    assert same(other.get(np.array([0])), rows_of(1, 1))
    assert replace(Storage(0), folder=tmp_path).limit == 0
