"""A scenario as a Flower app: a folder that `flwr run` takes, with a README of the commands that bring it to devices."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from fedsim import __version__
from fedsim.document import write
from fedsim.errors import FedsimError
from fedsim.flower import SUPPORTED
from fedsim.scenario import Scenario, dump_scenario

PACKAGE = "deployed"
"""The app's Python package."""

_APP = '''"""The scenario beside this file, as the two halves of a Flower app."""

from pathlib import Path

from fedsim.flower.client_app import client_app
from fedsim.flower.server_app import server_app

SCENARIO = Path(__file__).with_name("scenario.yaml")

client = client_app(SCENARIO)
server = server_app(SCENARIO)
'''

_PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.0.0"
description = "{title}, a fedsim scenario"
license = "Apache-2.0"
dependencies = ["flwr>={low},<{high}"]  # and fedsim {version}, which each machine has already: see README.md

[tool.hatch.build.targets.wheel]
packages = ["{package}"]

[tool.flwr.app]
publisher = "fedsim"

[tool.flwr.app.components]
serverapp = "{package}.app:server"
clientapp = "{package}.app:client"

# What `flwr run -c "..."` may set; fedsim.flower.server_app says what each means.
[tool.flwr.app.config]
{config}
"""

_README = """\
# {title} on devices

A Flower app, made by `fedsim deploy`. `{package}/scenario.yaml` says what runs. Every machine needs fedsim {version}, which brings Flower.
Build a wheel in a checkout of its source, and install that (PyPI's package of the name fedsim is another project):

```sh
pip wheel --no-deps --wheel-dir . /path/of/the/checkout
pip install fedsim-{version}-py3-none-any.whl
```

`export FLWR_TELEMETRY_ENABLED=0` keeps Flower from reporting its use.

All of it on this machine, with a SuperLink, three SuperNodes, TLS and authenticated nodes:

```sh
fedsim deploy {package}/scenario.yaml --local 3
```

## Keys, once

A certificate authority, and a certificate for the server's name (here `server.example.org`):

```sh
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 -subj "/CN=fedsim CA" -keyout ca.key -out ca.crt
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=server.example.org" -keyout server.key -out server.csr
printf "subjectAltName=DNS:server.example.org" > server.ext
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -extfile server.ext -out server.pem
```

On each device, a key that never leaves it; its public half goes to the server:

```sh
ssh-keygen -t ecdsa -b 384 -N "" -f node.key
```

## Server

```sh
flower-superlink --ssl-ca-certfile ca.crt --ssl-certfile server.pem --ssl-keyfile server.key --enable-supernode-auth \\
    --host 0.0.0.0 --port 8443 --database superlink.db --disable-runtime-dependency-installation
```

`--disable-runtime-dependency-installation` keeps the SuperLink from installing anything when a run starts. Tell `flwr` where it is, in
`~/.flwr/config.toml`:

```toml
[superlink]
default = "fleet"
[superlink.fleet]
address = "server.example.org:8443"
root-certificates = "/absolute/path/of/ca.crt"
```

and let the devices in, each by its public key:

```sh
flwr supernode register node.key.pub fleet
```

## Devices

```sh
python -m fedsim.flower.node --root-certificates ca.crt --superlink server.example.org:8443 --auth-supernode-private-key node.key \\
    --port 9094 --node-config "partition-id=0 num-partitions={clients}"
```

`flower-supernode` takes the same options and is slower: it looks for messages every three seconds and starts a process for each.
`--node-config` says which clients of the scenario a device is:

| `--node-config` | clients |
|---|---|
| `partition-id=0 num-partitions={clients}` | client 0, with its part of the scenario's data |
| `partition-id=0 num-partitions=3` | clients 0, 3, 6, ... |
| `clients="0,4,7"` | these |
| `partition-id=0 data="/path/of/mine.npz"` | client 0, with its own data: a file, or `module:function` giving a `fedsim.data.Dataset` |

A device's own data must mean the same as the scenario's: classes are matched by name, and a device whose classes, columns or tokens are
not the scenario's is left alone, with the reason in the run's output. A CSV table is standardised by its own rows.

## Run

```sh
flwr run . fleet --stream -c 'output="/absolute/path/of/a/run/folder"'
flwr run . fleet --stream -c 'output="/absolute/path/of/a/run/folder" resume=true'    # go on after an interruption
fedsim report /absolute/path/of/a/run/folder
```

The run folder is on the server's machine, and is the one that `fedsim run` writes.
"""


def write_app(scenario: Scenario, folder: Path) -> Path:
    """Write a scenario's app into a new or empty folder."""
    from fedsim.flower.server_app import Settings

    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as error:
        raise FedsimError(f"{folder}: cannot be made the app's folder: {error.strerror}") from None
    if occupied:
        raise FedsimError(f"{folder}: not empty; choose another --out")
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    name = "".join(c if c.isascii() and c.isalnum() else "-" for c in scenario.name.lower()).strip("-") or "scenario"
    config = "\n".join(f"{f.name} = {_toml(f.default)}" for f in fields(Settings))
    title = " ".join(scenario.name.replace('"', "'").replace("\\", "/").split())
    said: dict[str, Any] = {
        "name": name,
        "title": title,
        "package": PACKAGE,
        "low": low,
        "high": high,
        "config": config,
        "version": __version__,
    }
    package = folder / PACKAGE
    package.mkdir()
    (folder / "pyproject.toml").write_text(_PROJECT.format(**said), encoding="utf-8")
    (folder / "README.md").write_text(_README.format(**said, clients=scenario.data.clients or 3), encoding="utf-8")
    (package / "__init__.py").write_text('"""A fedsim scenario as a Flower app."""\n', encoding="utf-8")
    (package / "app.py").write_text(_APP, encoding="utf-8")
    (package / "scenario.yaml").write_text(write(dump_scenario(scenario)), encoding="utf-8")
    return folder


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()
