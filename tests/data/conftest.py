"""A small tree of photographs: 3 environments x 2 classes x 10 images of different sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ENVIRONMENTS = ("art", "photo", "sketch")
CLASSES = ("cat", "dog")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for environment in ENVIRONMENTS:
        for class_name in CLASSES:
            folder = tmp_path / "Pets" / environment / class_name
            folder.mkdir(parents=True)
            for i in range(10):
                pixels = rng.integers(256, size=(12 + i, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "Pets"
