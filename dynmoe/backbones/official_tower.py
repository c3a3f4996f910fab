"""The image towers of MoE-LLaVA's and DynMoE-LLaVA's checkpoints: CLIPs, by OpenAI or of a folder.

Source: ``moellava/model/multimodal_encoder`` of MoE-LLaVA. Its SigLIP is left out: the official
code takes the first patch for a class token, which SigLIP has not, and drops it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynmoe.backbones import hub
from dynmoe.errors import ConfigError

# OpenAI's: pixels of an image and of a patch.
SIZES = {
    "clip-vit-large-patch14-336": (336, 14),
    "clip-vit-large-patch14": (224, 14),
    "clip-vit-base-patch16": (224, 16),
    "clip-vit-base-patch32": (224, 32),
}
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]


def tower(name: str, folder: str | None) -> dict[str, Any]:
    """Keys of ``backbone.vision`` for what config.json calls ``mm_image_tower``.

    ``name`` is on the hub, or the last part of a path is as there. ``folder`` holds the tower's
    config.json, preprocessor_config.json and weights instead: no network.

    Raises:
        ConfigError: a folder that is no CLIP, or no folder for a tower that is not known here.
    """
    if folder is not None:
        return {"model": name, **_of_folder(folder)}
    last = Path(name).name
    if last not in SIZES:
        raise ConfigError(
            f"mm_image_tower={name}: expected one of OpenAI's {', '.join(SIZES)}. Another CLIP is "
            "read from its folder: vision=FOLDER with config.json, preprocessor_config.json and "
            "weights"
        )
    px, patch_px = SIZES[last]
    sizes = {"image_size": px, "patch_size": patch_px}
    return {"model": f"openai/{last}", "path": None, **sizes, "mean": MEAN, "std": STD}


def _of_folder(folder: str) -> dict[str, Any]:
    path = str(Path(folder).expanduser().resolve())
    whole = hub.configuration(None, path, None, {}, "vision")
    if whole.model_type not in ("clip", "clip_vision_model"):
        raise ConfigError(f"vision={folder}: expected a CLIP, found a '{whole.model_type}'")
    config = getattr(whole, "vision_config", whole)
    file = Path(path, "preprocessor_config.json")
    images = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {
        "path": path,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "mean": images.get("image_mean", MEAN),
        "std": images.get("image_std", STD),
    }
