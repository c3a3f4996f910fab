"""An environment: the labelled images of one domain."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from dynmoe.data.protocol import IntArray


@dataclass(eq=False)
class Environment(ABC):
    """Examples 0..len-1 of one domain; `labels` [N] index `class_names`."""

    name: str
    labels: IntArray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of a loaded image."""

    @abstractmethod
    def load(self, index: int) -> Image.Image | Tensor:
        """One image, not yet transformed: an RGB photograph, or drawn uint8 [C, H, W]."""

    @abstractmethod
    def content_hash(self) -> str:
        """Tells two versions of the images apart; two copies on different machines are equal."""


@dataclass(eq=False)
class ArrayEnvironment(Environment):
    """Images in memory: `images` is uint8 [N, C, H, W]."""

    images: Tensor

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    def load(self, index: int) -> Tensor:
        return self.images[index]

    def content_hash(self) -> str:
        return hashlib.sha256(self.images.numpy().tobytes()).hexdigest()


def data_hash(
    environments: Sequence[Environment], splits: Sequence[tuple[IntArray, IntArray]]
) -> str:
    """16 hex digits that change with any name, class, label, file list or split."""
    digest = hashlib.sha256()
    for environment, (in_indices, out_indices) in zip(environments, splits, strict=True):
        digest.update(repr((environment.name, environment.class_names)).encode())
        digest.update(environment.content_hash().encode())
        for array in (environment.labels, in_indices, out_indices):
            digest.update(array.tobytes())
    return digest.hexdigest()[:16]
