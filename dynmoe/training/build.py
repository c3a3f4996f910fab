"""Build the objects of a run from its configuration, for training and for evaluation."""

from __future__ import annotations

import logging
import platform
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from torch import Tensor, nn

import dynmoe
from dynmoe import runtime, selection
from dynmoe.backbones import hub
from dynmoe.backbones.surgery import add_moe_layers
from dynmoe.config.rules import UNFIT
from dynmoe.config.runs import flat, start_folder
from dynmoe.data.base import StepPlan, TaskData
from dynmoe.errors import ConfigError
from dynmoe.layers.moe import moe_layers
from dynmoe.metrics import efficiency
from dynmoe.records import RunFolder
from dynmoe.tasks.base import MoETask
from dynmoe.training.callbacks import RunProgress, RunRecorder
from dynmoe.training.trained import checkpoint_of

# Lightning announces devices, tips and stop reasons at INFO; the summary says what matters of it.
for _name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=r".*using a custom batch sampler.*")
warnings.filterwarnings("ignore", message=r".*LeafSpec.*")  # inside Lightning 2.6, torch >= 2.11
warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
warnings.filterwarnings("ignore", message=r".*will save all targets and predictions.*")
warnings.filterwarnings("ignore", message=r".*sync_dist=True.*")  # the task sums over ranks itself
warnings.filterwarnings("ignore", message=r".*in eval mode at the start.*")  # frozen vision towers


TOWER = "vision."

REASON = 300  # characters of a reason that are shown: PyTorch names every weight that differs

# Settings of a language model that change its output but not the shapes of its weights.
UNSEEN = ("hidden_act", "layer_norm_eps", "num_attention_heads", "rms_norm_eps", "rope_parameters")


def build_data(cfg: DictConfig, **plan: Any) -> TaskData:
    """The data module, connected to the plan of the run; ``plan`` replaces fields of it.

    Nothing is read from disk before ``setup``.
    """
    data: TaskData = instantiate(cfg.data)
    data.connect(replace(step_plan(cfg), **plan))
    return data


def step_plan(cfg: DictConfig) -> StepPlan:
    """The optimizer steps that the configuration asks for."""
    return StepPlan(
        seed=cfg.seed,
        steps=cfg.trainer.max_steps,  # task.steps, unless the trainer says otherwise
        epochs=cfg.task.get("epochs"),
        eval_every=cfg.task.eval_every,
        accumulate=cfg.trainer.accumulate_grad_batches,
    )


def settle_runtime(cfg: DictConfig) -> dict[str, Any]:
    """Apply ``runtime`` for the device of ``trainer``. Returns the settings in effect."""
    on_gpu = {"gpu": True, "cuda": True, "auto": torch.cuda.is_available()}
    device_type = "cuda" if on_gpu.get(cfg.trainer.accelerator) else str(cfg.trainer.accelerator)
    return runtime.apply(cfg.runtime, "cpu" if device_type == "auto" else device_type)


def build_task(cfg: DictConfig, data: TaskData, fused_attention: bool) -> MoETask:
    """Build backbone, MoE layers and task, on the CPU. Seeds the weights by ``seed``.

    Weights of an earlier stage are loaded before MoE layers are made from them.

    Raises:
        ConfigError: a backbone that cannot be built, has too few positions for the data's texts, or
            lacks blocks that are named; an earlier stage whose weights do not fit.
    """
    L.seed_everything(cfg.seed, verbose=False)
    backbone = instantiate(cfg.backbone, **data.backbone_arguments)
    start = start_folder(cfg)
    if start is not None:
        load_backbone(backbone, start)
    data.check_backbone(backbone)
    runtime.set_fused_attention(backbone, fused_attention)
    adaptation, init = cfg.moe.adaptation, cfg.moe.init
    if init == "auto":
        init = "copy" if cfg.backbone.pretrained or start is not None else "fresh"
    keep_origin = adaptation is not None and adaptation.init == "pretrained"
    add_layers(cfg.moe, backbone, init=init, keep_origin=keep_origin)
    return instantiate(
        cfg.task.module,
        **data.task_arguments,
        backbone=backbone,
        optimizer=instantiate(cfg.task.optimizer),
        scheduler=instantiate(cfg.task.get("scheduler")),
        seed=cfg.seed,
    )


def add_layers(moe: DictConfig, backbone: nn.Module, **settings: Any) -> None:
    """Replace FFNs of a backbone by the MoE layers of a ``moe`` node; ``settings`` are arguments of
    ``add_moe_layers`` that replace those of the node, ``init`` among them where that is auto."""
    given = {
        "num_experts": moe.num_experts,
        "max_experts": moe.max_experts,
        "layers": moe.layers,
        "init": moe.init,
        "expert_dropout": moe.expert_dropout,
        "recompute": moe.recompute,
        **settings,
    }
    if "router" not in given:
        given["router"] = instantiate(moe.router)
    add_moe_layers(backbone, **given)


