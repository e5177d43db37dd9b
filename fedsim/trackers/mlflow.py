"""MLflow: a run with the scenario as its parameters. The server, if any, is `MLFLOW_TRACKING_URI`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from fedsim.trackers import Row, Tracker, flat, needs, numbers


class MLflow:
    """One MLflow run for each start of a run; the tag `folder` says which run folder it is about."""

    def __init__(self, values: dict[str, Any], folder: Path):
        try:
            self._mlflow: Any = importlib.import_module("mlflow")
        except ImportError:
            raise needs("mlflow", "mlflow") from None
        self._mlflow.start_run(run_name=values["name"])
        self._mlflow.set_tag("folder", str(folder))
        self._mlflow.log_params({name: str(value)[:500] for name, value in flat(values).items()})

    def log(self, row: Row) -> None:
        self._mlflow.log_metrics(numbers(row), step=row["round"])

    def close(self, finished: bool) -> None:
        self._mlflow.end_run("FINISHED" if finished else "KILLED")


def start(values: dict[str, Any], folder: Path) -> Tracker:
    """The tracker of a run."""
    return MLflow(values, folder)
