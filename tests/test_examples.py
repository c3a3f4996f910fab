"""The files of docs/examples run, and show what they promise."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dynmoe.config.compose import preflight

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
CHANGE = re.compile(r"^step \d+, .*?: .*?(\d) -> (\d) experts", re.MULTILINE)
K = re.compile(r"k (\d\.\d\d)\b")
ROUTER = EXAMPLES / "own_router"
COMMAND = ["task=vit_domainbed", "moe=my_router", "trainer=smoke"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        "plain_loop",
        pytest.param("lightning_module", marks=pytest.mark.slow),
        pytest.param("transformers_trainer", marks=pytest.mark.slow),
    ],
)
def test_experts_and_k_change(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert any(before != after for before, after in CHANGE.findall(out)), out
    assert len(set(K.findall(out))) > 1, out


def test_a_router_of_ones_own_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = preflight([*COMMAND, "moe.router._target_=lost.Router"], config_dir=str(ROUTER)).problems
    assert any("no package 'lost'" in text and "PYTHONPATH" in text for text in lost)
    # That the package is missing is not remembered once a longer path has it.
    assert "no package 'my_routers'" in preflight(COMMAND, config_dir=str(ROUTER)).problems[0]
    monkeypatch.syspath_prepend(ROUTER)
    assert preflight(COMMAND, config_dir=str(ROUTER)).problems == []
    assert preflight([*COMMAND, "moe.router.cutt=1"], config_dir=str(ROUTER)).problems == [
        "moe.router.cutt: unknown key. Did you mean 'cut'?"
    ]


@pytest.mark.slow
def test_a_router_of_ones_own_trains(tmp_path: Path) -> None:
    """The command of the file's docstring."""
    command = [sys.executable, "-m", "runners.run", "--config-dir", str(ROUTER), *COMMAND]
    path = os.pathsep.join([str(ROUTER), str(EXAMPLES.parent.parent)])
    done = subprocess.run(
        [*command, f"paths.outputs={tmp_path}", "trainer.enable_progress_bar=false"],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (events,) = tmp_path.rglob("events.jsonl")
    assert any(json.loads(line)["added"] is not None for line in events.read_text().splitlines())
