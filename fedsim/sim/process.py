"""How a process that trains is set up."""

from __future__ import annotations

import ctypes
import os
import sys
import time
import warnings

import torch

from fedsim.types import Precision


def settle(device: str, precision: Precision) -> None:
    """Let the whole process keep its memory; and on a GPU give the same bits again, with products of float32 as exact as asked."""
    _keep_memory()
    if device == "cuda":
        _repeat(precision)


# Options of glibc's `mallopt`.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

KEPT = 1.0
"""Seconds for which memory that is freed stays for the next tensor."""

_returned = time.monotonic()


def _keep_memory() -> None:
    """Let memory that is freed stay for the next tensor. glibc would hand large pieces back at once, and fetch them page by page again.

    Measured on 25 stacked perceptrons of 784-200-10: a round of Adam takes 1.6 times as long without it, one of SGD 1.1 times.
    """
    if _LIBC is not None and hasattr(_LIBC, "mallopt"):
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20)):
            _LIBC.mallopt(option, value)


def return_memory() -> None:
    """Hand back what is free, once in `KEPT` seconds: on a Ray worker, gaps that messages leave between tensors would add up."""
    global _returned
    if time.monotonic() - _returned > KEPT and _LIBC is not None and hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)
        _returned = time.monotonic()


def _repeat(precision: Precision) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision(precision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch 2.9 has another name for it, which 2.6 does not know
        torch.backends.cudnn.allow_tf32 = precision != "highest"
