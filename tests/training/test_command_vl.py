"""The command on vision-language runs: killed in every stage, in a sweep, on two devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vl import STAGES, records, settings, stage_folders

from dynmoe.records import RunFolder

# The command; it kills itself before a step of a stage, and every process leaves its weights.
SCRIPT = """
import os, signal
from pathlib import Path
import torch
from dynmoe.tasks.vl import VisionLanguage
from dynmoe import cli, job

step = VisionLanguage.training_step

def training_step(self, batch, index):
    place = f"{Path(self.trainer.default_root_dir).parents[1].name} {self.global_step}"
    if place == os.environ.get("KILL"):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, index)

def on_train_end(self):
    if "RANKS" in os.environ:
        torch.save(self.state_dict(), f"{os.environ['RANKS']}/{self.global_rank}.pt")

VisionLanguage.training_step = training_step
VisionLanguage.on_train_end = on_train_end

if __name__ == "__main__":
    cli.run(job.job, prog="dynmoe-run")
"""


def command(root: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (root / "script.py").write_text(SCRIPT)
    paths = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "script.py", *overrides],
        cwd=root,
        env={**os.environ, **paths, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def finished(root: Path, *overrides: str, **environment: str) -> str:
    """What a command says that ends well."""
    done = command(root, *overrides, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def weights(folder: RunFolder) -> dict[str, Any]:
    file = folder.path / "checkpoints" / "last.ckpt"
    state: dict[str, Any] = torch.load(file, weights_only=True)["state_dict"]
    return state


def only_runs(outputs: Path) -> dict[str, RunFolder]:
    return {stage: folder for stage, (folder,) in stage_folders(outputs).items()}


@pytest.mark.slow
def test_a_run_that_is_killed_in_every_stage_goes_on(tmp_path: Path) -> None:
    finished(tmp_path, *settings(tmp_path / "straight"))
    overrides = settings(tmp_path / "broken")
    for stage in ("vl_align", "vl_instruct", "vl"):
        killed = command(tmp_path, *overrides, KILL=f"{stage} 3")
        assert killed.returncode == -9, killed.stdout + killed.stderr
    finished(tmp_path, *overrides)
    straight, broken = only_runs(tmp_path / "straight"), only_runs(tmp_path / "broken")
    for stage in STAGES:
        assert records(broken[stage]) == records(straight[stage])
        torch.testing.assert_close(weights(broken[stage]), weights(straight[stage]), atol=0, rtol=0)


@pytest.mark.slow
def test_jobs_of_a_sweep_wait_for_the_stage_they_share(tmp_path: Path) -> None:
    """Two processes at once; one of them trains what both start from."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    outputs = tmp_path / "outputs"
    sweep = ("moe=dense,topk", "hydra/launcher=joblib", "hydra.mode=MULTIRUN")
    finished(tmp_path, *settings(outputs, *sweep))
    folders = stage_folders(outputs)
    assert [len(folders[stage]) for stage in STAGES] == [1, 1, 2]
    for folder in (*folders["align"], *folders["instruct"], *folders["moe"]):
        assert folder.is_done and [record["step"] for record in folder.read("results")] == [1, 3]
    assert sorted(folder.read_run()["moe"] for folder in folders["moe"]) == ["dense", "topk"]


@pytest.mark.slow
def test_two_processes_make_one_model(tmp_path: Path) -> None:
    """All of it the same in both, and as one process makes it."""
    outputs, ranks = tmp_path / "outputs", tmp_path / "ranks"
    ranks.mkdir()
    finished(tmp_path, *settings(outputs))
    one = only_runs(outputs)
    start = f"stage.start={one['instruct'].path}"
    both = ("trainer=ddp", "trainer.accelerator=cpu", start)
    finished(tmp_path, *settings(tmp_path / "both", *both), RANKS=str(ranks))
    first, second = (torch.load(ranks / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    torch.testing.assert_close(second, first, atol=0, rtol=0)
    torch.testing.assert_close(first, weights(one["moe"]), atol=5e-3, rtol=0)
    (two,) = stage_folders(tmp_path / "both")["moe"]
    assert two.read("events") == one["moe"].read("events") != []
    for found, expected in zip(two.read("results"), one["moe"].read("results"), strict=True):
        for key in ("loss", "aux_loss"):
            assert found[key] == pytest.approx(expected[key], rel=1e-3), key
        for name, scores in expected["scores"].items():
            for key in ("score", "loss"):
                assert found["scores"][name][key] == pytest.approx(scores[key], rel=1e-3), name
    for found, expected in zip(two.read("routing"), one["moe"].read("routing"), strict=True):
        assert (found["source"], found["layer"]) == (expected["source"], expected["layer"])
        assert found["slots"] == expected["slots"]
        for name, part in expected["parts"].items():
            assert found["parts"][name]["tokens"] == part["tokens"]
            assert found["parts"][name]["mean_k"] == pytest.approx(part["mean_k"], rel=0.01)
