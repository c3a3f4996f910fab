"""Commands that are told to end while they train."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import TINY_DYNMOE

from dynmoe.records import RunFolder

LONG = (*TINY_DYNMOE, "task.steps=9999", "task.eval_every=3")
SENTENCE = "dynmoe-run: stopped by SIGTERM. The same command goes on from the last evaluation.\n"


def stopped(tmp_path: Path, *overrides: str, runs: int) -> tuple[int, str, str]:
    """Status, output and errors of a command that gets SIGTERM once all its runs have records."""
    command = [sys.executable, "-m", "runners.run", *overrides, f"paths.outputs={tmp_path}"]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        # ascii: neither the end nor the lines before it may fail
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
        process = subprocess.Popen(command, stdout=out, stderr=err, env=env)
        for _ in range(4000):
            if len(list(tmp_path.glob("*/*/checkpoints/last.ckpt"))) == runs:
                break
            assert process.poll() is None, (tmp_path / "err").read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=60)
    return status, (tmp_path / "out").read_text(), (tmp_path / "err").read_text()


@pytest.mark.slow
def test_a_run_stops_and_goes_on(tmp_path: Path) -> None:
    status, out, err = stopped(tmp_path, *LONG, runs=1)
    assert (status, err) == (143, SENTENCE)
    (path,) = tmp_path.glob("vit_domainbed/[!.]*")
    assert RunFolder(path).state == "stopped"
    assert f"run folder: {path}" in out
    assert "stopped at step" in (path / "run.log").read_text()


@pytest.mark.slow
def test_a_parallel_sweep_stops_with_its_workers(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = ("hydra.mode=MULTIRUN", "seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    status, out, err = stopped(tmp_path, *LONG, *sweep, runs=2)
    assert (status, err) == (143, SENTENCE)
    names = [path.name for path in tmp_path.glob("vit_domainbed/[!.]*/")]
    assert len(names) == 2
    for name in names:
        run = RunFolder(tmp_path / "vit_domainbed" / name)
        assert run.state == "stopped"  # no worker holds it
        assert f"{name}: run folder:" in out and f"  {name}: " in out
