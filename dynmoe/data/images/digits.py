"""Rotated and coloured digits: DomainBed's two MNIST sets, on MNIST or on scikit-learn's digits.

Source: domainbed/datasets.py (RotatedMNIST, ColoredMNIST); the colour rule is that of
Arjovsky et al. 2019, "Invariant Risk Minimization".
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dynmoe.data.images.environments import ArrayEnvironment, Environment
from dynmoe.errors import DataError

ANGLES = (0, 15, 30, 45, 60, 75)  # degrees, counter-clockwise
COLOR_FLIPS = {"+90%": 0.1, "+80%": 0.2, "-90%": 0.9}  # P(colour != label); IRM's, not the paper's
LABEL_FLIP = 0.25


def rotated(images: Tensor, labels: Tensor, seed: int) -> list[Environment]:
    """Six environments of grey digits, each turned by one angle; images uint8 [N, 28, 28]."""
    generator = torch.Generator().manual_seed(seed)
    deal = _deal(len(images), len(ANGLES), generator)
    return [
        ArrayEnvironment(
            name=str(angle),
            labels=labels[chosen].numpy().astype(np.int64),
            class_names=tuple(map(str, range(10))),
            images=torch.stack([_rotate(image, angle) for image in images[chosen]])[:, None],
        )
        for angle, chosen in zip(ANGLES, deal, strict=True)
    ]


def colored(images: Tensor, labels: Tensor, seed: int) -> list[Environment]:
    """Three environments where colour predicts the label better than shape does, then misleads.

    label = (digit < 5), flipped with p 0.25; colour = label, flipped with the environment's p. The
    digit is drawn in the one of two channels that colour names; images uint8 [N, 28, 28].
    """
    generator = torch.Generator().manual_seed(seed)
    environments: list[Environment] = []
    deal = _deal(len(images), len(COLOR_FLIPS), generator)
    for (name, color_flip), chosen in zip(COLOR_FLIPS.items(), deal, strict=True):
        n = len(chosen)
        label = (labels[chosen] < 5) ^ (torch.rand(n, generator=generator) < LABEL_FLIP)
        color = label ^ (torch.rand(n, generator=generator) < color_flip)
        two_channels = torch.zeros(n, 2, *images.shape[1:], dtype=torch.uint8)
        two_channels[torch.arange(n), color.long()] = images[chosen]
        environments.append(
            ArrayEnvironment(
                name=name,
                labels=label.numpy().astype(np.int64),
                class_names=("5 to 9", "0 to 4"),
                images=two_channels,
            )
        )
    return environments


def rotated_mnist(root: str, seed: int) -> list[Environment]:
    """RotatedMNIST from torchvision's MNIST files below `root`; `seed` assigns the digits."""
    return rotated(*_mnist(root), seed)


def colored_mnist(root: str, seed: int) -> list[Environment]:
    """ColoredMNIST from torchvision's MNIST files below `root`; `seed` assigns and flips."""
    return colored(*_mnist(root), seed)


def rotated_digits(seed: int) -> list[Environment]:
    """RotatedMNIST's rule on the 1,797 digits that scikit-learn carries: nothing to download."""
    return list(_rotated_digits(seed))


@cache  # the jobs of a sweep are often in one process
def _rotated_digits(seed: int) -> list[Environment]:
    return rotated(*_embedded_digits(), seed)


def colored_digits(seed: int) -> list[Environment]:
    """ColoredMNIST's rule on the 1,797 digits that scikit-learn carries."""
    return colored(*_embedded_digits(), seed)


def _deal(size: int, environments: int, generator: torch.Generator) -> list[Tensor]:
    order = torch.randperm(size, generator=generator)
    return [order[i::environments] for i in range(environments)]


def _rotate(image: Tensor, angle: int) -> Tensor:
    turned = Image.fromarray(image.numpy()).rotate(angle, Image.Resampling.BILINEAR, fillcolor=0)
    return torch.from_numpy(np.array(turned))


def _mnist(root: str) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import MNIST

    try:
        parts = [MNIST(root, train=train, download=False) for train in (True, False)]
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        if "not found" not in str(error):  # torchvision's word; its reader has many for damage
            raise DataError(
                f"data.root: MNIST's files in {Path(root) / 'MNIST' / 'raw'} are damaged "
                f"({error or type(error).__name__}). Fetch them again."
            ) from None
        raise DataError(
            f"data.root: expected MNIST's four files in {Path(root) / 'MNIST' / 'raw'}, found none "
            "or not all. Point data.root at the folder that holds MNIST/raw, or fetch them once: "
            f'python -c "from torchvision.datasets import MNIST; MNIST({root!r}, download=True)"'
        ) from None
    return torch.cat([p.data for p in parts]), torch.cat([p.targets for p in parts])


def _embedded_digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = (digits.images * (255 / 16)).round().astype(np.uint8)  # 8x8, values 0..16
    enlarged = [
        np.array(Image.fromarray(image).resize((28, 28), Image.Resampling.BILINEAR))
        for image in grey
    ]
    return torch.from_numpy(np.stack(enlarged)), torch.from_numpy(digits.target)
