"""The shipped configuration at tiny size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from PIL import Image

from dynmoe import cli
from dynmoe.records import RunFolder

assert cli  # registers the resolvers of conf/

Run = Callable[..., RunFolder]
Trained = Callable[..., RunFolder]

# Nine steps with evaluations after steps 0, 4 and 8; adaptation after every third step.
TINY = (
    "task=vit_domainbed",
    "logger=none",
    "trainer.enable_progress_bar=false",
    "task.steps=9",
    "task.eval_every=4",
    "data.batch_size=4",
    "data.eval_batch_size=256",
    "data.linear_baseline=false",
    "backbone.options={patch_size: 14, embed_dim: 16, depth: 4, num_heads: 2}",
    "backbone.drop_path=0.2",
)
# Dropout draws depend on how a batch is cut; without it, cutting changes nothing.
NO_DROPOUT = ("backbone.drop_path=0.0", "backbone.options.proj_drop_rate=0.0")
TINY_DYNMOE = (
    *TINY,
    "moe.adaptation.start=0",
    "moe.adaptation.length=3",
    "moe.adaptation.period=3",
)


def tiny_config(*overrides: str, moe: str = "dynmoe") -> DictConfig:
    with initialize_config_module("dynmoe.conf", version_base="1.3"):
        base = TINY_DYNMOE if moe.startswith("dynmoe") else TINY
        return compose("config", [*base, f"moe={moe}", *overrides])


def forty_images(root: Path) -> tuple[str, ...]:
    """Write two environments of two classes; return overrides for one step on them."""
    image = Image.fromarray(np.arange(28 * 28, dtype=np.uint8).reshape(28, 28))
    for env in ("a", "b"):
        for label in ("x", "y"):
            folder = root / env / label
            folder.mkdir(parents=True)
            for i in range(10):
                image.rotate(i * 9 + 90 * (label == "y")).save(folder / f"{i}.png")
    return "data=image_folder", f"data.root={root}", "backbone=vit_digits", "task.steps=1"
