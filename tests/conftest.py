"""For all tests: what imports and collection have made stays, so the garbage collector need not look through it again and again."""

import gc

import hypothesis  # noqa: F401  (before the freeze: it looks for who refers to what)


def pytest_collection_finish(session) -> None:
    gc.collect()
    gc.freeze()
