"""Rules about processes: those that Slurm has started, and those that a launcher asks it for."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from dynmoe import process, ranks
from dynmoe.config.options import device_count, read

# Our launchers by the end of their target: the package that they need.
PACKAGES = {"LocalLauncher": "submitit", "SlurmLauncher": "submitit", "RayLauncher": "ray"}

START = 120
"""Seconds from the start of a job to its first step, with the minute by which Slurm may send a
signal too early."""

COUNTS = ("timeout_min", "signal_delay_s", "array_parallelism", "nodes")


def launcher_of(cfg: DictConfig) -> dict[str, Any]:
    """The node of the launcher; a job's own configuration has left it to Hydra's."""
    node = read(cfg, "hydra.launcher", dict)
    if node is None and HydraConfig.initialized():
        node = OmegaConf.to_container(HydraConfig.get().launcher)  # type: ignore[assignment]
    return node or {}


def kind(cfg: DictConfig) -> str:
    """Which launcher, by its class: `SlurmLauncher`."""
    return str(launcher_of(cfg).get("_target_")).rpartition(".")[2]


def runs_elsewhere(cfg: DictConfig) -> bool:
    """Whether this process only sends the job to other machines."""
    return kind(cfg) in ("SlurmLauncher", "RayLauncher") and not process.is_worker()


def as_many_as_started(cfg: DictConfig) -> Iterator[str]:
    """Lightning leaves it to Slurm to start processes, and trains in one if there is one."""
    tasks, devices = ranks.tasks(), device_count(cfg)
    if tasks is None or devices is None or read(cfg, "mode", str) != "train":
        return
    wanted = devices * (read(cfg, "trainer.num_nodes", int) or 1)
    if tasks == wanted or runs_elsewhere(cfg):
        return
    if wanted == 1:
        yield (
            f"trainer.devices: {tasks} tasks of Slurm would train the same run on one device each. "
            f"Start one, srun --ntasks=1, or share the run: trainer=ddp trainer.devices={tasks}"
        )
    else:
        yield (
            f"trainer: {wanted} devices need {wanted} tasks of Slurm, found {tasks}. Ask for them, "
            f"sbatch --ntasks-per-node={devices}, and begin the command with srun: "
            f"srun --ntasks-per-node={devices} dynmoe-run ... Or set trainer=cpu trainer.devices=1"
        )


def one_device_per_job(cfg: DictConfig) -> Iterator[str]:
    """Lightning starts its other processes with the whole command line, the sweep's -m included;
    Slurm starts all of them."""
    if kind(cfg) == "SlurmLauncher":
        return
    strategy = read(cfg, "trainer.strategy", str) or read(cfg, "trainer.strategy._target_", str)
    distributed = any(
        word in str(strategy).lower() for word in ("ddp", "fsdp", "parallel", "deepspeed")
    )
    if distributed or device_count(cfg) != 1:
        yield (
            "trainer: a sweep runs each job on one device, found "
            f"devices={read(cfg, 'trainer.devices', object)}, strategy={strategy}. "
            "Set trainer.devices=1 trainer.strategy=auto, start the jobs one by one, or send them "
            "to Slurm: hydra/launcher=submitit_slurm."
        )


def launcher_has_a_sweep(cfg: DictConfig) -> Iterator[str]:
    """Hydra asks no launcher about one run, and would train here."""
    name = kind(cfg)
    if name in PACKAGES and not process.is_worker():
        yield (
            f"hydra/launcher: {name} starts the jobs of sweeps, and this is one run, which would "
            "train in this process. Add -m, or sweep=NAME; or leave hydra/launcher out"
        )


def launcher_fits(cfg: DictConfig) -> Iterator[str]:
    """The launcher's package, and what it asks Slurm for."""
    name, node = kind(cfg), launcher_of(cfg)
    if process.is_worker() or name not in PACKAGES:
        return
    package = PACKAGES[name]
    if find_spec(package) is None:
        yield f'hydra/launcher: needs {package}, not installed: pip install -e ".[{package}]"'
    counts = {key: node[key] for key in COUNTS if key in node}
    wrong = {k: v for k, v in counts.items() if type(v) is not int or v < 1}
    for key, value in wrong.items():
        yield f"hydra.launcher.{key}: expected a whole number of 1 or more, found {value}"
    if name != "SlurmLauncher" or wrong:
        return
    again = node.get("max_num_timeout")
    if type(again) is not int or again < 0:
        yield f"hydra.launcher.max_num_timeout: expected 0 or more, found {again}"
    limit, delay = 60 * node["timeout_min"], node["signal_delay_s"]
    if limit < delay + START:
        yield (
            f"hydra.launcher.timeout_min: {node['timeout_min']} min are over before a job that is "
            f"told {delay} s earlier (hydra.launcher.signal_delay_s) has taken a step. Set "
            f"hydra.launcher.timeout_min={-(-(delay + START) // 60)} or more"
        )
    devices, tasks = device_count(cfg), node.get("tasks_per_node")
    nodes = read(cfg, "trainer.num_nodes", int) or 1
    if devices is None or (tasks is not None and tasks != devices):
        yield (
            f"hydra.launcher.tasks_per_node: expected one task for each of trainer.devices="
            f"{read(cfg, 'trainer.devices', object)}, found {tasks}. Set trainer.devices=N, and "
            "hydra.launcher.tasks_per_node=null, which follows it"
        )
    if node["nodes"] != nodes:
        yield (
            f"hydra.launcher.nodes: expected trainer.num_nodes ({nodes}), found {node['nodes']}. "
            f"Set +trainer.num_nodes={node['nodes']} or hydra.launcher.nodes={nodes}"
        )
