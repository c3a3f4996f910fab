"""Image folders: environment/class/image, the layout of DomainBed's photograph sets."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from dynmoe.data.environments import Environment
from dynmoe.errors import DataError

UNREADABLE = (OSError, SyntaxError, ValueError)  # what Pillow raises on a damaged file

_truncated_lock = threading.Lock()


@dataclass(eq=False)
class FolderEnvironment(Environment):
    """Image files: `files` [N] are paths below `folder`, in torchvision ImageFolder's order."""

    folder: Path
    files: Sequence[str]

    @property
    def channels(self) -> int:
        return 3

    def load(self, index: int) -> Image.Image:
        return read_image(self.folder / self.files[index])

    def content_hash(self) -> str:
        return hashlib.sha256("\n".join(self.files).encode()).hexdigest()


def image_folders(
    root: str,
    folder: str | None = None,
    environments: Sequence[str] | None = None,
    drop_list: str | None = None,
) -> list[Environment]:
    """The environments of an image tree, in sorted order of their folders' names.

    `root` is the tree or the directory that holds it as `folder`. `environments` are the folders
    expected there, None takes what is found. `drop_list` is a text file with one path below the
    tree per line: images to leave out (DomainNet's duplicates).

    Raises:
        DataError: the tree, its environments or the drop list are not there, or an environment
            holds no class folders with images.
    """
    tree = Path(root) / folder if folder and (Path(root) / folder).is_dir() else Path(root)
    if not tree.is_dir():
        wanted = f", or one that holds {folder}/" if folder else ""
        raise DataError(
            f"data.root: no folder {tree}. Give the folder of the environments{wanted}."
        )
    found = _subfolders(tree)
    layout = f"Expected {tree}/environment/class/image"
    if environments is None and not found:
        raise DataError(f"data.root: {tree} holds no environments. {layout}.")
    if environments is not None and sorted(environments) != found:
        missing = sorted(set(environments) - set(found))
        others = sorted(set(found) - set(environments))
        raise DataError(
            f"data.root: {tree} does not hold the environments of this data set.\n"
            f"  expected: {', '.join(sorted(environments))}\n"
            f"  found:    {', '.join(found) or 'no folders'}\n"
            + (f"  missing:  {', '.join(missing)}\n" if missing else "")
            + (f"  not part of it: {', '.join(others)}\n" if others else "")
            + "Rename or move the folders; their sorted order is what data.test_envs counts."
        )
    dropped = _read_drop_list(drop_list)
    built: list[Environment] = [_environment(tree, name, dropped) for name in found]
    empty = [str(tree / e.name) for e in built if not len(e)]
    if empty:
        raise DataError(
            f"data.root: no images in class folders below {', '.join(empty)}. {layout}; "
            "what is no environment does not belong there."
        )
    return built


def read_image(path: Path) -> Image.Image:
    """The file as RGB. A truncated file gives what is there, as in DomainBed.

    Raises:
        OSError, SyntaxError, ValueError: not an image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UNREADABLE:
        with _truncated_lock:  # the switch is global to the process: on for this file only
            before = ImageFile.LOAD_TRUNCATED_IMAGES
            ImageFile.LOAD_TRUNCATED_IMAGES = True
            try:
                with Image.open(path) as image:
                    return image.convert("RGB")
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = before


def _environment(tree: Path, name: str, dropped: Collection[str]) -> FolderEnvironment:
    classes = _subfolders(tree / name)
    labels = {class_name: label for label, class_name in enumerate(classes)}
    found = (
        make_dataset(str(tree / name), labels, extensions=IMG_EXTENSIONS, allow_empty=True)
        if labels  # make_dataset refuses none
        else []
    )
    examples = [
        (file, label)
        for path, label in found
        if (file := Path(path).relative_to(tree).as_posix()) not in dropped
    ]
    return FolderEnvironment(
        name=name,
        labels=np.array([label for _, label in examples], dtype=np.int64),
        class_names=tuple(classes),
        folder=tree,
        files=[file for file, _ in examples],
    )


def _subfolders(folder: Path) -> list[str]:
    """Names in order, without what tools leave behind: .git, __MACOSX, __pycache__."""
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith((".", "__"))
    )


def _read_drop_list(drop_list: str | None) -> frozenset[str]:
    if drop_list is None:
        return frozenset()
    try:
        return frozenset(Path(drop_list).read_text().split("\n"))
    except OSError as error:
        raise DataError(f"data.environments.drop_list: cannot read {drop_list}: {error}") from None
