"""F1. Conformal prediction: scores, targets, weighted quantiles, and what the strategies that use them have in common."""

from fedsim.conformal.calibration import (
    Calibration,
    ConformalStrategy,
    Heard,
    OneShot,
    Scored,
    all_scores,
    calibration_sizes,
    label_counts,
    more_scores,
    no_scores,
    room,
    split_quantile,
)
from fedsim.conformal.pinball import envelope, slope
from fedsim.conformal.scores import Aps, Cqr, LabelScore, Lac, Raps, Residual, Score
from fedsim.conformal.target import Alpha, OfClient, OfLaw, Own, Pooled, Target, class_count, importance, least_examples, weighted_quantile

__all__ = [
    "Alpha",
    "Aps",
    "Calibration",
    "ConformalStrategy",
    "Cqr",
    "Heard",
    "LabelScore",
    "Lac",
    "OfClient",
    "OfLaw",
    "OneShot",
    "Own",
    "Pooled",
    "Raps",
    "Residual",
    "Score",
    "Scored",
    "Target",
    "all_scores",
    "calibration_sizes",
    "class_count",
    "envelope",
    "importance",
    "label_counts",
    "least_examples",
    "more_scores",
    "no_scores",
    "room",
    "slope",
    "split_quantile",
    "weighted_quantile",
]
