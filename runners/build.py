"""From a composed configuration to the objects of a run. Shared by training and evaluation."""

from __future__ import annotations

import logging
import platform
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

import dynmoe
from dynmoe import runtime
from dynmoe.backbones.surgery import add_moe_layers
from dynmoe.config.identity import flat
from dynmoe.data.baseline import linear_baseline
from dynmoe.data.module import DomainData
from dynmoe.errors import ConfigError
from dynmoe.layers.moe import moe_layers
from dynmoe.metrics import efficiency, selection
from dynmoe.report.records import RunFolder
from dynmoe.tasks.base import MoETask
from dynmoe.tasks.progress import RunProgress
from dynmoe.tasks.recorder import RunRecorder

# Lightning announces devices, tips and stop reasons at INFO; the summary says what matters of it.
for _name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=r".*LeafSpec.*")  # inside Lightning 2.6, torch >= 2.11
warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
warnings.filterwarnings("ignore", message=r".*sync_dist=True.*")  # the task sums over ranks itself


def build_data(cfg: DictConfig) -> DomainData:
    """The data module. Nothing is read from disk before ``setup``."""
    return instantiate(cfg.data)


def settle_runtime(cfg: DictConfig) -> dict[str, Any]:
    """Put ``runtime`` in force for the device of ``trainer``. Returns what holds now."""
    on_gpu = {"gpu": True, "cuda": True, "auto": torch.cuda.is_available()}
    device_type = "cuda" if on_gpu.get(cfg.trainer.accelerator) else str(cfg.trainer.accelerator)
    return runtime.settle(cfg.runtime, "cpu" if device_type == "auto" else device_type)


def build_task(cfg: DictConfig, data: DomainData, fused_attention: bool) -> MoETask:
    """Backbone, MoE layers and task, on the CPU. Seeds the weights by ``seed``.

    Raises:
        ConfigError: a backbone that cannot be built, or blocks it does not have.
    """
    L.seed_everything(cfg.seed, verbose=False)
    backbone = instantiate(cfg.backbone, num_classes=data.num_classes, in_chans=data.channels)
    runtime.set_fused_attention(backbone, fused_attention)
    moe = cfg.moe
    init = moe.init
    if init == "auto":
        init = "upcycle" if cfg.backbone.pretrained else "fresh"
    add_moe_layers(
        backbone,
        router=instantiate(moe.router),
        num_experts=moe.num_experts,
        max_experts=moe.max_experts,
        layers=moe.layers,
        init=init,
        expert_dropout=moe.expert_dropout,
        recompute=moe.recompute,
        keep_origin=moe.adaptation is not None and moe.adaptation.init == "pretrained",
    )
    return instantiate(
        cfg.task.module,
        num_classes=data.num_classes,
        num_envs=len(data.env_names),
        test_envs=data.test_envs,
        backbone=backbone,
        optimizer=instantiate(cfg.task.optimizer),
        seed=cfg.seed,
    )


def build_callbacks(cfg: DictConfig, data: DomainData, folder: RunFolder) -> list[L.Callback]:
    """The adaptation of experts, if any; records and checkpoints; the progress bar."""
    callbacks: list[L.Callback] = []
    if cfg.moe.adaptation is not None:
        callbacks.append(instantiate(cfg.moe.adaptation, on_event=partial(folder.append, "events")))
    select = partial(
        selection.selected, rule=cfg.task.selection, test_envs=list(cfg.data.test_envs)
    )
    callbacks.append(RunRecorder(folder, select, constants(cfg, folder), data.steps_per_epoch))
    if cfg.trainer.enable_progress_bar:
        callbacks.append(RunProgress())
    return callbacks


