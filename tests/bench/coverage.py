"""Conformal phases of several runs (seeds of one scenario) in one Markdown table: `python -m tests.bench.coverage RUN...`.

A mean over runs, with its 95 % t-interval for the coverages. The worst client and the bytes are means over runs, too.
"""

import sys
from pathlib import Path

import numpy as np
from scipy.stats import t

from fedsim.report.coverage import Calibrated, calibrated
from fedsim.report.formats import traffic
from fedsim.results import read_run

COLUMNS = {
    "coverage": ("coverage.marginal", True),
    "for the target law": ("coverage.target", True),
    "worst client": ("coverage.worst_client", False),
    "worst tenth": ("coverage.worst_10", False),
    "clients below": ("coverage.clients_below", False),
    "gap of clients": ("coverage.client_gap", False),
    "set size": ("coverage.set_size", False),
    "singletons": ("coverage.singletons", False),
}


def cell(values: list[float], interval: bool) -> str:
    """A mean, with its interval where it is asked for and there is one."""
    mean = f"{np.mean(values):.3f}"
    if not interval or len(values) < 2:
        return mean
    return f"{mean} ± {t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)):.3f}"


def row(phases: list[Calibrated]) -> list[str]:
    """One method over all runs."""
    out = [phases[0].label]
    for name, interval in COLUMNS.values():
        values = [v for p in phases if (v := p.value(name)) is not None]
        out.append(cell(values, interval) if values else "-")
    spent = [v for p in phases if (v := p.value("privacy.epsilon")) is not None]
    out += [f"{max(spent):.2f}" if spent else "-", str(len(phases[0].rows))]
    return [*out, traffic(round(np.mean([p.total("bytes_up") + p.total("bytes_down") for p in phases])))]


def main(folders: list[str]) -> None:
    runs = [calibrated(read_run(Path(folder))) for folder in folders]
    head = ["method", *COLUMNS, "epsilon", "rounds", "bytes"]
    lines = [head, ["---"] * len(head), *(row(list(phases)) for phases in zip(*runs, strict=True))]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


if __name__ == "__main__":
    main(sys.argv[1:])
