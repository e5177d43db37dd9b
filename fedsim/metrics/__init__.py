"""F3. What is measured: additive records, scores of a task, their spread over clients, and what prediction sets are worth."""

from fedsim.metrics.coverage import Judged, binomial_interval, coverage, of_client, under_law
from fedsim.metrics.fairness import across_clients
from fedsim.metrics.record import Metrics, add, mean
from fedsim.metrics.scores import Record, by_class, measure, per_example, summarise

__all__ = [
    "Judged",
    "Metrics",
    "Record",
    "across_clients",
    "add",
    "binomial_interval",
    "by_class",
    "coverage",
    "mean",
    "measure",
    "of_client",
    "per_example",
    "summarise",
    "under_law",
]
