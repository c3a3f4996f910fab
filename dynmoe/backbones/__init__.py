"""Pretrained or fresh Transformers, and the surgery that turns chosen FFNs into MoE layers."""

from typing import TYPE_CHECKING

from dynmoe.lazy import lazy

if TYPE_CHECKING:
    from dynmoe.backbones.causal import build_language_model
    from dynmoe.backbones.mixtures import own_router
    from dynmoe.backbones.text import build_text_classifier
    from dynmoe.backbones.vision import build_vision_tower, build_vit
    from dynmoe.backbones.vlm import build_vision_language_model

__all__ = [
    "build_language_model",
    "build_text_classifier",
    "build_vision_language_model",
    "build_vision_tower",
    "build_vit",
    "own_router",
]

__getattr__ = lazy(
    __name__,
    {
        "causal": "build_language_model",
        "mixtures": "own_router",
        "text": "build_text_classifier",
        "vision": "build_vision_tower build_vit",
        "vlm": "build_vision_language_model",
    },
)
