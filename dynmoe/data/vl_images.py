"""From a photograph to the pixels a vision tower expects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

LoadImage = Callable[[str], Image.Image]
"""From the key of an image to its RGB picture."""

Fit = Literal["pad", "crop", "stretch"]


@dataclass(frozen=True)
class ImageTransform:
    """A square of pixels, resized bicubically and normalised: PIL RGB -> float32 [3, size, size].

    `pad` widens the image to a square with the mean colour first (LLaVA's image_aspect_ratio=pad),
    `crop` takes the centre of the image whose shorter side was made `size` (CLIP), `stretch` gives
    up the aspect ratio (SigLIP). `mean` and `std` are per channel, of pixels in [0, 1].
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Fit = "pad"

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = functional.pil_to_tensor(self._square(image))
        scaled = functional.to_dtype(pixels, torch.float32, scale=True)
        return functional.normalize(scaled, list(self.mean), list(self.std))

    def _square(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if self.fit == "crop":
            image = _resize(image, [self.size])
            left, top = ((side - self.size) // 2 for side in image.size)
            return functional.crop(image, top, left, self.size, self.size)
        if self.fit == "pad":
            across, down = max(0, height - width), max(0, width - height)
            left, top = across // 2, down // 2
            borders = [left, top, across - left, down - top]
            image = functional.pad(image, borders, [int(255 * value) for value in self.mean])
        return _resize(image, [self.size, self.size])


def _resize(image: Image.Image, size: list[int]) -> Image.Image:
    return functional.resize(image, size, functional.InterpolationMode.BICUBIC)
