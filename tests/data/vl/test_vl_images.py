"""Proves the three ways to a square by hand, and against transformers' processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from dynmoe.data.vl.batches import ImageTransform

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def photograph(width: int, height: int) -> Image.Image:
    small = np.random.default_rng(0).integers(256, size=(5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (21, 40), (30, 30)])
def test_pad_centres_the_image_on_the_mean_colour(size: tuple[int, int]) -> None:
    """LLaVA: the square is as wide as the longer side, and the mean is cut to whole numbers."""
    image = photograph(*size)
    side = max(size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    pixels = ImageTransform(side, MEAN, STD, "pad")(image)
    expected = (np.asarray(square).transpose(2, 0, 1) / 255 - np.array(MEAN)[:, None, None]) / (
        np.array(STD)[:, None, None]
    )
    torch.testing.assert_close(pixels, torch.from_numpy(expected).float())
    assert pixels.dtype == torch.float32


@pytest.mark.parametrize("size", [(61, 40), (40, 67), (50, 50), (20, 31)])
def test_crop_is_clips(size: tuple[int, int]) -> None:
    image = photograph(*size)
    official = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24)
    expected = official(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(
        ImageTransform(24, MEAN, STD, "crop")(image), expected, rtol=0, atol=1e-5
    )


def test_pad_then_clip_is_llavas_way() -> None:
    """Padded to a square by hand, then CLIP's resize and crop, which crops nothing."""
    image = photograph(60, 40)
    square = Image.new("RGB", (60, 60), (122, 116, 104))
    square.paste(image, (0, 10))
    official = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24)
    expected = official(square, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ImageTransform(24, MEAN, STD)(image), expected, rtol=0, atol=1e-5)


def test_stretch_is_siglips() -> None:
    image = photograph(60, 40)
    official = SiglipImageProcessorPil(size={"height": 24, "width": 24})
    expected = official(image, return_tensors="pt")["pixel_values"][0]
    half = (0.5, 0.5, 0.5)
    torch.testing.assert_close(
        ImageTransform(24, half, half, "stretch")(image), expected, rtol=0, atol=1e-5
    )


def test_each_way_keeps_other_parts_of_the_image() -> None:
    """Left half black, right half white, twice as wide as high."""
    halves = np.zeros((20, 40, 3), dtype=np.uint8)
    halves[:, 20:] = 255
    image = Image.fromarray(halves)
    rows = {
        fit: ImageTransform(8, *PLAIN, fit=fit)(image)[0]  # type: ignore[arg-type]
        for fit in ("pad", "crop", "stretch")
    }
    assert (rows["stretch"][:, 0] < 0.1).all() and (rows["stretch"][:, 7] > 0.9).all()
    assert (rows["crop"][:, 0] < 0.1).all() and (rows["crop"][:, 7] > 0.9).all()
    assert rows["pad"][0].tolist() == rows["pad"][7].tolist() == [0.0] * 8
    assert (rows["pad"][4, 5:] > 0.9).all()
