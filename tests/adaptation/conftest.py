"""A process group of this process alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import distributed


@pytest.fixture
def alone() -> Iterator[None]:
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
