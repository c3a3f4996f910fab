"""LightningModules: what is learnt and measured. They know nothing of the adaptation of experts."""

from typing import TYPE_CHECKING

from dynmoe.lazy import lazy

if TYPE_CHECKING:
    from dynmoe.tasks.base import cosine_with_warmup
    from dynmoe.tasks.images import DomainGeneralization
    from dynmoe.tasks.lm import LanguageModelling
    from dynmoe.tasks.text import TextClassification
    from dynmoe.tasks.vl import VisionLanguage

__all__ = [
    "DomainGeneralization",
    "LanguageModelling",
    "TextClassification",
    "VisionLanguage",
    "cosine_with_warmup",
]

__getattr__ = lazy(
    __name__,
    {
        "base": "cosine_with_warmup",
        "images": "DomainGeneralization",
        "lm": "LanguageModelling",
        "text": "TextClassification",
        "vl": "VisionLanguage",
    },
)
