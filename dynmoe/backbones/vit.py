"""Vision Transformers by timm name, pretrained from timm's hub, from a file, or from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from dynmoe.errors import ConfigError

modality = "image"

REASON = 300  # characters of a reason: PyTorch names every weight that does not fit


def build_vit(
    model: str,
    num_classes: int,
    in_chans: int = 3,
    image_size: int = 224,
    pretrained: bool | str = False,
    drop_path: float = 0.0,
    grad_checkpointing: bool = False,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A timm ViT with a new classification head; ``[B, in_chans, H, W] -> [B, num_classes]``.

    ``pretrained``: False, True (timm downloads the model's own weights), or a ``.safetensors``,
    ``.pth`` or ``.bin`` file, which needs no network. Position embeddings are resized to
    ``image_size`` (pixels). ``grad_checkpointing`` recomputes blocks in the backward pass: less
    memory, a third more time. ``options`` go to ``timm.create_model`` (embed_dim, depth, ...).

    Raises:
        ConfigError: an unknown model, or weights that cannot be had or do not fit.
    """
    if not timm.is_model(model):
        near = timm.list_models(f"*{model.split('_')[0]}*")[:8]
        raise ConfigError(f"backbone.model={model}: timm knows no such model. Near: {near}")
    overlay = {"file": pretrained} if isinstance(pretrained, str) else None
    try:
        vit = timm.create_model(
            model,
            pretrained=bool(pretrained),
            pretrained_cfg_overlay=overlay,
            num_classes=num_classes,
            in_chans=in_chans,
            img_size=image_size,
            drop_path_rate=drop_path,
            **(options or {}),
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:REASON]
        if not pretrained:
            raise ConfigError(f"backbone: timm cannot build {model}: {reason}") from error
        raise ConfigError(
            f"backbone.pretrained={pretrained}: the weights of {model} could not be loaded "
            f"({type(error).__name__}: {reason}). Without network give a file that fits the model, "
            "backbone.pretrained=/path/to/weights.safetensors, or train from scratch with "
            "backbone.pretrained=false."
        ) from error
    if not hasattr(vit, "blocks"):
        raise ConfigError(f"backbone.model={model}: expected a Vision Transformer with blocks")
    if grad_checkpointing:
        vit.set_grad_checkpointing()  # type: ignore[operator]
    return vit
