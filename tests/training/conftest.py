"""Runs of the shipped configuration at tiny size, inside the test process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_runs import Run, Trained, tiny_config

from dynmoe import job
from dynmoe.records import RunFolder
from dynmoe.report import figures


def _train(path: Path, *overrides: str, moe: str) -> RunFolder:
    folder = RunFolder(path)
    folder.path.mkdir(exist_ok=True)
    job.train(tiny_config(*overrides, moe=moe), folder)
    return folder


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "draw_all", lambda run: None)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Train into a folder of this test, which it may change."""

    def run(*overrides: str, moe: str = "dynmoe", name: str = "run") -> RunFolder:
        return _train(tmp_path / name, *overrides, moe=moe)

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train each configuration once for all tests of the module, which only read its folder."""
    made: dict[tuple[str, ...], RunFolder] = {}

    def trained(*overrides: str, moe: str = "dynmoe") -> RunFolder:
        key = (moe, *overrides)
        if key not in made:
            made[key] = _train(tmp_path_factory.mktemp("trained"), *overrides, moe=moe)
        return made[key]

    return trained


@pytest.fixture
def copied(trained: Trained, tmp_path: Path) -> RunFolder:
    """The default run before its summary, to be changed."""
    return RunFolder(shutil.copytree(trained().path, tmp_path / "run"))
