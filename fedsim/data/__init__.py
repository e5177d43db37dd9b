"""F3. Federated data: where examples come from, who owns them, and in which order a client sees them.

Importing this package registers every source and every partition.
"""

from fedsim.data import external, files, images, synthetic, tabular, text
from fedsim.data.batches import plan
from fedsim.data.federation import Data, Federation, Lists, Proxy
from fedsim.data.partition import Partition, Split
from fedsim.data.source import Dataset, Examples, Source, resolve_root
from fedsim.steps import count_steps

SOURCE_MODULES = (images, tabular, text, files, synthetic, external)
"""The modules that register sources."""

__all__ = [
    "Data",
    "Dataset",
    "Examples",
    "Federation",
    "Lists",
    "Partition",
    "Proxy",
    "Source",
    "Split",
    "count_steps",
    "plan",
    "resolve_root",
]
