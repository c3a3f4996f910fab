"""A short round of each part of the torture; `make torture` runs longer ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_families import difference, families, traces

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "rounds", "families", "counted"),
    [
        (("kills",), 3, ("vision",), "runs of vision"),
        (("damage",), 6, ("vision",), "damaged states"),
        (("data", "updates"), 40, ("vision",), "two-process updates"),
        (("commands",), 15, ("vision",), "fuzzed commands"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_nothing_is_lost(
    parts: tuple[str, ...], rounds: int, families: tuple[str, ...], counted: str
) -> None:
    words = ["--parts", *parts, "--families", *families, "--rounds", str(rounds)]
    paths = os.pathsep.join(map(str, (ROOT / "tests", ROOT)))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("torture.py")), *words],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.endswith(f" {counted}")]
    assert int(line.split()[0]) >= rounds or counted.startswith("runs")


@pytest.mark.slow
def test_a_run_whose_first_process_is_killed_goes_on(tmp_path: Path) -> None:
    """The other process ends within a minute, in words; the same command then ends as ever."""
    words = [*families(tmp_path / "data")["ddp"].arguments, "task.steps=30"]
    command = [sys.executable, "-m", "runners.run", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed, straight, log = tmp_path / "killed", tmp_path / "straight", tmp_path / "log"
    with log.open("w") as output:
        first = subprocess.Popen(
            [*command, f"paths.outputs={killed}"], stdout=output, stderr=output, env=env
        )
    while not list(killed.glob("*/*/checkpoints/last.ckpt")):
        assert first.poll() is None, log.read_text()
        time.sleep(0.02)
    listed = subprocess.run(["pgrep", "-P", f"{first.pid}"], capture_output=True, text=True)
    second = Path("/proc") / listed.stdout.split()[0]
    first.kill()
    deadline = time.monotonic() + 60
    while second.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    said = log.read_text()
    assert "first process of this training is gone" in said and "same command goes on" in said
    assert first.wait() == -signal.SIGKILL and "Traceback" not in said
    for outputs in (killed, straight):
        given = [*command, f"paths.outputs={outputs}"]
        done = subprocess.run(given, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not difference(traces(killed), traces(straight))
