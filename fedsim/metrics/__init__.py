"""F3. What is measured: additive records, scores of a task, and their spread over clients."""

from fedsim.metrics.fairness import across_clients
from fedsim.metrics.record import Metrics, add, mean
from fedsim.metrics.scores import Record, by_class, measure, per_example, summarise

__all__ = ["Metrics", "Record", "across_clients", "add", "by_class", "mean", "measure", "per_example", "summarise"]
