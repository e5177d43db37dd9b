"""For all tests: the CPU computes, and what imports and collection have made is not searched for garbage again and again."""

import gc
import os

if not os.environ.get("FEDSIM_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before PyTorch looks; tests/test_gpu.py is for a GPU

import hypothesis  # noqa: F401  (before the freeze: it looks for who refers to what)


def pytest_collection_finish(session) -> None:
    gc.collect()
    gc.freeze()
