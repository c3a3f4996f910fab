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

from dynmoe.records import Kind, RunFolder

LONG = (*TINY_DYNMOE, "task.steps=9999", "task.eval_every=3")
RECORDED: dict[Kind, tuple[str, ...]] = {
    "mixing": ("step", "delta", "loss", "load", "weights"),
    "results": ("step", "scores"),
    "events": ("step", "layer", "before", "after"),
}
SENTENCE = "dynmoe-run: stopped by SIGTERM. The same command goes on from the last evaluation.\n"


def command(outputs: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "runners.run", *overrides, f"paths.outputs={outputs}"]


def stopped(
    tmp_path: Path,
    *overrides: str,
    runs: int = 1,
    by: signal.Signals = signal.SIGTERM,
    probes: int = 0,
) -> tuple[int, str, str]:
    """Status, output and errors of a command that gets a signal once all its runs have records, and
    so many probes of a mixture."""
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        # ascii: neither the end nor the lines before it may fail
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
        given = command(tmp_path, *overrides)
        process = subprocess.Popen(given, stdout=out, stderr=err, env=env)
        for _ in range(4000):
            known = [RunFolder(path.parent) for path in tmp_path.glob("*/*/checkpoints")]
            saved = [each for each in known if (each.path / "checkpoints/last.ckpt").exists()]
            if sum(len(each.read("mixing")) >= probes for each in saved) == runs:
                break
            assert process.poll() is None, (tmp_path / "err").read_text()
            time.sleep(0.1)
        process.send_signal(by)
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
def test_a_killed_run_with_mixed_data_goes_on(tmp_path: Path) -> None:
    """By the same command, to the records of a run that was never killed."""
    mixed = (*TINY_DYNMOE, "task.steps=150", "task.eval_every=50", "+task.save_every=7")
    mixed += ("mixing=dynamic", "mixing.every=4", "mixing.probe_tokens=40", "mixing.eta=50")
    ended, straight = tmp_path / "killed", tmp_path / "straight"
    ended.mkdir()
    status, _, _ = stopped(ended, *mixed, by=signal.SIGKILL, probes=3)
    (path,) = ended.glob("vit_domainbed/[!.]*")
    assert status == -signal.SIGKILL and RunFolder(path).state == "stopped"
    assert 3 <= len(RunFolder(path).read("mixing")) < 38
    for outputs in (ended, straight):
        subprocess.run(command(outputs, *mixed), check=True, capture_output=True)
    found, expected = (
        RunFolder(next(outputs.glob("vit_domainbed/[!.]*"))) for outputs in (ended, straight)
    )
    assert found.state == "done" and len(found.read("mixing")) == 38
    for kind, keys in RECORDED.items():
        first, second = (
            [[each[key] for key in keys] for each in run.read(kind)] for run in (found, expected)
        )
        assert first == second, kind


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "signum", "words"),
    [
        (0, signal.SIGTERM, "stopped by SIGTERM"),
        (1, signal.SIGTERM, "rank 1 was ended by SIGTERM"),
        (1, signal.SIGKILL, "rank 1 was ended by SIGKILL"),
    ],
)
def test_a_lost_process_ends_the_others(
    tmp_path: Path, rank: int, signum: signal.Signals, words: str
) -> None:
    """Within a minute of the signal, and in words."""
    given = command(tmp_path, *LONG, "trainer=ddp", "trainer.devices=2")
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(given, stdout=log, stderr=log, start_new_session=True)
    while not list(tmp_path.glob("*/*/checkpoints/last.ckpt")):
        assert first.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.1)
    listed = subprocess.run(["pgrep", "-P", f"{first.pid}"], capture_output=True, text=True)
    second = int(listed.stdout.split()[0])
    os.kill((first.pid, second)[rank], signum)
    assert first.wait(timeout=60) != 0
    for _ in range(600):
        if not Path(f"/proc/{second}").exists():
            break
        time.sleep(0.1)
    text = (tmp_path / "log").read_text()
    assert not Path(f"/proc/{second}").exists()
    assert words in text and "same command goes on" in text and "Traceback" not in text


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
