"""Starts of a job that Slurm has put back into its queue."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynmoe import job
from dynmoe.records import RunFolder


def test_a_requeued_job_does_not_overwrite_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "run")
    last = run.path / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    with run.hold():
        job._clear(run)
    assert not last.exists()
    assert not job._is_cleared(run)  # a second command of the same job overwrites again

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert job._is_cleared(run)
    assert not job._is_cleared(RunFolder(tmp_path / "not_begun_before"))
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert not job._is_cleared(run)
