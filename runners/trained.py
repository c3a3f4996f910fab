"""A trained run again: its own configuration, and the weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from dynmoe.errors import ConfigError
from dynmoe.report.records import RunFolder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dynmoe.data.task_data import TaskData
    from dynmoe.tasks.base import MoETask

TOWER = "vision."

REASON = 300  # characters of a reason: PyTorch names every weight that does not fit

# What a language model computes with its weights that their shapes do not tell.
UNSEEN = ("hidden_act", "layer_norm_eps", "num_attention_heads", "rms_norm_eps", "rope_parameters")

# What runs of early versions did not save.
EARLIER = {
    "runtime": {"matmul_precision": "highest", "malloc": "auto", "fused_attention": True},
    "moe": {"recompute": False},
}


def configuration(folder: RunFolder) -> DictConfig:
    """What the run was trained with, for one device, without loggers, and without kept tokens.

    Raises:
        ConfigError: the folder is no run.
    """
    saved = folder.path / "config.yaml"
    if not saved.exists():
        raise ConfigError(f"{folder.path}: expected a folder with a config.yaml, found none")
    cfg = OmegaConf.merge(EARLIER, OmegaConf.load(saved))
    assert isinstance(cfg, DictConfig)
    if cfg.moe.init == "upcycle":  # its name in early versions
        cfg.moe.init = "copy"
    elif cfg.moe.init == "cluster":  # equal shapes, without the k-means
        cfg.moe.init = "random"
    cfg.trainer.update(devices=1, strategy="auto")
    cfg.logger = None
    cfg.backbone.pretrained = False  # the weights come from a checkpoint
    if "vision" in cfg.backbone:
        cfg.backbone.vision.pretrained = False
    if cfg.get("stage") is not None:
        cfg.stage.start = None
    if "cache" in cfg.get("data", {}):
        cfg.data.cache = None  # the folder may be of another machine
    return cfg


def checkpoint_of(folder: RunFolder, name: str) -> Path:
    """``selected``, ``last``, or a file."""
    if name in ("selected", "last"):
        return folder.path / "checkpoints" / f"{name}.ckpt"
    return Path(name)


def load_backbone(backbone: nn.Module, start: Path) -> None:
    """Give a backbone the weights that a finished run ends with; a converted checkpoint's without a
    vision tower leave it its own.

    Raises:
        ConfigError: no such run, weights of another model, or a converted checkpoint whose weights
            would be used in another way.
    """
    import torch

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
    """A converted checkpoint says in config.json how its weights are to be used."""
    from dynmoe.backbones import hub

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
    """The task as the checkpoint left it, on the CPU, and the step it is of.

    Raises:
        ConfigError: its weights are of another size, as where the data's vocabulary has changed.
    """
    import torch

    from runners import build

    saved: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    state, tower = saved["state_dict"], f"backbone.{TOWER}"
    if keeps_tower := "vision" in cfg.backbone and not _has_tower(state, tower):
        cfg.backbone.vision.pretrained = True
    task = build.build_task(cfg, data, fused_attention)
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
    """False of a converted checkpoint whose vision tower is published elsewhere."""
    return any(name.startswith(prefix) for name in weights)
