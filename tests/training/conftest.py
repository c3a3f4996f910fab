"""Runs of the shipped configuration at tiny size, inside the test process."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import Run, tiny_config

from dynmoe import job
from dynmoe.records import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Train and report; returns the run folder."""

    def run(*overrides: str, moe: str = "dynmoe", name: str = "run") -> RunFolder:
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir(exist_ok=True)
        job.train(tiny_config(*overrides, moe=moe), folder)
        job.show(folder)
        return folder

    return run