def build_callbacks(cfg: DictConfig, data: TaskData, folder: RunFolder) -> list[L.Callback]:
    """The adaptation of experts, if any; those of ``trainer.callbacks``; records, checkpoints and
    early stop; progress bar.

    Raises:
        ConfigError: one that a run cannot have.
    """
    callbacks: list[L.Callback] = []
    if cfg.moe.adaptation is not None:
        callbacks.append(instantiate(cfg.moe.adaptation, on_event=partial(folder.append, "events")))
    callbacks += own_callbacks(cfg)
    callbacks.append(
        RunRecorder(
            folder,
            judging(cfg, data),
            constants(cfg, data),
            data.epoch_at,
            cfg.task.get("save_every"),
            cfg.task.get("patience"),
        )
    )
    if cfg.trainer.enable_progress_bar:
        callbacks.append(RunProgress())
    return callbacks


def own_callbacks(cfg: DictConfig) -> list[L.Callback]:
    """The callbacks of ``trainer.callbacks``, a list or one."""
    try:
        given: Any = instantiate(cfg.trainer.get("callbacks"))
    except InstantiationException as error:
        raise ConfigError(f"trainer.callbacks: {error.__cause__ or error}") from error
    callbacks = [given] if isinstance(given, L.Callback) else list(given or ())
    for callback in callbacks:
        if not isinstance(callback, L.Callback):
            raise ConfigError(
                f"trainer.callbacks: expected callbacks of Lightning, found {type(callback)}"
            )
        # The check of the command knows a class by its own name alone.
        if unfit := {cls.__name__ for cls in type(callback).__mro__} & set(UNFIT):
            reasons = "; ".join(f"{name}: {UNFIT[name]}" for name in unfit)
            raise ConfigError(
                f"trainer.callbacks: {type(callback).__name__} cannot be added to a run. {reasons}"
            )
    return callbacks


def build_trainer(
    cfg: DictConfig, callbacks: list[L.Callback], folder: RunFolder, max_steps: int
) -> L.Trainer:
    """The Lightning trainer.

    Raises:
        ConfigError: options that Lightning refuses together, or a missing device.
    """
    loggers = [instantiate(node) for node in (cfg.logger or {}).values()]
    try:
        return instantiate(
            cfg.trainer,
            max_steps=max_steps,
            callbacks=callbacks,
            logger=loggers,
            default_root_dir=str(folder.path),
        )
    except InstantiationException as error:
        if isinstance(error.__cause__, MisconfigurationException):
            raise ConfigError(f"trainer: {error.__cause__} (trainer=cpu runs anywhere)") from error
        raise


def judging(cfg: DictConfig, data: TaskData) -> dict[str, Any]:
    """The entries of ``run.json`` that say how the run is judged; see ``dynmoe.records``."""
    rule = cfg.task.selection
    return {
        "selection": rule,
        "test_envs": data.test_envs,
        **selection.measured_by(rule, data.env_names, data.test_envs),
    }


def constants(cfg: DictConfig, data: TaskData) -> dict[str, Any]:
    """``args`` and ``hparams`` of a result line: those that DomainBed's readers group and select
    by (domainbed/lib/reporting.py, domainbed/model_selection.py, scripts/collect_results.py)."""
    args = {
        "algorithm": cfg.moe.algorithm,
        "dataset": cfg.data.name,
        "test_envs": data.test_envs,
        "trial_seed": cfg.trial_seed,
        "hparams_seed": cfg.hparams_seed,
        "seed": cfg.seed,
    }
    hparams = {
        "lr": cfg.task.optimizer.lr,
        "batch_size": cfg.data.batch_size,
        "weight_decay": cfg.task.optimizer.weight_decay,
    }
    return {"args": args, "hparams": hparams}


