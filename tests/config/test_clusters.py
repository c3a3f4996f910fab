"""Commands refused for the number of processes that Slurm starts, or for what they ask it for."""

from __future__ import annotations

import pytest
from omegaconf import DictConfig, OmegaConf

from dynmoe import process
from dynmoe.config import clusters

LAUNCHER = {
    "_target_": "hydra_plugins.dynmoe_sweeper._launchers.SlurmLauncher",
    **{"timeout_min": 60, "signal_delay_s": 60, "max_num_timeout": 20},
    **{"array_parallelism": 256, "nodes": 1, "tasks_per_node": None},
}
DDP = {"devices": 2, "strategy": {"_target_": "lightning.pytorch.strategies.DDPStrategy"}}
ONE = {"devices": 1, "strategy": "auto"}


def config(trainer: dict[str, object], **launcher: object) -> DictConfig:
    node = {"launcher": LAUNCHER | launcher} if launcher else {"launcher": {"_target_": "a.Basic"}}
    return OmegaConf.create({"mode": "train", "trainer": trainer, "hydra": node})


@pytest.mark.parametrize(
    ("tasks", "trainer", "words"),
    [
        (None, DDP, ()),
        (1, ONE, ()),
        (2, DDP, ()),
        (1, DDP, ("found 1", "sbatch --ntasks-per-node=2", "srun", "trainer.devices=1")),
        (2, ONE, ("2 tasks", "srun --ntasks=1", "trainer=ddp trainer.devices=2")),
        (4, {**DDP, "num_nodes": 2}, ()),
        (2, {**DDP, "num_nodes": 2}, ("4 devices need 4 tasks", "found 2")),
    ],
)
def test_as_many_devices_as_tasks(
    tasks: int | None,
    trainer: dict[str, object],
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dynmoe.ranks.tasks", lambda: tasks)
    found = [*clusters.as_many_as_started(config(trainer))]
    assert len(found) == bool(words)
    assert all(word in found[0] for word in words)


def test_a_launcher_in_a_job_of_slurm_sends_its_jobs_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dynmoe.ranks.tasks", lambda: 1)
    monkeypatch.setattr(process, "_role", "")
    assert not [*clusters.as_many_as_started(config(DDP, nodes=1))]
    monkeypatch.setattr(process, "_role", "worker")  # in one of these jobs
    assert [*clusters.as_many_as_started(config(DDP, nodes=1))]


def test_a_sweep_has_several_devices_per_job_on_slurm_alone() -> None:
    assert "submitit_slurm" in next(clusters.one_device_per_job(config(DDP)))
    assert not [*clusters.one_device_per_job(config(DDP, nodes=1))]


@pytest.mark.parametrize(
    ("trainer", "launcher", "words"),
    [
        (ONE, {}, ()),
        (DDP, {}, ()),
        (ONE, {"timeout_min": 3, "signal_delay_s": 120}, ("timeout_min", "timeout_min=4")),
        (ONE, {"timeout_min": 0}, ("timeout_min: expected a whole number",)),
        (ONE, {"timeout_min": "1h"}, ("timeout_min: expected a whole number",)),
        (ONE, {"max_num_timeout": -1}, ("max_num_timeout: expected 0 or more",)),
        (DDP, {"tasks_per_node": 1}, ("tasks_per_node", "devices=2", "tasks_per_node=null")),
        ({"devices": "auto", "strategy": "auto"}, {}, ("trainer.devices=N",)),
        (ONE, {"nodes": 2}, ("hydra.launcher.nodes", "+trainer.num_nodes=2")),
    ],
)
def test_what_a_launcher_asks_for(
    trainer: dict[str, object], launcher: dict[str, object], words: tuple[str, ...]
) -> None:
    pytest.importorskip("submitit")
    found = [*clusters.launcher_fits(config(trainer, **LAUNCHER | launcher))]
    assert len(found) == bool(words), found
    assert all(word in found[0] for word in words)


def test_a_launcher_names_the_extra_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "find_spec", lambda _: None)
    (found,) = clusters.launcher_fits(config(ONE, nodes=1))
    assert 'pip install -e ".[submitit]"' in found
