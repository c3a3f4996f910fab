"""Rules about the backbone that its configuration and a few source files decide, without PyTorch.

Names of models are read from the sources of timm and transformers; a model in a folder from its
config.json.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dynmoe.config.options import modality, read
from dynmoe.config.targets import (
    TargetError,
    Unreadable,
    class_attribute,
    did_you_mean,
    locate,
)

# The number of blocks, in timm's options and in those of transformers' families.
DEPTHS = ("depth", "num_hidden_layers", "n_layer", "n_layers")


def known_vits(cfg: DictConfig) -> Iterator[str]:
    """timm's models by name; `hf_hub:` and other places are looked up when they are loaded."""
    for node in ("backbone", "backbone.vision"):
        model = read(cfg, f"{node}.model", str)
        if model is None or ":" in model or not _is_timm(cfg, node):
            continue
        known = timm_models()
        name = model.partition(".")[0]
        if known and name not in known:
            near = did_you_mean(name, known, 3)
            yield f"{node}.model: timm knows no '{model}'.{near or ' timm.list_models() has all.'}"
        elif known and not known[name]:
            yield (
                f"{node}.model: a Vision Transformer is needed, '{model}' is none. "
                "Choose one, e.g. vit_small_patch16_224 or deit_small_patch16_224"
            )


def _is_timm(cfg: DictConfig, node: str) -> bool:
    if node == "backbone":
        return modality(cfg, "backbone") == "image"
    return read(cfg, f"{node}.library", str) == "timm"


@lru_cache
def timm_models() -> dict[str, bool]:
    """timm's models, each with whether its module may make Vision Transformers: blocks, sizes."""
    found: dict[str, bool] = {}
    for file in _folder("timm", "models").glob("*.py"):
        source = file.read_text(encoding="utf-8")
        is_vit = "VisionTransformer" in source or ("self.blocks" in source and "img_size" in source)
        names = re.findall(r"^@register_model\s*\ndef (\w+)\(", source, re.M)
        for renamed in re.findall(
            r"^register_model_deprecations\(__name__, \{(.*?)^\}\)", source, re.M | re.S
        ):
            names += re.findall(r"^    ['\"](\w+)['\"]:", renamed, re.M)
        found |= dict.fromkeys(names, is_vit)
    return found


def _folder(package: str, *below: str) -> Path:
    spec = find_spec(package)
    origin = spec.origin if spec is not None else None
    return Path(origin or ".").parent.joinpath(*below)