def build_trainer(cfg: DictConfig, callbacks: list[L.Callback], folder: RunFolder) -> L.Trainer:
    """The Lightning trainer.

    Raises:
        ConfigError: what Lightning says of options that do not go together, or a missing device.
    """
    loggers = [instantiate(node) for node in (cfg.logger or {}).values()]
    try:
        return instantiate(
            cfg.trainer, callbacks=callbacks, logger=loggers, default_root_dir=str(folder.path)
        )
    except InstantiationException as error:
        if isinstance(error.__cause__, MisconfigurationException):
            raise ConfigError(f"trainer: {error.__cause__} (trainer=cpu runs anywhere)") from error
        raise


def constants(cfg: DictConfig, folder: RunFolder) -> dict[str, Any]:
    """``args`` and ``hparams`` of a result line, as domainbed/scripts/train.py writes them."""
    recipe = {
        "lr": cfg.task.optimizer.lr,
        "batch_size": cfg.data.batch_size,
        "weight_decay": cfg.task.optimizer.weight_decay,
    }
    hparams = {**recipe, "moe": OmegaConf.to_container(cfg.moe, resolve=True)}
    args = {
        "algorithm": cfg.moe.algorithm,
        "dataset": cfg.data.name,
        "test_envs": list(cfg.data.test_envs),
        "trial_seed": cfg.trial_seed,
        "hparams_seed": cfg.hparams_seed,
        "seed": cfg.seed,
        "holdout_fraction": cfg.protocol.holdout_fraction,
        "uda_holdout_fraction": 0,
        "task": "domain_generalization",
        "steps": cfg.trainer.max_steps,
        "checkpoint_freq": cfg.task.eval_every,
        "data_dir": cfg.data.get("root"),
        "output_dir": str(folder.path),
        "hparams": None,
        "skip_model_save": False,
        "save_model_every_checkpoint": False,
    }
    return {"args": args, "hparams": hparams}


def facts(
    cfg: DictConfig,
    data: DomainData,
    task: MoETask,
    trainer: L.Trainer,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """What ``run.json`` says: everything a table or figure needs beside the records."""
    pretrained = cfg.backbone.pretrained
    weights = "from scratch"
    if pretrained:
        tag = Path(pretrained).name if isinstance(pretrained, str) else "timm"
        weights = f"pretrained: {tag}"
    size = cfg.data.image_size
    costs = efficiency.count(task.backbone, torch.empty(1, data.channels, size, size))
    return {
        "name": cfg.name,
        "protocol": cfg.protocol.name,
        "selection": cfg.task.selection,
        "algorithm": cfg.moe.algorithm,
        "moe": cfg.moe.name,
        "backbone": _backbone_name(cfg.backbone),
        "weights": weights,
        "dataset": cfg.data.name,
        "env_names": data.env_names,
        "test_envs": data.test_envs,
        "class_names": data.class_names,
        "seed": cfg.seed,
        "trial_seed": cfg.trial_seed,
        "hparams_seed": cfg.hparams_seed,
        "steps": cfg.trainer.max_steps,
        "batch_size": cfg.data.batch_size,
        "data_hash": data.data_hash,
        "sizes": data.sizes,
        "config": flat(cfg),
        "costs": costs,
        "parameters": costs["parameters"],  # as in runs that have no costs
        "start_experts": {n: len(m.live) for n, m in moe_layers(task.backbone).items()},
        "baseline": linear_baseline(data) if data.linear_baseline else None,
        "versions": {
            "dynmoe": dynmoe.__version__,
            "torch": torch.__version__,
            "lightning": L.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
        "machine": runtime.machine(),
        "device": _device_name(trainer),
        "threads": torch.get_num_threads(),
        "runtime": {
            **settings,
            "precision": str(cfg.trainer.precision),
            "fused_optimizer": bool(cfg.task.optimizer.get("fused")),
        },
    }


def _backbone_name(backbone: DictConfig) -> str:
    """The timm name and what was changed in it, e.g. ``vit_tiny_patch16_224 (depth 6)``."""
    changes = ", ".join(f"{key} {value}" for key, value in backbone.options.items())
    return f"{backbone.model} ({changes})" if changes else backbone.model


def _device_name(trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name if trainer.world_size == 1 else f"{trainer.world_size} x {name}"
