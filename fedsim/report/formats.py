"""F5. Numbers and names as people read them."""

from __future__ import annotations

from fedsim.console import size

NAMES = {
    "test.accuracy": "test accuracy",
    "validation.accuracy": "validation accuracy",
    "clients.accuracy.mean": "mean client accuracy",
    "clients.accuracy.worst_10": "accuracy of the worst tenth of clients",
    "clients.accuracy.std": "spread of client accuracy (std)",
    "clients.accuracy.jain": "Jain index of client accuracy",
    "test.ece": "test calibration error",
    "test.macro_f1": "test macro F1",
    "test.balanced_accuracy": "test balanced accuracy",
    "privacy.epsilon": "privacy spent (epsilon)",
}


def name_of(metric: str) -> str:
    """A metric in words."""
    return NAMES.get(metric, metric.replace(".", " ").replace("_", " "))


def number(value: float | None, digits: int = 4) -> str:
    """A score: `digits` decimals below ten, fewer above; a dash for nothing."""
    if value is None:
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 10:
        return f"{value:.{digits}f}"
    return f"{value:,.1f}" if 10 <= abs(value) < 1e6 else f"{value:.2e}"


def signed(value: float | None) -> str:
    """A difference, with its sign; an exact zero has none."""
    if value is None:
        return "-"
    text = number(abs(value))
    return text if value == 0 else f"{'+' if value > 0 else '−'}{text}"


def interval(low_high: tuple[float, float] | None) -> str:
    """An interval of differences."""
    return "-" if low_high is None else f"[{signed(low_high[0])}, {signed(low_high[1])}]"


def p_value(p: float | None) -> str:
    """A p-value; a dash where there is no test."""
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def traffic(count: float | None) -> str:
    """Bytes."""
    return "-" if count is None else size(count)


def seconds(value: float | None) -> str:
    """A time span."""
    if value is None:
        return "-"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"