def whole_patches(cfg: DictConfig) -> Iterator[str]:
    for node in ("backbone", "backbone.vision"):
        pixels, patch = read(cfg, f"{node}.image_size", int), patch_size(cfg, node)
        if pixels is None or patch is None or min(pixels, patch) < 1:
            continue
        if pixels % patch:
            sizes = [n for n in (pixels // patch * patch, (pixels // patch + 1) * patch) if n]
            yield (
                f"{node}.image_size: {pixels} px are no whole number of patches of {patch} px. "
                f"Take {' or '.join(map(str, sizes))}"
            )
        given = read(cfg, f"{node}.patch_size", int)
        if given is not None and given != patch:
            yield (
                f"{node}.patch_size: expected {patch}, the size of this tower's patches, found "
                f"{given}. {node}.options.patch_size changes both"
            )


def patch_size(cfg: DictConfig, node: str) -> int | None:
    """Pixels of a patch: of the options, else of the model's name."""
    given = read(cfg, f"{node}.options.patch_size", int)
    name = re.search(r"patch(\d+)", read(cfg, f"{node}.model", str) or "")
    return given or (int(name[1]) if name else None) or read(cfg, f"{node}.patch_size", int)


def data_fit_backbone(cfg: DictConfig) -> Iterator[str]:
    """Keys of the data that are copies of the backbone's."""
    node = "backbone.vision" if modality(cfg, "data") == "vision-language" else "backbone"
    for key in ("image_size", "patch_size"):
        ours, theirs = read(cfg, f"data.{key}", int), read(cfg, f"{node}.{key}", int)
        if ours is not None and theirs is not None and ours != theirs:
            yield (
                f"data.{key}: expected {node}.{key} ({theirs}), found {ours}. "
                f"Leave it out and set {node}.{key}"
            )


def language_model(cfg: DictConfig) -> Iterator[str]:
    """The type of a model of transformers, by name or in its folder."""
    if modality(cfg, "backbone") == "image":
        return
    kind, key = read(cfg, "backbone.architecture", str), "backbone.architecture"
    given = read(cfg, "backbone.model", str), read(cfg, "backbone.path", str)
    if kind is None:
        kind, key = folder_config(cfg).get("model_type"), "backbone.path"
    elif any(given):
        yield f"{key}: found beside backbone.model or backbone.path. Set all but one to null"
    known = transformers_types()
    if kind is None or not known:
        return
    if kind not in known:
        yield f"{key}: transformers knows no model type '{kind}'.{did_you_mean(kind, known)}"
    elif kind not in (forms := moe_types()) and forms and _has_layers(cfg):
        yield (
            f"{key}: MoE layers in '{kind}' models: not known where their FFNs are. Known: "
            f"{', '.join(forms)}. moe=dense needs none."
        )


def causal_model(cfg: DictConfig) -> Iterator[str]:
    """Routers whose experts choose among the tokens of a batch; models on the hub, which are known
    here by a name alone, are looked at when they are built."""
    target = read(cfg, "moe.router._target_", str)
    if target is None or modality(cfg, "backbone") == "image":
        return
    try:
        sees_batch = class_attribute(target, "sees_batch")
    except TargetError:
        return
    kind = read(cfg, "backbone.architecture", str) or folder_config(cfg).get("model_type")
    causal = modality(cfg, "backbone") == "vision-language" or kind in causal_types()
    if sees_batch is True and causal:
        name = read(cfg, "moe.name", str)
        yield (
            f"moe: experts of moe={name} choose among the tokens of a batch, but this backbone is "
            "causal: a token may not be told what follows. Choose moe=expert_threshold"
        )


def _has_layers(cfg: DictConfig) -> bool:
    return read(cfg, "moe.layers", object) not in (None, [], "none")


def depth(cfg: DictConfig) -> tuple[str, int] | None:
    """The number of blocks that get MoE layers, and the key it comes from; None: not known here."""
    for key in DEPTHS:
        found = read(cfg, f"backbone.options.{key}", int)
        if found is not None:
            return f"backbone.options.{key}", found
    for key in DEPTHS:
        found = folder_config(cfg).get(key)
        if isinstance(found, int):
            return f"{key} in backbone.path", found
    return None


def folder_config(cfg: DictConfig) -> dict[str, Any]:
    """config.json of `backbone.path`; empty where there is none that can be read."""
    path = read(cfg, "backbone.path", str)
    if path is None:
        return {}
    try:
        found = json.loads((Path(path).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # machine.folders and the loader name them
        return {}
    return found if isinstance(found, dict) else {}


@lru_cache
def transformers_types() -> tuple[str, ...]:
    """Model types of transformers (models/auto); empty without the library."""
    folder = _folder("transformers", "models", "auto")
    found: list[str] = []
    for name in ("auto_mappings.py", "configuration_auto.py"):
        if (folder / name).is_file():
            source = (folder / name).read_text(encoding="utf-8")
            found += re.findall(r"""["']([\w.-]+)["']\s*[,:]\s*["']\w+Config["']""", source)
    return tuple(sorted(set(found)))


def moe_types() -> tuple[str, ...]:
    """Model types whose FFNs can become MoE layers."""
    return _words("FORMS")


def causal_types() -> tuple[str, ...]:
    """Those of them that are decoders."""
    return _words("CAUSAL")


@lru_cache
def _words(name: str) -> tuple[str, ...]:
    """Keys, or elements, of a constant of dynmoe/backbones/surgery.py."""
    try:
        node = locate(f"dynmoe.backbones.surgery.{name}").node
    except (TargetError, Unreadable):
        return ()
    nodes = node.keys if isinstance(node, ast.Dict) else ast.walk(node)
    return tuple(str(each.value) for each in nodes if isinstance(each, ast.Constant))
