"""The model of a finished run as one would deploy it: selected weights, living experts alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from dynmoe.backbones import weights
from dynmoe.backbones.deploy import compact_layers, merge_adapters
from dynmoe.convert.checkpoints import BACKBONE
from dynmoe.errors import DataError
from dynmoe.layers.moe import moe_layers
from dynmoe.records import RunFolder
from dynmoe.training import build
from dynmoe.training.saving import read_checkpoint


@dataclass
class TrainedModel:
    """A run's model in evaluation mode, with compact MoE layers and without adapters."""

    model: Any
    cfg: DictConfig
    folder: RunFolder
    checkpoint: Path
    step: int
    class_names: list[str]
    """Empty for regression and for language models."""
    tokenizer: Any = None
    pairs: bool = False
    """Whether a text is a pair of two."""
    channels: int = 0
    """Of an image."""

    @property
    def num_experts(self) -> dict[str, int]:
        """Experts of each MoE layer."""
        return {name: len(layer.live) for name, layer in moe_layers(self.model).items()}


def trained_model(cfg: DictConfig, folder: RunFolder, checkpoint: Path) -> TrainedModel:
    """Build a run's model. Its data are read only where its tokenizer is made of them.

    Raises:
        ConfigError: weights that do not fit the configuration.
        DataError: data that cannot be read, or images whose channels are not known.
    """
    saved = read_checkpoint(checkpoint)
    state = {
        name.removeprefix(BACKBONE): tensor
        for name, tensor in saved["state_dict"].items()
        if name.startswith(BACKBONE)
    }
    data: Any = build.build_data(cfg)
    about: dict[str, Any] = {}
    data.restore(folder.path)
    if data.modality == "text":
        data.read_tokenizer()
        data.tokenizer.model_max_length = data.max_length
        about["tokenizer"], about["pairs"] = data.tokenizer, data.has_pairs
        class_names, arguments = data.class_names, data.backbone_arguments
    elif data.modality == "text-stream":
        data.read_tokenizer()
        about["tokenizer"] = data.tokenizer
        class_names, arguments = [], data.backbone_arguments
    else:
        class_names, about["channels"] = list(folder.read_run()["class_names"]), _channels(state)
        arguments = {"num_classes": len(class_names), "in_chans": about["channels"]}
    model = build.make(cfg.backbone, "backbone", **arguments)
    keeps_origin = any(".origin." in name for name in state)
    init = build.shapes_init(cfg.moe, model)
    build.add_layers(cfg.moe, model, init=init, keep_origin=keeps_origin)
    weights.load_whole(model, state, f"{checkpoint}, for this run's configuration")
    merge_adapters(model)
    compact_layers(model)
    step = saved["global_step"] - 1
    return TrainedModel(model.eval(), cfg, folder, checkpoint, step, class_names, **about)


def _channels(state: Mapping[str, Tensor]) -> int:
    """Return the channels of a ViT's images, by the weights that cut them into patches."""
    for name, tensor in state.items():
        if name.startswith("patch_embed.") and tensor.ndim == 4:
            return tensor.shape[1]
    raise DataError("run=: expected a ViT that cuts images into patches, found no such weights")
