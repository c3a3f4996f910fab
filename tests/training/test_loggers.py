"""Every logger gets the same numbers."""

from __future__ import annotations

import csv
from pathlib import Path

import lightning as L
import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import TINY_DYNMOE

from dynmoe import job
from dynmoe.records import RunFolder
from dynmoe.training.callbacks import RunRecorder

Numbers = dict[tuple[str, int], float]


def fit(folder: Path, *loggers: str) -> None:
    """A tiny run with the configured loggers, as in a job of Hydra."""
    from hydra import compose, initialize_config_module

    with initialize_config_module("dynmoe.conf", version_base="1.3"):
        values = [text for text in TINY_DYNMOE if not text.startswith("logger=")]
        choice = f"logger=[{','.join(loggers)}]"
        output = [f"hydra.runtime.output_dir={folder}", f"paths.outputs={folder}"]
        output += [f"logger.{n}.save_dir={folder}" for n in loggers if n in ("csv", "tensorboard")]
        cfg = compose(
            "config",
            [*values, *output, choice, "trainer.log_every_n_steps=1"],
            return_hydra_config=True,
        )
    HydraConfig.instance().set_config(cfg)
    folder.mkdir(exist_ok=True)
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    job.train(cfg, RunFolder(folder))
    HydraConfig.instance().cfg = None


def of_csv(folder: Path) -> Numbers:
    numbers: Numbers = {}
    for file in sorted(folder.glob("csv/*/metrics.csv")):  # a later start is right about a step
        for row in csv.DictReader(file.open()):
            step = int(row.pop("step"))
            numbers |= {(name, step): float(text) for name, text in row.items() if text}
    return numbers


def of_tensorboard(folder: Path) -> Numbers:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    names = [name for name in events.Tags()["scalars"] if name != "hp_metric"]
    return {(name, e.step): e.value for name in names for e in events.Scalars(name)}


def of_mlflow(folder: Path) -> Numbers:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name != "Default")
    (run,) = client.search_runs([experiment.experiment_id])
    return {
        (name, metric.step): metric.value
        for name in run.data.metrics
        for metric in client.get_metric_history(run.info.run_id, name)
    }


def test_tensorboard_shows_what_csv_does(tmp_path: Path) -> None:
    fit(tmp_path / "run", "csv", "tensorboard")
    expected = of_csv(tmp_path / "run")
    assert of_tensorboard(tmp_path / "run") == pytest.approx(expected, rel=1e-6)
    names = {name for name, _ in expected}
    assert {"train/loss", "val/0/in/accuracy", "validation", "moe/blocks.2.mlp/experts"} <= names


@pytest.mark.slow
def test_a_run_that_goes_on_logs_each_step_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after step 5, twice; every number has the step that it has in a straight run."""
    fit(tmp_path / "straight", "csv")
    start = RunRecorder.on_train_batch_start

    def killed(recorder: RunRecorder, trainer: L.Trainer, *rest: object) -> None:
        if trainer.global_step == 6:
            raise KeyboardInterrupt
        start(recorder, trainer, *rest)

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(RunRecorder, "on_train_batch_start", killed)
            fit(tmp_path / "killed", "csv")
    fit(tmp_path / "killed", "csv")
    found, expected = (of_csv(tmp_path / name) for name in ("killed", "straight"))
    assert found == pytest.approx(expected)


@pytest.mark.slow
def test_mlflow_shows_what_csv_does(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    fit(tmp_path / "run", "csv", "mlflow")
    assert of_mlflow(tmp_path / "run") == pytest.approx(of_csv(tmp_path / "run"), rel=1e-6)


@pytest.mark.slow
def test_wandb_gets_the_numbers_of_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline; its own file format is no interface, so the calls of `log` are recorded."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged: Numbers = {}
    log = wandb.Run.log

    def spy(run: object, data: dict[str, float], *args: object, **kwargs: object) -> None:
        step = int(data["trainer/global_step"])
        logged.update({(k, step): float(v) for k, v in data.items() if k != "trainer/global_step"})
        log(run, data, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "log", spy)
    fit(tmp_path / "run", "csv", "wandb")
    wandb.finish()
    assert logged == pytest.approx(of_csv(tmp_path / "run"), rel=1e-6)
