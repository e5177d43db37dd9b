"""A federation on this machine: a SuperLink and SuperNodes on loopback, TLS, authenticated nodes, and everything gone afterwards."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fedsim.errors import FedsimError

NAME = "local"
"""What the SuperLink is called in Flower's configuration."""

GRACE = 8.0
"""Seconds that processes have to end by themselves."""

LIMIT = 60.0
"""Seconds that a process may take to begin."""


@contextlib.contextmanager
def signals(handler: Any) -> Iterator[None]:
    """Give Ctrl-C, SIGTERM and SIGHUP to a handler meanwhile. What is ignored (`nohup`) stays so. Only in the main thread."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {s: known for s, known in before.items() if known not in (signal.SIG_IGN, None)}
    for s in before:
        signal.signal(s, handler)
    try:
        yield
    finally:
        for s, known in before.items():
            signal.signal(s, known)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_certificates(folder: Path) -> None:
    """A certificate authority, and a certificate of it for localhost: ca.crt, server.pem, server.key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = datetime.datetime.now(datetime.UTC)

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def begun(subject: str, key: ec.EllipticCurvePrivateKey, issuer: ec.EllipticCurvePrivateKey, is_ca: bool) -> x509.CertificateBuilder:
        usage = {f"{part}": part in (("key_cert_sign", "crl_sign") if is_ca else ("digital_signature",)) for part in _USAGE}
        return (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("fedsim local CA"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=7))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=0 if is_ca else None), critical=True)
            .add_extension(x509.KeyUsage(**usage), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), critical=False)
        )

    ca, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = begun("fedsim local CA", ca, ca, True).sign(ca, hashes.SHA256())
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    leaf = begun("localhost", server, ca, False).add_extension(names, critical=False)
    leaf = leaf.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ca.crt").write_bytes(root.public_bytes(serialization.Encoding.PEM))
    (folder / "server.pem").write_bytes(leaf.sign(ca, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    private = server.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write_secret(folder / "server.key", private)


_USAGE = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


def write_node_key(path: Path) -> None:
    """A node's key: `path` is the private half, `path`.pub the public one."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH
    _write_secret(path, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_name(f"{path.name}.pub").write_bytes(public + b"\n")


def _write_secret(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


@dataclass
class Federation:
    """A SuperLink and SuperNodes on loopback; a context manager that leaves no process behind.

    Attributes:
        count: how many nodes begin at once.
        work: a folder for keys, logs and Flower's own files; None = one that is made, and removed at the end.
        database: whether the SuperLink keeps its state in a file.
        quick: `fedsim.flower.node` instead of the plain `flower-supernode`.
        patience: seconds that a node waits for a message that has begun to come.
    """

    count: int
    work: Path | None = None
    database: bool = False
    quick: bool = True
    patience: float = 20.0
    port: int = 0
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> Federation:
        self._made = self.work is None
        self.folder = Path(tempfile.mkdtemp(prefix="fedsim-")) if self.work is None else self.work
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _begin(self) -> None:
        write_certificates(self.folder / "tls")
        self.port = self.port or free_port()
        home = self.home("cli")
        address, root = f"127.0.0.1:{self.port}", self.folder / "tls" / "ca.crt"
        text = f'[superlink]\ndefault = "{NAME}"\n[superlink.{NAME}]\naddress = "{address}"\nroot-certificates = "{root}"\n'
        (home / "config.toml").write_text(text)
        self.start_superlink()
        for i in range(self.count):
            write_node_key(self.key(i))
        self.register(*range(self.count))
        for i in range(self.count):
            self.start_node(i)

    def __exit__(self, *_: object) -> None:
        with signals(signal.SIG_IGN):  # a second one must not leave the rest at work
            _end(list(self.processes.values()), signal.SIGTERM)
            self.processes.clear()
            if self._made:
                shutil.rmtree(self.folder, ignore_errors=True)

    def key(self, i: int) -> Path:
        """The private key of node `i`."""
        (self.folder / "keys").mkdir(exist_ok=True)
        return self.folder / "keys" / f"node{i}"

    def home(self, name: str) -> Path:
        """The folder of Flower's own files for one of the processes."""
        path = self.folder / "home" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def log(self, name: str) -> str:
        """What a process has printed."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start_superlink(self) -> None:
        """Start the SuperLink, and wait until it listens."""
        tls = self.folder / "tls"
        options = ["--ssl-ca-certfile", tls / "ca.crt", "--ssl-certfile", tls / "server.pem", "--ssl-keyfile", tls / "server.key"]
        options += ["--enable-supernode-auth", "--host", "127.0.0.1", "--port", self.port, "--disable-runtime-dependency-installation"]
        options += ["--database", self.folder / "superlink.db"] if self.database else []
        process = self._start("superlink", _command("flower-superlink"), options)
        _wait(lambda: _listens(self.port), process, "the SuperLink", lambda: self.log("superlink"))

    def start_node(self, i: int, config: str | None = None, key: Path | None = None, root: Path | None = None, name: str = "") -> str:
        """Start node `i`; its name. By default it holds every `count`-th client from `i` on."""
        name = name or f"node{i}"
        options: list[Any] = ["--root-certificates", root or self.folder / "tls" / "ca.crt", "--superlink", f"127.0.0.1:{self.port}"]
        options += ["--host", "127.0.0.1", "--port", free_port(), "--auth-supernode-private-key", key or self.key(i)]
        options += ["--node-config", config or f"partition-id={i} num-partitions={self.count}"]
        command = [sys.executable, "-m", "fedsim.flower.node"] if self.quick else _command("flower-supernode")
        self._start(name, command, options)
        return name

    def register(self, *which: int) -> None:
        """Let nodes in, by their public keys."""
        with_keys = [self.flwr("supernode", "register", f"{self.key(i)}.pub", NAME) for i in which]
        try:
            for process in with_keys:
                said, _ = process.communicate(timeout=LIMIT)
                if process.returncode:
                    raise FedsimError(f"a node could not be registered:\n{said.decode(errors='replace')[-2000:]}")
        finally:
            _end([process for process in with_keys if process.poll() is None], signal.SIGTERM)

    def flwr(self, *arguments: object, **more: Any) -> subprocess.Popen[bytes]:
        """Flower's command line, of this federation."""
        where: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | more
        command = [*_command("flwr"), *map(str, arguments)]
        process: subprocess.Popen[bytes] = subprocess.Popen(command, env=self._environment("cli"), start_new_session=True, **where)
        return process

    def run(self, app: Path, **settings: Any) -> subprocess.Popen[bytes]:
        """Run an app; the process ends with the run, and prints what its server prints into the log `run`."""
        if "run" in self.processes:
            self.stop("run")
        config = " ".join(f"{name}={_plain(value)}" for name, value in settings.items())
        with open(self.folder / "run.log", "ab") as log:
            self.processes["run"] = self.flwr("run", app, NAME, "--stream", "-c", config, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        return self.processes["run"]

    def stop(self, name: str, how: int = signal.SIGTERM) -> None:
        """End one of the processes, and what it started."""
        _end([self.processes.pop(name)], how)

    def _start(self, name: str, command: list[str], options: list[Any]) -> subprocess.Popen[bytes]:
        with open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [*command, *map(str, options)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self._environment(name),
                start_new_session=True,  # a Ctrl-C is for the one who started this, who then ends it
            )
        return self.processes[name]

    def _environment(self, name: str) -> dict[str, str]:
        bin_ = os.path.dirname(sys.executable)
        more = {"FLWR_HOME": str(self.home(name)), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.3"}
        more["FEDSIM_PATIENCE"] = str(self.patience)
        more |= {"PATH": f"{bin_}{os.pathsep}{os.environ.get('PATH', '')}", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
        here = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), os.getcwd()])
        return os.environ | more | {"PYTHONPATH": here}


def _plain(value: Any) -> str:
    """A value as `flwr run -c` reads it."""
    if isinstance(value, (str, Path)):
        return f'"{value}"'
    return str(value).lower() if isinstance(value, bool) else str(value)


def _command(name: str) -> list[str]:
    """A command of Flower's, beside this Python."""
    path = shutil.which(name, path=os.path.dirname(sys.executable)) or shutil.which(name)
    if path is None:
        raise FedsimError(f"the command {name} is missing; install Flower: pip install flwr")
    return [path]


def _end(processes: list[subprocess.Popen[bytes]], how: int) -> None:
    """A signal to processes and all that they started; what is still there after `GRACE` seconds is killed."""
    everyone: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(process.pid)
            everyone += [first, *first.children(recursive=True)]
    for each in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.send_signal(how)
    _, left = psutil.wait_procs(everyone, timeout=GRACE)
    for each in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    for process in processes:
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait(ready: Any, process: subprocess.Popen[bytes], what: str, log: Any) -> None:
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        if process.poll() is not None:
            raise FedsimError(f"{what} did not start:\n{log()[-2000:]}")
        if ready():
            return
        time.sleep(0.1)
    raise FedsimError(f"{what} did not start within {LIMIT:g} seconds:\n{log()[-2000:]}")
