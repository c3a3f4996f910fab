"""Vision Transformers: classifiers by timm name, and the towers of vision-language models.

Shape suffixes: I images, P patches, V width of the vision tower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, SiglipVisionModel

from dynmoe.backbones import hub, sparse, weights
from dynmoe.backbones.weights import Head
from dynmoe.errors import REASON, ConfigError, reason_of
from dynmoe.network import go_offline_if_unreachable

modality = "image"

VIT_NEEDED = "a Vision Transformer with blocks is needed, e.g. vit_small_patch16_224"


def build_vit(
    model: str,
    num_classes: int,
    in_chans: int = 3,
    image_size: int = 224,
    pretrained: bool | str = False,
    head: Head = "new",
    drop_path: float = 0.0,
    grad_checkpointing: bool = False,
    token_sparsify: Mapping[str, Any] | None = None,
    adapter: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A timm ViT that classifies; ``[B, in_chans, H, W] -> [B, num_classes]``.

    ``pretrained``: False, True (timm downloads the model's own weights), or a file of safetensors
    or PyTorch, which needs no network: see ``weights.read`` and ``weights.align`` for the forms
    that are understood. Every tensor has to come from it; the head is new, or (``head="keep"``)
    theirs, of as many classes. Position embeddings are resampled to ``image_size`` (pixels).
    ``grad_checkpointing`` recomputes blocks in the backward pass: less memory, a third more time.
    ``token_sparsify`` and ``adapter``: fewer tokens in later blocks, and trained adapters in a
    frozen backbone (``sparse.tune``). ``options`` go to ``timm.create_model`` (embed_dim, ...).

    Raises:
        ConfigError: an unknown model, or weights that cannot be loaded or do not fit; tokens or
            adapters that it cannot have.
    """
    if not timm.is_model(model):
        near = get_close_matches(model.partition(".")[0], timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"backbone.model={model}: timm knows no such model.{hint}")
    create = partial(
        timm.create_model,
        model,
        num_classes=num_classes,
        in_chans=in_chans,
        img_size=image_size,
        drop_path_rate=drop_path,
        **(options or {}),
    )
    weights.check_head(head, bool(pretrained))
    if pretrained is True or ":" in model:
        go_offline_if_unreachable()
    try:
        with torch.device("meta") if pretrained else nullcontext():
            vit = create()
    except Exception as error:
        reason = reason_of(error)
        if isinstance(error, TypeError) and "img_size" in reason:
            raise ConfigError(f"backbone.model={model}: {VIT_NEEDED}") from error
        raise ConfigError(
            f"backbone: timm cannot build {model} with backbone.options={dict(options or {})}: "
            f"{reason}"
        ) from error
    if not hasattr(vit, "blocks"):
        raise ConfigError(f"backbone.model={model}: {VIT_NEEDED}")
    if pretrained:
        vit = _pretrained_vit(create, vit, pretrained, head)
    if token_sparsify is not None or adapter is not None:
        sparse.tune(vit, token_sparsify, adapter, bool(pretrained))
    if grad_checkpointing:
        vit.set_grad_checkpointing()  # type: ignore[operator]
    return vit


def _pretrained_vit(
    create: Callable[..., nn.Module], shapes: Any, pretrained: bool | str, kept: Head
) -> nn.Module:
    """The model with its weights; ``shapes`` is the same model without any.

    Raises:
        ConfigError: weights that cannot be loaded, or that leave a tensor of the model or of the
            file over.
    """
    place, file, overlay = f"backbone.pretrained={pretrained}", None, None
    head = shapes.pretrained_cfg["classifier"]
    heads = [f"{name}." for name in ((head,) if isinstance(head, str) else head or ())]
    try:
        if isinstance(pretrained, str):
            names = [name for name in shapes.state_dict() if not name.startswith(tuple(heads))]
            file = weights.align(weights.read(Path(pretrained).expanduser()), names)
            overlay = {"state_dict": file.tensors}
            if kept == "keep":  # timm drops a head of another number of classes than ImageNet's
                overlay["num_classes"] = shapes.num_classes
        with weights.checked_loading(place, heads if kept == "new" else (), file) as loaded:
            vit = create(pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:
        reason = " ".join(str(error).removeprefix(f"{place}: ").split())[:REASON]
        raise ConfigError(
            f"{place}: the weights of {shapes.pretrained_cfg['architecture']} could not be loaded "
            f"({reason}). Give a file that fits the model and backbone.options, "
            "backbone.pretrained=/path/to/weights.safetensors, or train from scratch with "
            "backbone.pretrained=false."
        ) from error
    vit.pretrained_cfg.pop("state_dict", None)  # type: ignore[union-attr,operator]
    if loaded:  # not of the archives that timm reads itself, name by name
        weights.remember(vit, loaded[-1])
    return vit


# A language model sees the patch tokens of a Vision Transformer's inner layer.

# Vision towers of transformers by ``model_type``, of whole CLIPs as of their vision half.
TRANSFORMERS: dict[str, Any] = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}

