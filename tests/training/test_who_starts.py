"""Who starts the processes of a run: Lightning, or Slurm's srun."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from omegaconf import OmegaConf

from dynmoe.training import build
from dynmoe.training.saving import CheckpointFiles

OWN = {"_target_": "lightning.pytorch.plugins.io.TorchCheckpointIO"}


def environment(
    patch: pytest.MonkeyPatch, tasks: int | None, **trainer: Any
) -> tuple[list[Any], ClusterEnvironment | None]:
    """The plugins of a trainer that are no environment, and the one that is."""
    patch.setattr("dynmoe.ranks.tasks", lambda: tasks)
    for name, value in {"NTASKS": tasks or 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        patch.setenv(f"SLURM_{name}", str(value))
    patch.delenv("SLURM_NTASKS_PER_NODE", raising=False)  # restored, too
    plugins = build.trainer_plugins(OmegaConf.create({"trainer": trainer}))
    found = [each for each in plugins if isinstance(each, ClusterEnvironment)]
    assert len(found) <= 1
    ours = [each for each in plugins if type(each) is CheckpointFiles]
    others = [each for each in plugins if each not in [*found, *ours]]
    return others, found[0] if found else None


def test_outside_of_slurm_lightning_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment(monkeypatch, None) == ([], None)


def test_one_task_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    others, found = environment(monkeypatch, 1, plugins=[OWN])
    assert type(found) is LightningEnvironment and len(others) == 1


@pytest.mark.parametrize("plugins", [None, OWN, [OWN]])
def test_srun_starts_several_and_nothing_answers_its_signals(
    plugins: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    others, found = environment(monkeypatch, 2, plugins=plugins)
    assert isinstance(found, SLURMEnvironment) and not found.auto_requeue
    assert found.world_size() == 2 and len(others) == bool(plugins)


def test_an_environment_of_the_users_own_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "lightning.fabric.plugins.environments.TorchElasticEnvironment"
    assert type(environment(monkeypatch, 2, plugins=[{"_target_": name}])[1]) is (
        TorchElasticEnvironment
    )
