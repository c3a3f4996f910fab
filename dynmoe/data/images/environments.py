"""An environment: the labelled images of one domain."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from unicodedata import normalize

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from dynmoe.data.images.tree import (
    IMAGE_SUFFIXES,
    FileNames,
    check_depth,
    read_drop_list,
    read_environment,
    subfolders,
    tree_folder,
)
from dynmoe.errors import DataError
from dynmoe.image_files import PathsOf, Survey, read_image, survey
from dynmoe.passes import in_threads
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


# Image folders.

# Names that torchvision's and other layouts give the splits of one data set.
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})


@dataclass(eq=False)
class FolderEnvironment(Environment):
    """Image files: `files` [N] are paths below `folder`, in torchvision ImageFolder's order.

    `bytes_N` are their sizes, `times_N` the ns of their last change. `left_out` counts what lies
    beside them and is not read.
    """

    folder: Path
    files: FileNames
    bytes_N: IntArray
    times_N: IntArray
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        return 3

    def load(self, index: int) -> Image.Image:
        return read_image(self.path(index))

    def survey(self, *, decode: bool, kept: Path | None = None) -> Survey:
        """Look at every file: see `image_files.survey`."""
        paths = PathsOf(self.files, self.folder.joinpath)
        what = f"images of {self.name}"
        return survey(paths, decode=decode, what=what, kept=kept, state=self._state())

    def _state(self) -> str:
        """A digest of the places, sizes and times of change of all files."""
        place = os.path.abspath(self.folder).encode(errors="surrogateescape")
        digest = hashlib.sha256(place)
        for part in (self.files.text, self.bytes_N.tobytes(), self.times_N.tobytes()):
            digest.update(hashlib.sha256(part).digest())
        return digest.hexdigest()

    def unreadable(self, found: Survey) -> dict[Path, str]:
        """The reasons why files are bad, by path."""
        return {self.path(index): reason for index, reason in found.bad.items()}

    def without(self, indices: Collection[int]) -> FolderEnvironment:
        """The environment without the images at `indices`."""
        kept = np.delete(np.arange(len(self)), list(indices))
        return replace(
            self,
            labels=self.labels[kept],
            files=FileNames(self.files[index] for index in kept.tolist()),
            bytes_N=self.bytes_N[kept],
            times_N=self.times_N[kept],
        )

    def path(self, index: int) -> Path:
        return self.folder / self.files[index]

    def content_hash(self) -> str:
        # Copies of a tree may differ in the Unicode form of names; bytes beyond UTF-8 are kept.
        text = self.files.text.decode(errors="surrogateescape")
        names = normalize("NFC", text).encode(errors="surrogateescape")
        return hashlib.sha256(names + self.bytes_N.tobytes()).hexdigest()


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
        DataError: the tree, its environments or the drop list are not there, an environment holds
            no class folders with images, is called like a split, or images lie deeper.
    """
    place = tree_folder(root, folder)
    found = subfolders(place)
    layout = f"Expected {place}/environment/class/image"
    if environments is None and not found:
        raise DataError(f"data.root: {place} holds no environments. {layout}.")
    if environments is None and (splits := [name for name in found if name.casefold() in SPLITS]):
        raise DataError(
            f"data.root: {', '.join(splits)} in {place} is called like a split of one data set, "
            f"and would be an environment of its own. {layout}: put each environment's images "
            "together, they are split here. Are these the environments? Then name all: "
            f"'data.environments.environments=[{','.join(found)}]'."
        )
    environments = environments and sorted(normalize("NFC", name) for name in environments)
    if environments is not None and environments != [*found]:
        missing = sorted(set(environments) - set(found))
        others = sorted(set(found) - set(environments))
        raise DataError(
            f"data.root: {place} does not hold the environments of this data set.\n"
            f"  expected: {', '.join(sorted(environments))}\n"
            f"  found:    {', '.join(found) or 'no folders'}\n"
            + (f"  missing:  {', '.join(missing)}\n" if missing else "")
            + (f"  not part of it: {', '.join(others)}\n" if others else "")
            + "Rename or move the folders; their sorted order is what data.test_envs counts."
        )
    dropped = read_drop_list(drop_list)
    trees = [read_environment(place, name, below, dropped) for name, below in found.items()]
    check_depth(place, trees)
    empty = [str(found[tree.name]) for tree in trees if not tree.files]
    if empty:
        beside = sum((tree.left_out for tree in trees if not tree.files), Counter[str]())
        counts = ", ".join(f"{count} {what}" for what, count in beside.items())
        seen = f" Found {counts}; images are {', '.join(IMAGE_SUFFIXES)}." if beside else ""
        raise DataError(
            f"data.root: no images in class folders below {', '.join(empty)}.{seen} {layout}; "
            "what is no environment does not belong there."
        )
    return [
        FolderEnvironment(
            name=tree.name,
            labels=tree.labels,
            class_names=tree.class_names,
            folder=place,
            files=tree.files,
            bytes_N=tree.bytes_N,
            times_N=tree.times_N,
            left_out=tree.left_out,
        )
        for tree in trees
    ]


# Images kept in memory.


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
    for _ in in_threads(cache.fill, len(cache), f"images of {cache.name} decoded"):
        pass
    return cache
