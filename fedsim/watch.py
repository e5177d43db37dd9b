"""F5. `fedsim watch`: a page on 127.0.0.1 that follows the runs in a folder. It reads, and answers nobody but this machine.

    GET /            the page
    GET /plotly.js   Plotly, from the installed package
    GET /runs        JSON: every run, its state and its headline curve
    GET /report/ID   the report of a run or study, rendered now

An ID is looked up among the folders that were found; no path from a request is ever opened.
"""

from __future__ import annotations

import json
import sys
import time
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import numpy as np

from fedsim.console import headline
from fedsim.errors import FedsimError
from fedsim.report import render
from fedsim.report.figure import plain
from fedsim.report.page import plotly_js
from fedsim.results import Run, is_run, is_study_folder, read_run

HERE = "127.0.0.1"
POINTS = 200
"""Of a curve, at most."""

DEEPEST = 6
"""Levels of folders that are looked at."""

POLICY = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src data: blob:"
REPORT_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"


def serve(root: Path, port: int) -> None:
    """Serve until Ctrl-C. Raises `FedsimError` where the folder or the port is not to be had."""
    server = open_server(root, port)
    print(f"Watching {root} at http://{HERE}:{server.server_address[1]}/   (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()


def open_server(root: Path, port: int) -> ThreadingHTTPServer:
    """A server for the runs below `root`, on this machine only; port 0 takes a free one."""
    if not root.is_dir():
        raise FedsimError(f"{root}: no such folder; runs are in `runs` unless --output said otherwise")

    class Handler(_Handler):
        folder = root.resolve()

    try:
        server = ThreadingHTTPServer((HERE, port), Handler)
    except OSError as error:
        raise FedsimError(f"port {port} cannot be used: {error.strerror}; choose another with --port") from None
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    server_version, sys_version = "fedsim", ""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        port = self.server.server_address[1]  # type: ignore[index]
        if self.headers.get("Host") not in {f"{HERE}:{port}", f"localhost:{port}"}:  # a page elsewhere that names us otherwise
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"this page is for the machine it runs on\n")
            return
        path = urlsplit(self.path).path
        try:
            self._route(path)
        except FedsimError as error:
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", f"{error}\n".encode())
        except FileNotFoundError:  # a folder that was deleted while we looked
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", b"a folder has just gone; ask again\n")

    def _route(self, path: str) -> None:
        pages = {"/": ("watch.html", "text/html"), "/watch.css": ("watch.css", "text/css"), "/watch.js": ("watch.js", "text/javascript")}
        if path in pages:
            name, kind = pages[path]
            self._answer(HTTPStatus.OK, kind, _asset(name))
        elif path == "/style.css":
            self._answer(HTTPStatus.OK, "text/css", _asset("style.css"))
        elif path == "/plotly.js":
            self._answer(HTTPStatus.OK, "text/javascript", plotly_js().encode(), keep=True)
        elif path == "/runs":
            listing = {"folder": self.folder.name, "runs": runs_below(self.folder), "studies": studies_below(self.folder)}
            self._answer(HTTPStatus.OK, "application/json", json.dumps(plain(listing)).encode())
        elif path.startswith("/report/") and (found := self._find(unquote(path.removeprefix("/report/")))) is not None:
            self._answer(HTTPStatus.OK, "text/html", render(found)[0].encode(), policy=REPORT_POLICY)
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"no such page\n")

    def _find(self, name: str) -> Path | None:
        known = {_name(f, self.folder): f for f in (*_folders(self.folder, is_run), *_folders(self.folder, is_study_folder))}
        return known.get(name or ".")  # a browser makes /report/ of /report/., the watched folder itself

    def _answer(self, status: HTTPStatus, kind: str, body: bytes, policy: str = POLICY, keep: bool = False) -> None:
        self.send_response(status)
        for header, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "max-age=3600" if keep else "no-store",
        }.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            return  # the browser went on to something else

    def log_message(self, format: str, *arguments: Any) -> None:
        if "--verbose" in sys.argv:
            super().log_message(format, *arguments)


def _asset(name: str) -> bytes:
    return (files("fedsim.report") / "templates" / name).read_bytes()


def _folders(root: Path, wanted: Any) -> list[Path]:
    """Folders of a kind below `root`, and `root` itself. Links are not followed, so nothing outside of `root` is found."""
    found, waiting = [], [(root, 0)]
    while waiting:
        folder, depth = waiting.pop()
        if wanted(folder):
            found.append(folder)
        if depth < DEEPEST and not is_run(folder):
            inside = (child for child in folder.iterdir() if not child.is_symlink() and child.is_dir() and not child.name.startswith("."))
            waiting += [(child, depth + 1) for child in sorted(inside)]
    return sorted(found)


def _name(folder: Path, root: Path) -> str:
    return folder.relative_to(root).as_posix()


def studies_below(root: Path) -> list[dict[str, str]]:
    """The studies in a folder."""
    return [{"name": (name := _name(f, root)), "link": f"/report/{quote(name)}"} for f in _folders(root, is_study_folder)]


def runs_below(root: Path) -> list[dict[str, Any]]:
    """Every run in a folder, the one that changed last first: name, state, progress, and the headline metric over the rounds."""
    out = []
    for folder in _folders(root, is_run):
        log = folder / "metrics.jsonl"
        changed = (log if log.exists() else folder / "scenario.yaml").stat().st_mtime
        failed, done = (folder / "failure.json").exists(), (folder / "model.safetensors").exists()
        about = _describe(folder, changed, failed, done)
        name, age = _name(folder, root), max(0.0, time.time() - changed)
        if about["state"] == "unfinished" and _locked(folder):  # not kept with the rest: a process ends without a word in the log
            about = about | {"state": "running"}
        out.append(about | {"name": name, "link": f"/report/{quote(name)}", "age": age})
    return sorted(out, key=lambda each: (each["age"], each["name"]))


@lru_cache(maxsize=4096)
def _describe(folder: Path, changed: float, failed: bool, done: bool) -> dict[str, Any]:
    """What the list says of a run; read again only when its log has grown."""
    try:
        run = read_run(folder)
    except FedsimError as error:
        return {"state": "unreadable", "why": str(error), "round": 0, "rounds": 0, "metric": None, "x": [], "y": []}
    metric = run.metric()
    x, y = _curve(run, metric) if metric else ([], [])
    last = run.rows[-1] if run.rows else {"round": 0}
    return {
        "state": run.status,
        "why": run.failure or "",
        "strategy": " + ".join(run.strategies()),
        "seed": run.scenario.get("seed"),
        "round": last["round"],
        "rounds": run.rounds,
        "metric": metric,
        "value": next((row[metric] for row in reversed(run.rows) if metric and headline(row) == metric), None),
        "x": x,
        "y": y,
    }


def _curve(run: Run, metric: str) -> tuple[list[int], list[float]]:
    x, y = run.series(metric)
    picked = np.unique(np.linspace(0, len(x) - 1, min(POINTS, len(x))).round().astype(int))
    return [x[i] for i in picked], [y[i] for i in picked]


def _locked(folder: Path) -> bool:
    """Whether a process holds the run's lock."""
    import fcntl

    try:
        with open(folder / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
