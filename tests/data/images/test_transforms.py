"""Proves the evaluation transform by hand and the settings of DomainBed's augmentation."""

from __future__ import annotations

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image

from dynmoe.data.images import batches


def test_plain_squeezes_and_normalises() -> None:
    white = Image.new("RGB", (40, 20), (255, 255, 255))
    image = batches.plain(16)(white)
    assert image.shape == (3, 16, 16)
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(image[:, 3, 5], expected)


def test_plain_keeps_the_whole_image() -> None:
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 20:] = 255  # right half white: still the right half after the squeeze
    image = batches.plain(16)(Image.fromarray(pixels))
    assert (image[:, :, :7] < 0).all() and (image[:, :, 9:] > 0).all()


def test_augmentation_settings_are_those_of_domainbed() -> None:
    crop, flip, jitter, grey, *_ = batches.augmented(224).transforms  # type: ignore[attr-defined]
    assert crop.size == (224, 224) and crop.scale == (0.7, 1.0) and crop.ratio == (3 / 4, 4 / 3)
    assert crop.interpolation.value == "bilinear"
    assert (flip.p, grey.p) == (0.5, 0.1)
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.7, 1.3)
    assert jitter.hue == (-0.3, 0.3)


def test_digits_are_scaled_but_not_normalised() -> None:
    image = torch.tensor([[[0, 255], [51, 102]]], dtype=torch.uint8)
    assert batches.scaled(image, 2).tolist() == [
        [[0.0, 1.0], [torch.tensor(0.2), torch.tensor(0.4)]]
    ]
    assert batches.scaled(image, 6).shape == (1, 6, 6)


def test_means_of_a_configuration_become_numbers() -> None:
    """A list of OmegaConf would be read item by item in C, where a Ctrl-C is lost."""
    given = OmegaConf.create({"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]})
    *_, normalise = batches.plain(16, given.mean, given.std).transforms  # type: ignore[attr-defined]
    assert (normalise.mean, normalise.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert type(normalise.mean) is tuple
