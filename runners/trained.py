"""A trained run again: its own configuration, and the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from dynmoe.errors import ConfigError
from dynmoe.report.records import RunFolder

if TYPE_CHECKING:
    from torch import nn

    from dynmoe.data.task_data import TaskData
    from dynmoe.tasks.base import MoETask

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
    if "cache" in cfg.data:
        cfg.data.cache = None  # the folder may be of another machine
    return cfg


def checkpoint_of(folder: RunFolder, name: str) -> Path:
    """``selected``, ``last``, or a file."""
    if name in ("selected", "last"):
        return folder.path / "checkpoints" / f"{name}.ckpt"
    return Path(name)


def load_backbone(backbone: nn.Module, start: Path) -> None:
    """Give a backbone the weights that a finished run ends with.

    Raises:
        ConfigError: no such run, or weights of another model.
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
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(
            f"stage.start={start}: its weights are not those of this backbone before it gets MoE "
            f"layers: {' '.join(str(error).split())[:300]}"
        ) from error


def load(
    cfg: DictConfig, data: TaskData, fused_attention: bool, checkpoint: Path
) -> tuple[MoETask, int]:
    """The task as the checkpoint left it, on the CPU, and the step it is of."""
    import torch

    from runners import build

    task = build.build_task(cfg, data, fused_attention)
    state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    task.load_state_dict(state["state_dict"])
    return task, state["global_step"] - 1