NODE = "backbone.vision"


class TimmTower(nn.Module):
    """A ViT of timm up to its block ``layer``, counted from the end: -1 is the last one.

    ``[I, 3, H, W] -> [I, P, V]``. Blocks after it, norm, pooling and head are dropped. As in
    LLaVA, whose features are CLIP's ``hidden_states[layer]``, no final norm is applied and the
    class token is left out.
    """

    def __init__(self, model: Any, layer: int) -> None:
        super().__init__()
        model.prune_intermediate_layers([len(model.blocks) + layer], prune_norm=True)
        self.model = model
        self.width = int(model.embed_dim)
        self.patches = int(model.patch_embed.num_patches)

    def forward(self, images: Tensor) -> Tensor:
        (patches_IPV,) = self.model.forward_intermediates(
            images,
            indices=[len(self.model.blocks) - 1],
            output_fmt="NLC",
            intermediates_only=True,
        )
        out: Tensor = patches_IPV
        return out


class TransformersTower(nn.Module):
    """The same of CLIP or SigLIP in transformers: ``hidden_states[layer]`` without class token."""

    def __init__(self, model: Any, layer: int) -> None:
        super().__init__()
        config = model.config
        layers = model.encoder.layers
        model.encoder.layers = layers[: len(layers) + 1 + layer]
        model.post_layernorm = nn.Identity()
        if hasattr(model, "head"):  # SigLIP's pooling
            model.use_head = False
            del model.head
        self.model = model
        self.width = int(config.hidden_size)
        self.patches = (config.image_size // config.patch_size) ** 2

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.model(pixel_values=images).last_hidden_state
        return hidden[:, -self.patches :]


def build_vision_tower(
    image_size: int,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    library: Literal["timm", "transformers"] = "timm",
    model: str | None = None,
    path: str | None = None,
    pretrained: bool | str = False,
    layer: int = -2,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A vision tower for images of ``image_size`` px in patches of ``patch_size`` px.

    ``library="timm"``: ``model`` is timm's name of any ViT, ``pretrained`` as in ``build_vit``;
    ``transformers``: ``model`` is a CLIP or SigLIP on the hub, or ``path`` its folder.
    ``mean`` and ``std`` are what the data normalises images with.
    ``options`` change the architecture.

    Raises:
        ConfigError: a model that is not there or has another patch size, or fewer layers.
    """
    if layer >= 0:
        raise ConfigError(f"{NODE}.layer: counted from the end, -1 is the last: {layer}")
    tower: TimmTower | TransformersTower
    if library == "timm":
        if model is None or path is not None:
            raise ConfigError(
                f"{NODE}: library=timm takes a timm name as model, and a file of weights "
                "as pretrained, no path"
            )
        try:
            vit: Any = build_vit(
                model, num_classes=0, image_size=image_size, pretrained=pretrained, options=options
            )
        except ConfigError as error:  # speaks of the keys of a backbone
            raise ConfigError(str(error).replace("backbone", NODE)) from error
        _check_depth(layer, len(vit.blocks))
        tower = TimmTower(vit, layer)
    else:
        if isinstance(pretrained, str):
            raise ConfigError(f"{NODE}.pretrained: expected true or false, and path=FOLDER")
        tower = _from_transformers(model, path, pretrained, image_size, layer, options or {})
    if image_size % patch_size or tower.patches != (image_size // patch_size) ** 2:
        raise ConfigError(
            f"{NODE}.patch_size={patch_size}: this tower makes {tower.patches} patches of "
            f"{image_size} px. Give the size they have, {image_size / tower.patches**0.5:g} px, or "
            f"change the tower by {NODE}.options.patch_size"
        )
    return tower


def _from_transformers(
    model: str | None,
    path: str | None,
    pretrained: bool,
    image_size: int,
    layer: int,
    options: Mapping[str, Any],
) -> TransformersTower:
    whole = hub.configuration(model, path, None, {}, NODE)
    kind = whole.model_type.removesuffix("_vision_model")
    if kind not in TRANSFORMERS:
        raise ConfigError(f"{NODE}: expected a CLIP or SigLIP, found a '{whole.model_type}'")
    config = hub.changed(getattr(whole, "vision_config", whole), options, NODE)
    if pretrained:
        tower = hub.with_weights(TRANSFORMERS[kind], model, path, config, NODE)
    else:
        tower = TRANSFORMERS[kind]._from_config(config, dtype=torch.float32)
    if config.image_size != image_size:
        raise ConfigError(
            f"{NODE}.image_size={image_size}: this tower is for {config.image_size} px"
        )
    _check_depth(layer, config.num_hidden_layers)
    return TransformersTower(tower, layer)


def _check_depth(layer: int, depth: int) -> None:
    if -layer > depth:
        raise ConfigError(f"{NODE}.layer={layer}: this tower has {depth} blocks")