def facts(
    cfg: DictConfig,
    data: TaskData,
    task: MoETask,
    trainer: L.Trainer,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The content of ``run.json``: everything a table or figure needs beside the records."""
    costs = efficiency.count(task.backbone, *data.sample)
    return {
        "name": cfg.name,
        "protocol": cfg.protocol.name,
        "modality": data.modality,
        **judging(cfg, data),
        "measure": "accuracy",
        "algorithm": cfg.moe.algorithm,
        "moe": cfg.moe.name,
        "stage": cfg.stage.name if cfg.get("stage") else None,
        "backbone": _backbone_name(cfg.backbone),
        "weights": _weights(cfg.backbone),
        "dataset": cfg.data.name,
        "env_names": data.env_names,
        "class_names": data.class_names,
        "seed": cfg.seed,
        "trial_seed": cfg.trial_seed,
        "hparams_seed": cfg.hparams_seed,
        "steps": data.steps,
        "eval_every": data.eval_every,
        "patience": cfg.task.get("patience"),
        "batch_size": cfg.data.batch_size,
        "data_hash": data.data_hash,
        "sizes": data.sizes,
        **data.facts,
        "config": flat(cfg),
        "costs": costs,
        "start_experts": {n: len(m.live) for n, m in moe_layers(task.backbone).items()},
        "versions": {
            "dynmoe": dynmoe.__version__,
            "torch": torch.__version__,
            "lightning": L.__version__,
            **{name: version(name) for name in data.libraries},
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
    """Return its name and its changes, e.g. ``vit_tiny_patch16_224 (depth 6)``."""
    name = Path(backbone.model or backbone.get("path") or backbone.architecture).name
    changes = [f"folder {Path(backbone.path).name}"] if backbone.get("path") else []
    changes += [f"{key} {value}" for key, value in backbone.options.items()]
    if backbone.get("lora"):
        changes.append(f"LoRA {', '.join(f'{k} {v}' for k, v in backbone.lora.items())}")
    if backbone.get("vision"):
        tower = backbone.vision
        changes.append(f"vision {Path(tower.model or tower.path).name}, {tower.image_size} px")
    return f"{name} ({', '.join(changes)})" if changes else name


def _weights(backbone: DictConfig) -> str:
    """Return ``from scratch``, or the origin of pretrained weights."""
    pretrained = backbone.pretrained
    place = pretrained if isinstance(pretrained, str) else backbone.get("path")
    hub = "hub" if backbone.get("library", "path" in backbone) not in ("timm", False) else "timm"
    found = f"pretrained: {Path(place).name if place else hub}" if pretrained else "from scratch"
    if backbone.get("vision"):
        return f"{found}; vision tower {_weights(backbone.vision)}"
    return found


def _device_name(trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name if trainer.world_size == 1 else f"{trainer.world_size} x {name}"


def load_backbone(backbone: nn.Module, start: Path) -> None:
    """Load the last weights of a finished run into a backbone. The backbone keeps its own vision
    tower if a converted checkpoint has none.

    Raises:
        ConfigError: no such run, weights of another model, or a converted checkpoint of a language
            model with other settings.
    """
    folder = RunFolder(start)
    file = checkpoint_of(folder, "last")
    if not folder.is_done or not file.exists():
        raise ConfigError(
            f"stage.start={start}: expected the folder of a finished run with checkpoints/last.ckpt"
        )
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    prefix = "backbone."
    weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not _has_tower(weights, TOWER):
        weights |= {k: v for k, v in backbone.state_dict().items() if k.startswith(TOWER)}
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(
            f"stage.start={start}: its weights are not those of this backbone before it gets MoE "
            f"layers: {' '.join(str(error).split())[:REASON]}"
        ) from error
    _check_language_model(backbone, start)


def _check_language_model(backbone: nn.Module, start: Path) -> None:
    """Compare the settings that a converted checkpoint has in config.json."""
    folder = start / "language_model"
    if not (folder / "config.json").is_file():
        return
    theirs, ours = hub.configuration(None, str(folder), None, {}), backbone.config
    if wrong := [key for key in UNSEEN if getattr(theirs, key, 0) != getattr(ours, key, 0)]:
        raise ConfigError(
            f"stage.start={start}: its language model has another {', '.join(wrong)} than this "
            f"backbone. Take its own: backbone.path={folder} backbone.pretrained=false"
        )


def load(
    cfg: DictConfig, data: TaskData, fused_attention: bool, checkpoint: Path
) -> tuple[MoETask, int]:
    """Return the task with the checkpoint's weights, on the CPU, and the checkpoint's step.

    Raises:
        ConfigError: its weights are of another size, e.g. since the data's vocabulary has changed.
    """
    saved: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    state, tower = saved["state_dict"], f"backbone.{TOWER}"
    if keeps_tower := "vision" in cfg.backbone and not _has_tower(state, tower):
        cfg.backbone.vision.pretrained = True
    task = build_task(cfg, data, fused_attention)
    if keeps_tower:
        state |= {k: v for k, v in task.state_dict().items() if k.startswith(tower)}
    try:
        task.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(
            f"{checkpoint}: its weights are not those of this run's configuration and data: "
            f"{' '.join(str(error).split())[:REASON]}"
        ) from error
    return task, saved["global_step"] - 1


def _has_tower(weights: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether the vision tower is included: a converted checkpoint may leave it out."""
    return any(name.startswith(prefix) for name in weights)
