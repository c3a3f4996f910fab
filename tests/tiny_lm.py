"""Documents, made up, and the shipped configuration of task=lm at tiny size on them."""

from __future__ import annotations

import json
import random
from pathlib import Path

from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from tiny_texts import sentence

from dynmoe import cli

assert cli  # registers the resolvers of conf/

TINY_LM = (
    "task=lm",
    "data=text_files",
    "data.unit=line",
    "data.validation=0.2",
    "data.test=0.2",
    "data.length=16",
    "data.vocabulary=280",
    "data.batch_size=4",
    "task.steps=6",
    "task.eval_every=3",
    "logger=none",
    "trainer.enable_progress_bar=false",
)
LLAMA = (
    "backbone.options={hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 2, intermediate_size: 32}",
)
GPT2 = (
    "backbone=lm_tiny_gpt2",
    "backbone.options={n_embd: 16, n_layer: 2, n_head: 2, n_positions: 32}",
)
FEW_EXPERTS = ("moe.num_experts=2", "moe.max_experts=4")


def config(
    root: Path, *overrides: str, moe: str = "dynmoe", backbone: tuple[str, ...] = LLAMA
) -> DictConfig:
    mixture = [*(FEW_EXPERTS if moe == "dynmoe" else ()), "moe.layers=all"]
    given = [f"moe={moe}", *([] if moe == "dense" else mixture), *backbone, *overrides]
    with initialize_config_module("dynmoe.conf", version_base="1.3"):
        return compose("config", [*TINY_LM, f"data.root={root}", *given])


def documents(count: int = 40, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"{number}: {sentence(draw)}" for number in range(count)]


def write_corpus(root: Path) -> list[str]:
    """Forty documents in a text file and a JSONL file; return them."""
    found = documents()
    root.mkdir(parents=True, exist_ok=True)
    (root / "first.txt").write_text("\n".join(found[:25]) + "\n\n", encoding="utf-8")
    lines = [json.dumps({"text": text, "id": 7}) for text in found[25:]]
    (root / "second.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return found
