"""F3. Evaluation: what a model's outputs are worth, as records that add up.

`measure` makes a record of a batch, records of one task add leaf by leaf (`fedsim.tree.add`), `summarise` turns the total into numbers.
A test set may be cut in any way: the sum of its parts' records is the record of the whole, exactly for counts. Accumulators are float64.
Each function is chosen by the class of the task; a new kind of task registers its own:

    @measure.register
    def _(task: Ranking, output: Tensor, y: Tensor, mask: Tensor) -> Record: ...

B = batch, K = classes, D = targets, L = labels, T = positions, V = vocabulary.
"""

from __future__ import annotations

import math
from functools import singledispatch

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.errors import FedsimError
from fedsim.problem import Classification, MultiLabel, NextToken, Quantiles, Regression, Task

Record = dict[str, Tensor]

BINS = 15  # confidence bins of the calibration error, as in Guo et al., ICML 2017


@singledispatch
def measure(task: Task, output: Tensor, y: Tensor, mask: Tensor) -> Record:
    """The record of a batch; examples whose `mask` `[B]` is 0 are padding and leave no trace, whatever they hold."""
    raise _unknown(task, "measure")


@singledispatch
def summarise(task: Task, record: Record) -> dict[str, float]:
    """Numbers to print, from the record of any number of batches. What has nothing to be computed from is NaN.

    Classification: loss, accuracy, balanced_accuracy (mean recall over classes that occur), macro_f1 (over classes that occur or are
    predicted), ece (expected calibration error, 15 bins of equal width). NextToken: loss, accuracy and perplexity, all per token.
    Regression: loss (half the squared error of an example), mse and mae (of a target), r2 (mean over targets that vary).
    MultiLabel: loss, accuracy (all labels of an example right), micro_f1, macro_f1 (over labels that occur or are predicted).
    Quantiles: loss (pinball), inside (share of targets between the two), width (of the interval, on average).
    """
    raise _unknown(task, "summarise")


@singledispatch
def per_example(task: Task, output: Tensor, y: Tensor) -> Record:
    """`loss` and, where there is such a thing, `correct` (0 to 1) of each example, `[B]`; clients' scores are sums over their segments.

    For NextToken both are means over an example's tokens; for MultiLabel `correct` asks for all labels.
    """
    raise _unknown(task, "per_example")


def _unknown(task: Task, function: str) -> FedsimError:
    return FedsimError(f"no scores for the task {type(task).__name__}: give it its own with @fedsim.metrics.{function}.register")


def _ratio(a: Tensor, b: Tensor) -> float:
    """a / b of two scalars; NaN where b is 0."""
    return (a / b).item() if b.item() != 0 else math.nan


def _mean(values: Tensor, where: Tensor) -> float:
    """Mean of the chosen values; NaN where none is."""
    return values[where].mean().item() if bool(where.any()) else math.nan


def _f1(tp: Tensor, fp: Tensor, fn: Tensor) -> Tensor:
    """F1 = 2 TP / (2 TP + FP + FN); 0 where there is nothing."""
    return 2 * tp / (2 * tp + fp + fn).clamp(min=1)


# ---- one of K classes


@measure.register
def _(task: Classification, output: Tensor, y: Tensor, mask: Tensor) -> Record:
    output, y = output.detach()[mask > 0], y[mask > 0]
    k = output.shape[1]
    confidence, predicted = output.double().softmax(1).max(1)  # [B]
    correct = (predicted == y).double()
    place = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)  # bin b holds (b / BINS, (b + 1) / BINS]
    bins = F.one_hot(place, BINS).double()  # [B, BINS]
    return {
        "count": torch.tensor(float(len(y)), dtype=torch.float64, device=output.device),
        "loss": task.loss(output, y).double().sum(),
        "confusion": torch.bincount(y * k + predicted, minlength=k * k).view(k, k).double(),  # [true, predicted]
        "bin_count": bins.sum(0),
        "bin_confidence": confidence @ bins,
        "bin_correct": correct @ bins,
    }


@summarise.register
def _(task: Classification, record: Record) -> dict[str, float]:
    confusion = record["confusion"]
    right, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)  # [K]
    return {
        "loss": _ratio(record["loss"], record["count"]),
        "accuracy": _ratio(right.sum(), record["count"]),
        "balanced_accuracy": _mean(right / true, true > 0),
        "macro_f1": _mean(_f1(right, predicted - right, true - right), (true + predicted) > 0),
        "ece": _ratio((record["bin_correct"] - record["bin_confidence"]).abs().sum(), record["count"]),
    }


def by_class(record: Record) -> dict[str, float]:
    """The share of each class's examples that is recognised (recall), from a record of a classification; NaN for a class without any."""
    right, true = record["confusion"].diagonal(), record["confusion"].sum(1)
    return {f"class_{k}.accuracy": _ratio(right[k], true[k]) for k in range(len(true))}


