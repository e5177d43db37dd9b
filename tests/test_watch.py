"""The page that watches runs: what it lists, and that it is for this machine only and only reads."""

import fcntl
import http.client
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedsim.cli import app
from fedsim.errors import FedsimError
from fedsim.folder import Folder
from fedsim.watch import open_server, runs_below

FAST = ("--set", "rounds=4", "--set", "evaluate.every=2", "--quiet")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("here") / "runs"
    for name in ("one", "in/two words"):
        assert CliRunner().invoke(app, ["run", "quickstart", *FAST, "--output", str(root / name)]).exit_code == 0
    secret = root.parent / "secret"
    secret.mkdir()
    (secret / "scenario.yaml").write_text("name: secret\n")
    (root / "link").symlink_to(secret)
    broken = root / "broken"
    broken.mkdir()
    (broken / "scenario.yaml").write_text("{")
    return root


@contextmanager
def serving(root: Path) -> Iterator[int]:
    server = open_server(root, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])  # type: ignore[index]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def port(runs: Path) -> Iterator[int]:
    with serving(runs) as port:
        yield port


def get(port: int, path: str, method: str = "GET", host: str | None = None) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers
    finally:
        connection.close()


def test_it_lists_runs_with_their_curves(port: int) -> None:
    status, body, headers = get(port, "/runs")
    assert status == 200
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    listed = {run["name"]: run for run in json.loads(body)["runs"]}
    assert set(listed) == {"one", "in/two words", "broken"}
    one = listed["one"]
    assert (one["state"], one["round"], one["rounds"], one["metric"], one["x"]) == ("finished", 4, 4, "test.accuracy", [0, 2, 4])
    assert one["value"] == one["y"][-1]
    assert listed["broken"]["state"] == "unreadable"


def test_a_report_is_rendered_when_asked_for(port: int) -> None:
    status, body, _ = get(port, "/report/in/two%20words")
    assert status == 200
    assert "<title>quickstart · fedsim</title>" in body
    assert get(port, "/report/broken")[0] == 500


@pytest.mark.parametrize(
    "path",
    [
        "/report/../secret",
        "/report/..%2fsecret",
        "/report/%2e%2e/secret",
        "/report/link",
        "/report//etc/passwd",
        "/report/one/../../secret",
        "/../../etc/passwd",
        "/report/one/scenario.yaml",
        "/scenario.yaml",
        "/report/.",
        "/report/",
        "/report/%00",
    ],
)
def test_no_path_leads_out(port: int, path: str) -> None:
    status, body, _ = get(port, path)
    assert (status, body) == (404, "no such page\n")


def test_it_answers_nobody_who_names_it_otherwise(port: int) -> None:
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port}.evil.example", f"[::1]:{port}"):
        assert get(port, "/runs", host=host)[0] == 403
        assert get(port, "/report/one", host=host)[0] == 403
    assert get(port, "/runs", host=f"localhost:{port}")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_it_only_reads(port: int, method: str) -> None:
    assert get(port, "/runs", method)[0] == 501


def test_a_head_has_no_body(port: int) -> None:
    status, body, headers = get(port, "/", "HEAD")
    assert (status, body) == (200, "")
    assert int(headers["Content-Length"]) > 1000


def test_nothing_is_written(port: int, runs: Path) -> None:
    def everything() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(runs.rglob("*"))}

    before = everything()
    for path in ("/", "/runs", "/plotly.js", "/report/one", "/report/broken", "/none"):
        get(port, path)
    assert everything() == before


def test_every_page_forbids_requests_to_others(port: int) -> None:
    for path in ("/", "/runs", "/plotly.js", "/report/one"):
        policy = get(port, path)[2]["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'")
        assert "http" not in policy


def test_it_listens_on_this_machine_only(runs: Path) -> None:
    server = open_server(runs, 0)
    assert server.server_address[0] == "127.0.0.1"  # type: ignore[index]
    with pytest.raises(FedsimError, match=r"port \d+ cannot be used: .*; choose another with --port"):
        open_server(runs, int(server.server_address[1]))  # type: ignore[index]
    server.server_close()
    with pytest.raises(FedsimError, match="no such folder"):
        open_server(runs / "none", 0)


def test_a_run_at_work_is_told_from_one_that_was_left(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "left"
    folder.mkdir()
    (folder / "scenario.yaml").write_bytes((runs / "one" / "scenario.yaml").read_bytes())
    log = "\n".join((runs / "one" / "metrics.jsonl").read_text().splitlines()[:2]) + "\n"
    (folder / "metrics.jsonl").write_text(log)
    (left,) = runs_below(tmp_path)
    assert (left["state"], left["round"]) == ("unfinished", 1)
    held = Folder(folder)
    held.lock()
    os.utime(folder / "metrics.jsonl", (time.time() + 5, time.time() + 5))
    assert runs_below(tmp_path)[0]["state"] == "running"
    held.unlock()
    assert runs_below(tmp_path)[0]["state"] == "unfinished", "it ended without a word in its log"


def test_new_rows_are_in_the_next_answer(runs: Path, tmp_path: Path) -> None:
    lines = (runs / "one" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "scenario.yaml").write_bytes((runs / "one" / "scenario.yaml").read_bytes())
    with serving(tmp_path) as port:
        seen = []
        with open(tmp_path / "metrics.jsonl", "a") as log:
            for i, line in enumerate(lines):
                log.write(line + '{"torn')  # the row that is being written
                log.flush()
                os.utime(tmp_path / "metrics.jsonl", (1000 + i, 1000 + i))  # clocks of file systems tick slowly
                (run,) = json.loads(get(port, "/runs")[1])["runs"]
                seen.append((run["round"], run["x"]))
                log.seek(0)
                log.truncate(sum(map(len, lines[: i + 1])))
        assert seen == [(0, [0]), (1, [0]), (2, [0, 2]), (3, [0, 2]), (4, [0, 2, 4])]
        assert run["age"] > 1e6
        assert get(port, "/report/")[0] == 200, "what a browser makes of /report/."


def test_one_damaged_run_does_not_hide_the_others(runs: Path, tmp_path: Path) -> None:
    for name in ("good", "damaged"):
        (tmp_path / name).mkdir()
        for file in ("scenario.yaml", "metrics.jsonl"):
            (tmp_path / name / file).write_bytes((runs / "one" / file).read_bytes())
    with open(tmp_path / "damaged" / "metrics.jsonl", "a") as log:
        log.write("{damaged}\n")
    states = {run["name"]: (run["state"], run.get("why", "")) for run in runs_below(tmp_path)}
    assert states["good"][0] == "unfinished"
    assert states["damaged"][0] == "unreadable"
    assert "metrics.jsonl: cannot be read" in states["damaged"][1]


def test_a_run_starts_while_it_is_looked_at(tmp_path: Path) -> None:
    with open(tmp_path / ".lock", "w") as looking:  # left by a run that was killed
        fcntl.flock(looking, fcntl.LOCK_SH)
        over = threading.Timer(0.05, fcntl.flock, (looking, fcntl.LOCK_UN))
        over.start()
        folder = Folder(tmp_path)
        folder.lock()
        folder.unlock()
        over.join()
