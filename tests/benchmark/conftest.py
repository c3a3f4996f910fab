"""``run`` and ``refused`` of dynmoe-bench, which sets options of PyTorch for its whole process."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from command_line import fixtures

from runners import bench

run, refused = fixtures("dynmoe-bench", bench.main)


@pytest.fixture(autouse=True)
def settings_of_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("dynmoe.runtime._tuned", False)  # whatever ran before in this process
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)


@pytest.fixture
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynmoe.benchmark.timing.MIN_SAMPLE", 0.0)
    # One disturbed sample of two would leave one round, which has no spread to compare.
    monkeypatch.setattr("dynmoe.benchmark.timing.OTHERS_SHARE", math.inf)
