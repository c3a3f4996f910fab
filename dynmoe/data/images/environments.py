"""An environment: the labelled images of one domain."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from dynmoe import image_files
from dynmoe.errors import DataError
from dynmoe.image_files import in_threads, read_image
from dynmoe.seeding import IntArray


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
        """Load one image, not yet transformed: an RGB photograph, or drawn uint8 [C, H, W]."""

    @abstractmethod
    def content_hash(self) -> str:
        """Hash that differs between versions of the images, but not between copies of one."""


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


# Image folders: environment/class/image, the layout of DomainBed's photograph sets.


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
    """Read the environments of an image tree, in sorted order of their folders' names.

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
    """Names in order, without folders that tools create: .git, __MACOSX, __pycache__."""
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


# Passes over all photographs before training: are they readable, do they fit in memory?


def survey(
    environments: Sequence[FolderEnvironment], *, decode: bool
) -> tuple[list[IntArray], dict[Path, str]]:
    """Return sizes [N, 2] in pixels (width, height) per environment, and bad images with reasons.

    Reads the header of every file; with `decode` all of it, which finds truncated files too (they
    can be trained on, as in DomainBed). A bad image has size 0, 0.
    """
    sizes: list[IntArray] = []
    bad: dict[Path, str] = {}
    for e in environments:
        paths = [e.folder / file for file in e.files]
        found = image_files.survey(paths, decode=decode, description=f"checking {e.name}")
        sizes.append(found.sizes)
        bad |= {paths[index]: reason for index, reason in found.bad.items()}
    return sizes, bad


def decoded_bytes(sizes: Sequence[IntArray]) -> int:
    """Memory of all images as uint8 RGB."""
    return sum(3 * int(size.prod(axis=1).sum()) for size in sizes)


@dataclass(eq=False)
class CachedEnvironment(Environment):
    """Decoded images, one after the other in `pixels`; `sizes` [N, 2] is width, height.

    One flat buffer, so that forked workers share its pages instead of copying them.
    """

    source: Environment
    sizes: IntArray
    pixels: npt.NDArray[np.uint8]
    ends: IntArray

    @property
    def channels(self) -> int:
        return self.source.channels

    def load(self, index: int) -> Image.Image:
        width, height = self.sizes[index]
        return Image.fromarray(self._pixels_of(index).reshape(height, width, 3))

    def content_hash(self) -> str:
        return self.source.content_hash()

    def fill(self, index: int) -> None:
        """Decode one image into its place."""
        self._pixels_of(index)[:] = np.asarray(self.source.load(index)).ravel()

    def _pixels_of(self, index: int) -> npt.NDArray[np.uint8]:
        end = self.ends[index]
        return self.pixels[end - 3 * self.sizes[index].prod() : end]


def cached(environment: Environment, sizes: IntArray) -> CachedEnvironment:
    """Return the environment with all its images decoded into memory."""
    cache = CachedEnvironment(
        name=environment.name,
        labels=environment.labels,
        class_names=environment.class_names,
        source=environment,
        sizes=sizes,
        pixels=np.empty(decoded_bytes([sizes]), dtype=np.uint8),
        ends=3 * sizes.prod(axis=1).cumsum(),
    )
    for _ in in_threads(cache.fill, len(cache), f"decoding {cache.name}"):
        pass
    return cache
