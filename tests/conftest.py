"""The same on every machine, a busy one too: threads, and the examples of hypothesis."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import groups
import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny: one thread is faster than several

gc.disable()  # until all is imported: most of it stays


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(scope="session", autouse=True)
def equal_groups_are_read_once() -> Iterator[None]:
    with groups.read_once():
        yield