@per_example.register
def _(task: Classification, output: Tensor, y: Tensor) -> Record:
    loss = task.loss(output, y)
    return {"loss": loss, "correct": (output.argmax(1) == y).to(loss.dtype)}


# ---- the next token


@measure.register
def _(task: NextToken, output: Tensor, y: Tensor, mask: Tensor) -> Record:
    real = (y != task.IGNORE) & (mask > 0)[:, None]  # [B, T]
    logits, target = output.detach()[real], y[real]  # [tokens, V], [tokens]
    return {
        "count": real.double().sum(),
        "loss": F.cross_entropy(logits, target, reduction="none").double().sum(),
        "correct": (logits.argmax(1) == target).double().sum(),
    }


@summarise.register
def _(task: NextToken, record: Record) -> dict[str, float]:
    loss = _ratio(record["loss"], record["count"])
    return {
        "loss": loss,
        "accuracy": _ratio(record["correct"], record["count"]),
        "perplexity": math.inf if loss > 700 else math.exp(loss),
    }


@per_example.register
def _(task: NextToken, output: Tensor, y: Tensor) -> Record:
    loss = task.loss(output, y)
    tokens = (y != task.IGNORE).sum(1).clamp(min=1)
    return {"loss": loss, "correct": (output.argmax(2) == y).sum(1).to(loss.dtype) / tokens}


# ---- real targets


@measure.register
def _(task: Regression, output: Tensor, y: Tensor, mask: Tensor) -> Record:
    output, y = output.detach()[mask > 0], y[mask > 0]
    target = y.double()
    error = output.double() - target  # [B, D]
    return {
        "count": torch.tensor(float(len(y)), dtype=torch.float64, device=output.device),
        "loss": task.loss(output, y).double().sum(),
        "squared": error.square().sum(0),
        "absolute": error.abs().sum(0),
        "y": target.sum(0),
        "y_squared": target.square().sum(0),
    }


@summarise.register
def _(task: Regression, record: Record) -> dict[str, float]:
    """r2 = 1 - squared error / (sum y^2 - (sum y)^2 / count), by target; one whose variance is lost in rounding is constant."""
    count, squares = record["count"], record["y_squared"]
    spread = squares - record["y"].square() / count.clamp(min=1)  # [D]
    varies = spread > 1e-12 * squares
    return {
        "loss": _ratio(record["loss"], count),
        "mse": _ratio(record["squared"].mean(), count),
        "mae": _ratio(record["absolute"].mean(), count),
        "r2": _mean(1 - record["squared"] / spread, varies),
    }


@per_example.register
def _(task: Regression, output: Tensor, y: Tensor) -> Record:
    return {"loss": task.loss(output, y)}


# ---- any subset of L labels


@measure.register
def _(task: MultiLabel, output: Tensor, y: Tensor, mask: Tensor) -> Record:
    output, y = output.detach()[mask > 0], y[mask > 0]
    predicted, true = output > 0, y > 0.5  # [B, L]
    return {
        "count": torch.tensor(float(len(y)), dtype=torch.float64, device=output.device),
        "loss": task.loss(output, y).double().sum(),
        "exact": (predicted == true).all(1).double().sum(),
        "tp": (predicted & true).double().sum(0),
        "fp": (predicted & ~true).double().sum(0),
        "fn": (~predicted & true).double().sum(0),
    }


@summarise.register
def _(task: MultiLabel, record: Record) -> dict[str, float]:
    tp, fp, fn = record["tp"], record["fp"], record["fn"]  # [L]
    return {
        "loss": _ratio(record["loss"], record["count"]),
        "accuracy": _ratio(record["exact"], record["count"]),
        "micro_f1": _ratio(2 * tp.sum(), 2 * tp.sum() + fp.sum() + fn.sum()),
        "macro_f1": _mean(_f1(tp, fp, fn), (tp + fp + fn) > 0),
    }


@per_example.register
def _(task: MultiLabel, output: Tensor, y: Tensor) -> Record:
    loss = task.loss(output, y)
    return {"loss": loss, "correct": ((output > 0) == (y > 0.5)).all(1).to(loss.dtype)}


# ---- two quantiles of a real target


@measure.register
def _(task: Quantiles, output: Tensor, y: Tensor, mask: Tensor) -> Record:
    output, y = output.detach()[mask > 0], y[mask > 0]
    low, high = output.double().unbind(1)
    return {
        "count": torch.tensor(float(len(y)), dtype=torch.float64, device=output.device),
        "loss": task.loss(output, y).double().sum(),
        "inside": ((low <= y[:, 0]) & (y[:, 0] <= high)).double().sum(),
        "width": (high - low).sum(),
    }


@summarise.register
def _(task: Quantiles, record: Record) -> dict[str, float]:
    return {name: _ratio(record[key], record["count"]) for name, key in (("loss", "loss"), ("inside", "inside"), ("width", "width"))}


@per_example.register
def _(task: Quantiles, output: Tensor, y: Tensor) -> Record:
    return {"loss": task.loss(output, y)}
