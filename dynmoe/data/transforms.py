"""Image transforms of DomainBed (domainbed/datasets.py), for any image size.

torchvision's v1 transforms on PIL images are kept on purpose: v2 and tensor inputs draw their
random numbers, or resize, differently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

Transform = Callable[[Any], Tensor]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def augmented(image_size: int) -> Transform:
    """Random crop, flip, colour jitter and grey-scale, then normalised: PIL RGB -> [3, S, S]."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size, scale=(0.7, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
            transforms.RandomGrayscale(),
            *_normalised(),
        ]
    )


def plain(image_size: int) -> Transform:
    """Squeezed to a square without a crop, then normalised: PIL RGB -> [3, S, S]."""
    return transforms.Compose([transforms.Resize((image_size, image_size)), *_normalised()])


def scaled(image: Tensor, image_size: int) -> Tensor:
    """Pixels in [0, 1], not normalised: uint8 [C, H, W] -> [C, S, S]."""
    pixels = image.float().div_(255)
    if image.shape[-2:] == (image_size, image_size):
        return pixels
    return functional.resize(pixels, [image_size, image_size], antialias=True)


def _normalised() -> list[Any]:
    return [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
