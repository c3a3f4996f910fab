"""Folders as on Hugging Face's hub: tiny official models, their tokenizer, and a tiny CLIP."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from official_models import PATCHES, VOCAB, config_of, weights
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from dynmoe.data.vl.chat import conversation_tokenizer

PX, PATCH_PX = 28, 14
TOWER = "image_tower.image_tower.vision_model."


def published(
    folder: Path, family: str, top_k: int, suffix: str = "safetensors", tower: Path | None = None
) -> dict[str, Tensor]:
    """Two shards with an index, in half precision; with the weights of the CLIP in `tower`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of(family, top_k)))
    state = {name: tensor.half() for name, tensor in weights(family, top_k).items()}
    if tower is not None:
        body = "transformer" if family == "qwen" else "model"
        clip = CLIPVisionModel.from_pretrained(tower).state_dict()
        state |= {f"{body}.{TOWER}{name}": tensor for name, tensor in clip.items()}
    names = sorted(state)
    shards = {1: names[::2], 2: names[1::2]}
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    index = {}
    for number, part in shards.items():
        file = folder / f"{stem}-0000{number}-of-00002.{suffix}"
        tensors = {name: state[name] for name in part}
        save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)
        index |= dict.fromkeys(part, file.name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": index}))
    return state


def read(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the tower's layers after the one that is read, the last but one."""
    unread = ("post_layernorm", "encoder.layers.2.")
    return {k: v for k, v in state.items() if TOWER not in k or not any(u in k for u in unread)}


def add_tokenizer(folder: Path) -> None:
    """A word for every row of the vocabulary, and the end token of MoE-LLaVA's templates."""
    words = ["is it red or blue ? yes no user: assistant:", *(f"word{i}" for i in range(VOCAB))]
    made = conversation_tokenizer(words, VOCAB - 1)
    made.add_special_tokens({"eos_token": "<|endoftext|>"})
    made.save_pretrained(folder)


def clip_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=PATCHES,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=PX,
        patch_size=PATCH_PX,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    return folder
