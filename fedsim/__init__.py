"""fedsim: federated-learning simulation, from one YAML scenario to a deployed strategy."""

import os

# Before torch is imported: its profiler, by which workers are counted, says on stderr that it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

__version__ = "0.1.0"
