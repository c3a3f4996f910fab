"""A short round of each part of the torture; `make torture` runs longer ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
