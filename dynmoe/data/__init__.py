"""Data modules, by what a run reads: images, texts, documents, or images with text."""

from typing import TYPE_CHECKING

from dynmoe.lazy import lazy

if TYPE_CHECKING:
    from dynmoe.data.images.digits import (
        colored_digits,
        colored_mnist,
        rotated_digits,
        rotated_mnist,
    )
    from dynmoe.data.images.environments import image_folders
    from dynmoe.data.images.module import DomainData
    from dynmoe.data.lm.module import CorpusData
    from dynmoe.data.text.mix import GlueMixData
    from dynmoe.data.text.module import GlueData
    from dynmoe.data.vl.content import easy_vqa, llava, questions_only, scenes, science_qa, vqa
    from dynmoe.data.vl.module import VisionLanguageData

__all__ = [
    "CorpusData",
    "DomainData",
    "GlueData",
    "GlueMixData",
    "VisionLanguageData",
    "colored_digits",
    "colored_mnist",
    "easy_vqa",
    "image_folders",
    "llava",
    "questions_only",
    "rotated_digits",
    "rotated_mnist",
    "scenes",
    "science_qa",
    "vqa",
]

__getattr__ = lazy(
    __name__,
    {
        "images.module": "DomainData",
        "images.environments": "image_folders",
        "images.digits": "rotated_digits colored_digits rotated_mnist colored_mnist",
        "lm.module": "CorpusData",
        "text.module": "GlueData",
        "text.mix": "GlueMixData",
        "vl.module": "VisionLanguageData",
        "vl.content": "easy_vqa llava questions_only scenes science_qa vqa",
    },
)
