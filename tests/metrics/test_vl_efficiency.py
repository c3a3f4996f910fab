"""FLOPs of vision-language models, vision tower included, by numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, SiglipVisionConfig

from dynmoe.backbones.surgery import add_moe_layers
from dynmoe.backbones.vision import build_vision_tower
from dynmoe.backbones.vlm import VisionLanguageModel, build_vision_language_model
from dynmoe.layers import TopKRouter
from dynmoe.metrics.efficiency import activated, count, flops, total
from dynmoe.runtime import set_fused_attention

D, H, VOCABULARY, TOKENS, SCORED = 16, 24, 40, 9, 3
PX, PATCH, PATCHES, VISION_HIDDEN = 28, 14, 4, 32
TOWERS = {"clip": (CLIPVisionConfig, PATCHES + 1), "siglip": (SiglipVisionConfig, PATCHES)}


def block(tokens: int, hidden: int, matrices: int) -> int:
    """Four square layers of attention, its two products in all heads, an FFN of so many."""
    return 4 * 2 * tokens * D * D + 4 * tokens**2 * D + matrices * 2 * tokens * D * hidden


def tower_flops(tokens: int) -> int:
    """Of two blocks, the third being behind layer -2."""
    return 2 * PATCHES * 3 * PATCH * PATCH * D + 2 * block(tokens, VISION_HIDDEN, matrices=2)


def model_of(kind: str, folder: Path) -> VisionLanguageModel:
    options: dict[str, Any] = {"hidden_size": D, "num_attention_heads": 2}
    TOWERS[kind][0](
        **options,
        intermediate_size=VISION_HIDDEN,
        num_hidden_layers=3,
        image_size=PX,
        patch_size=PATCH,
    ).save_pretrained(folder)
    vision = build_vision_tower(
        PX, PATCH, (0.5,) * 3, (0.5,) * 3, library="transformers", path=str(folder)
    )
    sizes = {"intermediate_size": H, "num_hidden_layers": 2, "num_key_value_heads": 2}
    return build_vision_language_model(
        vision,
        "mlp2x_gelu",
        "simple",
        architecture="stablelm",
        vocab_size=VOCABULARY,
        options={**options, **sizes},
    )


def sample() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    inputs = {
        "input_ids": torch.zeros(1, TOKENS, dtype=torch.long),
        "image_mask": torch.arange(TOKENS)[None] < PATCHES,
        "images": torch.zeros(1, 3, PX, PX),
    }
    return inputs, torch.arange(SCORED)


@pytest.mark.parametrize("kind", TOWERS)
def test_every_product_is_counted(kind: str, tmp_path: Path) -> None:
    model = model_of(kind, tmp_path)
    vision = tower_flops(TOWERS[kind][1])
    assert count(model.vision, sample()[0]["images"])["flops"] == {"other": vision, "layers": {}}
    projector = 2 * 2 * PATCHES * D * D
    decoder = 2 * block(TOKENS, H, matrices=3)
    head = 2 * SCORED * D * VOCABULARY
    assert count(model, *sample())["flops"]["other"] == vision + projector + decoder + head


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind == "clip" else pytest.mark.slow) for kind in TOWERS],
)
def test_mixtures_of_experts(kind: str, tmp_path: Path) -> None:
    model = model_of(kind, tmp_path).eval()
    dense = count(model, *sample())
    expert = 3 * D * H
    add_moe_layers(
        model,
        router=lambda dim, slots: TopKRouter(dim, slots, top_k=2),
        num_experts=4,
        max_experts=4,
        layers="sparse",
        init="copy",
    )
    costs = count(model, *sample())
    (name,) = costs["slots"]
    assert total(costs) == total(dense) + 3 * expert + 4 * D
    assert activated(costs, {name: 4}, {name: 2.0}) == total(dense) + expert + 4 * D
    moe = flops(costs, {name: 4}, {name: 2.0})
    assert moe == flops(dense, {}, {}) + TOKENS * (2 * expert + 4 * 2 * D)
    set_fused_attention(model, False)  # PyTorch's counter does not know the fused one of CPUs
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no row is computed in vain
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*sample())
    torch.set_float32_matmul_precision(precision)
    assert counter.get_total_flops() == moe
