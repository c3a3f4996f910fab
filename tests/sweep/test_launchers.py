"""Other launchers and the search run real jobs, three steps each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import command
from omegaconf import DictConfig

from dynmoe.records import RunFolder

TINY = ("task.steps=3", "data.linear_baseline=false", "trainer.enable_progress_bar=false")


def finished(folder: Path, *arguments: str) -> list[RunFolder]:
    """The runs that a command finishes."""
    done = subprocess.run(
        [sys.executable, "-m", "runners.run", "task=vit_domainbed", *arguments, *TINY],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [RunFolder(path.parent) for path in folder.glob("outputs/*/*/done")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "package"),
    [
        ("joblib", "hydra_plugins.hydra_joblib_launcher"),
        ("submitit_local", "submitit"),
        ("ray", "ray"),  # not in the developers' extra: it is large
    ],
)
def test_launchers(launcher: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    runs = finished(
        tmp_path, "hydra.mode=MULTIRUN", "moe=dense,dynmoe", f"hydra/launcher={launcher}"
    )
    assert sorted(run.read_run()["moe"] for run in runs) == ["dense", "dynmoe"]


@pytest.mark.slow
def test_optuna_searches(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    runs = finished(tmp_path, "sweep=optuna", "hydra.sweeper.n_trials=2")
    configs = [run.read_run()["config"] for run in runs]
    assert len({config["task.optimizer.lr"] for config in configs}) == 2
    assert all(1e-4 <= config["task.optimizer.lr"] <= 1e-2 for config in configs)
    assert all(config["moe.adaptation.period"] in (25, 50, 100) for config in configs)


@pytest.mark.slow
def test_a_score_that_is_no_number_is_the_worst(tmp_path: Path) -> None:
    """Optuna refuses NaN; a search would end at this job each time."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")

    def diverged(cfg: DictConfig) -> float:
        return float("nan")

    done = command(
        diverged,
        tmp_path,
        "task=vit_domainbed",
        "sweep=optuna",
        "hydra.sweeper.n_trials=1",
    )
    assert done.returncode == 0, done.stderr
    (found,) = tmp_path.glob("outputs/*/optimization_results.yaml")
    assert "best_value: -1.0" in found.read_text()
