"""Images below a folder: loading one, and finding early which of many are missing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynmoe.errors import DataError
from dynmoe.questions.files import SHOWN, load_image

if TYPE_CHECKING:
    import PIL.Image


@dataclass(frozen=True)
class ImageFolder:
    """Images whose keys are paths relative to `root`; None where a source has no images."""

    root: Path | None

    def load(self, key: str) -> PIL.Image.Image:
        """The image, RGB.

        Raises:
            DataError: no such file, or not an image.
        """
        return load_image(self._path(key))

    def check(self, keys: Iterable[str], where: str) -> None:
        """Nothing, if every key of the file `where` is there; each folder is listed once.

        Raises:
            DataError: shows the first missing images, and says how many they are.
        """
        listings: dict[Path, set[str]] = {}
        missing: dict[str, None] = {}  # an ordered set
        for key in keys:
            path = self._path(key)
            if path.parent not in listings:
                listings[path.parent] = _listing(path.parent)
            if path.name not in listings[path.parent]:
                missing[key] = None
        if missing:
            names = ", ".join(list(missing)[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
            number = "1 image is" if len(missing) == 1 else f"{len(missing):,} images are"
            raise DataError(
                f"{where}: {number} not in {self.root}: {names}. "
                "Give the folder from which these paths start, and fetch what it lacks."
            )

    def _path(self, key: str) -> Path:
        if self.root is None:
            raise DataError(f"image {key}: no image folder given. Give the one that holds it.")
        return self.root / key


def _listing(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def image_keys(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """An entry's `image`: a path or a list of paths; (), if it is missing, null or "".

    Raises:
        DataError: it is something else; `where` names the entry.
    """
    image = entry.get("image") or []
    images = [image] if isinstance(image, str) else image
    if not isinstance(images, list) or not all(isinstance(key, str) for key in images):
        raise DataError(f"{where}: expected image to be a path or a list of them, found {image!r}.")
    return tuple(images)
