"""Vision-language models of a few thousand weights, and batches for them written down by hand.

An image has 4 patches of 4 px. Biases and weights are drawn wider than usual: nothing hides behind
a zero, and the most likely token stands out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynmoe.backbones.surgery import add_moe_layers
from dynmoe.backbones.vision import build_vision_tower
from dynmoe.backbones.vlm import VisionLanguageModel, build_vision_language_model
from dynmoe.data.vl.batches import Fetched, collate_conversations, collate_questions
from dynmoe.data.vl.chat import IMAGE
from dynmoe.layers import TopAnyRouter, TopKRouter, moe_layers

PATCHES, PX, WIDTH, VOCAB = 4, 8, 16, 40
PAD, BOS, EOS = 0, 2, 3
IMG = [IMAGE] * PATCHES

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": WIDTH}
GATED = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**GATED, "head_dim": 8},
    "gpt2": {**SIZES, "n_inner": 24},
    "phi": {**SIZES, "intermediate_size": 24},
    "stablelm": GATED,
    "qwen2": GATED,
}
NO_DROPOUT = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
ROUTERS = {"topk": partial(TopKRouter, top_k=2), "dynmoe": TopAnyRouter}


def vision(layer: int = -1) -> nn.Module:
    return build_vision_tower(
        PX,
        4,
        (0.5,) * 3,
        (0.5,) * 3,
        model="vit_tiny_patch16_224",
        layer=layer,
        options={"patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 2},
    )


def vl_model(
    architecture: str = "llama",
    moe: str | None = None,
    moe_arguments: dict[str, Any] | None = None,
    projector: Any = "mlp2x_gelu",
    grad_checkpointing: bool = False,
    **options: Any,
) -> VisionLanguageModel:
    """`moe`: a name in ROUTERS puts MoE layers into all blocks, if `moe_arguments` do not differ.

    In evaluation mode.
    """
    torch.manual_seed(0)
    model = build_vision_language_model(
        vision(),
        projector,
        "simple",
        architecture=architecture,
        grad_checkpointing=grad_checkpointing,
        options={
            **MODELS.get(architecture, {}),
            **(NO_DROPOUT if architecture == "gpt2" else {}),
            **options,
        },
        vocab_size=VOCAB,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    widen(model)
    if moe is not None:
        add_experts(model, moe, **(moe_arguments or {}))
    return model.eval()


def widen(model: nn.Module) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)


def add_experts(model: VisionLanguageModel, moe: str, **arguments: Any) -> None:
    torch.manual_seed(2)
    options = {"num_experts": 3, "max_experts": 3, "layers": "all", "init": "fresh", **arguments}
    add_moe_layers(model, router=ROUTERS[moe], **options)
    for layer in moe_layers(model).values():
        for threshold in getattr(layer.router, "thresholds", []):
            nn.init.constant_(threshold, 0.2)  # some tokens are served by none, some by several


def conversations(
    rows: Sequence[Sequence[int]], answers: Sequence[Sequence[int]] = (), weight: float = 1.0
) -> Any:
    """A `ConversationBatch` of token ids, padded at the right; an image is written `*IMG`.

    `answers` are the places of each row that have a loss.
    """
    labels = [np.full(len(row), -100, dtype=np.int32) for row in rows]
    for label, row, places in zip(labels, rows, answers, strict=False):
        label[list(places)] = np.array(row)[list(places)]
    return collate_conversations(PAD, _fetched(rows, labels, weight))


def questions(rows: Sequence[Sequence[int]], source: str = "quiz") -> Any:
    """A `QuestionBatch`, padded at the left."""
    kinds = [np.zeros(len(rows), dtype=np.int32)]
    return collate_questions(PAD, _fetched(rows, kinds, 1.0)._replace(source=source))


def tokens(*rows: Sequence[int]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = conversations(rows).tokens
    return found


def prompts(*rows: Sequence[int]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = questions(rows).tokens
    return found


def _fetched(rows: Sequence[Sequence[int]], labels: list[Any], weight: float) -> Fetched:
    images = [image for row in rows for image in _images(row)]
    stacked = torch.stack(images) if images else torch.empty(0, 3, PX, PX)
    ids = [np.array(row, dtype=np.int32) for row in rows]
    return Fetched("train", list(range(len(rows))), ids, labels, stacked, weight)


def _images(row: Sequence[int]) -> list[Tensor]:
    """The token behind an image tells which one it is."""
    places = [place for place, token in enumerate(row) if token == IMAGE][PATCHES - 1 :: PATCHES]
    seeds = [1000 + row[place + 1] for place in places]
    return [torch.randn(3, PX, PX, generator=torch.Generator().manual_seed(s)) for s in seeds]
