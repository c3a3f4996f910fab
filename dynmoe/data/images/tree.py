"""Image trees on disk, environment/class/image, the layout of DomainBed's photograph sets.

Only what lies exactly there is read: images elsewhere are refused or counted. Names that differ in
their Unicode form alone (composed, as Linux writes them, or decomposed, as macOS did) are one name.
PyTorch is not needed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unicodedata import normalize

import numpy as np

from dynmoe.errors import DataError
from dynmoe.passes import shown
from dynmoe.seeding import IntArray

# torchvision's list, by which DomainBed reads (torchvision/datasets/folder.py).
IMAGE_SUFFIXES = (*(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),)

# Files that systems leave behind in folders of images.
JUNK = ("thumbs.db", "desktop.ini", ".ds_store", "._")

SHOWN = 3  # misplaced images named in a message


class FileNames(Sequence[str]):
    """Names of N files in one buffer.

    A list of a million takes 100 MB, and as much again in each loader process, which counts
    references in it.
    """

    text: bytes
    """All names, one a line."""

    def __init__(self, names: Iterable[str]) -> None:
        lines = [name.encode(errors="surrogateescape") for name in names]
        self._ends = np.cumsum([0, *(len(line) + 1 for line in lines)])
        self.text = b"\n".join(lines)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = self._ends[index : index + 2].tolist()
        return self.text[start : end - 1].decode(errors="surrogateescape")


@dataclass
class Tree:
    """The N images of one environment, in torchvision's order."""

    name: str
    class_names: tuple[str, ...]
    files: FileNames = field(default_factory=lambda: FileNames([]))
    """Paths below the tree."""
    labels: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    bytes_N: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    """-1 for a broken link."""
    times_N: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Of the last change, in ns; -1 for a broken link."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Counts of files and folders that are not read, by what they are."""
    too_deep: list[str] = field(default_factory=list)
    """Images in folders below a class folder."""


def tree_folder(root: str, folder: str | None) -> Path:
    """`root`, or `folder` in it if that is there.

    Raises:
        DataError: there is no such folder.
    """
    above = Path(root).expanduser()
    tree = above / folder if folder and (above / folder).is_dir() else above
    if not tree.is_dir():
        wanted = f", or one that holds {folder}/" if folder else ""
        raise DataError(
            f"data.root: no folder {tree}. Give the folder of the environments{wanted}."
        )
    return tree


def subfolders(folder: Path) -> dict[str, Path]:
    """Folders by name, in order, without those that tools create: .git, __MACOSX, __pycache__.

    Raises:
        DataError: names that look alike or are not UTF-8, or a folder that cannot be read.
    """
    found: dict[str, Path] = {}
    for entry in _entries(folder):
        if not _is_folder(entry) or entry.name.startswith((".", "__")):
            continue
        name = normalize("NFC", entry.name)
        if name in found:
            raise DataError(
                f"data.root: two folders in {folder} are called {name}: their names look alike, "
                "but are written in different Unicode forms. Move the images into one of them."
            )
        if not name.isprintable():
            raise DataError(
                f"data.root: {folder} holds a folder called {entry.name!a}, which cannot be "
                "written in a table. Rename it."
            )
        found[name] = folder / entry.name
    return dict(sorted(found.items()))


def read_environment(tree: Path, name: str, folder: Path, dropped: Collection[str] = ()) -> Tree:
    """The images in the class folders of one environment but those `dropped`.

    Raises:
        DataError: as `subfolders`.
    """
    classes = subfolders(folder)
    found = Tree(name, tuple(classes))
    for entry in _entries(folder):
        if not _is_folder(entry) and _is_image(entry.name):
            found.left_out["images outside of class folders"] += 1
    files: list[str] = []
    labels: list[int] = []
    states: list[tuple[int, int]] = []
    listed = ((label, below, _entries(below)) for label, below in enumerate(classes.values()))
    what = f"files of {name} listed"
    for label, below, entries in shown(listed, what, size=lambda each: len(each[2])):
        place = below.relative_to(tree).as_posix()
        for entry in entries:
            if entry.name.lower().startswith(JUNK):
                continue
            # Anything that can be no folder counts as a file: broken links and pipes are reported
            # when images are opened.
            if _is_folder(entry):
                hidden = entry.name.startswith((".", "__"))
                images = [] if hidden else [*_images_below(below / entry.name)]
                found.too_deep += [file.relative_to(tree).as_posix() for file in images]
                found.left_out["folders in class folders"] += not images
            elif not _is_image(entry.name):
                suffix = Path(entry.name).suffix.lower()
                found.left_out[
                    f"files with suffix {suffix}" if suffix else "files without suffix"
                ] += 1
            elif (file := f"{place}/{entry.name}") in dropped:
                found.left_out["images of data.environments.drop_list"] += 1
            else:
                files.append(file)
                labels.append(label)
                states.append(_size_and_time(entry))
    found.files, found.labels = FileNames(files), np.array(labels, dtype=np.int64)
    found.bytes_N, found.times_N = np.array(states, dtype=np.int64).reshape(-1, 2).T.copy()
    found.left_out = +found.left_out
    return found


def check_depth(tree: Path, environments: Sequence[Tree]) -> None:
    """Raises DataError if there are images below the class folders: another tree was meant."""
    deep = [file for each in environments for file in each.too_deep]
    if deep:
        shown = ", ".join(deep[:SHOWN])
        more = f" and {len(deep) - SHOWN} more" if len(deep) > SHOWN else ""
        raise DataError(
            f"data.root: {len(deep)} images lie deeper than a class folder: {shown}{more}. "
            f"Expected {tree}/environment/class/image. Give the folder that holds the "
            "environments, and move images out of folders of splits or groups."
        )


def read_drop_list(drop_list: str | None) -> frozenset[str]:
    """The paths of a text file, one a line; none for None.

    Raises:
        DataError: it cannot be read.
    """
    if drop_list is None:
        return frozenset()
    from dynmoe.questions.files import read_text

    try:
        lines = read_text(Path(drop_list).expanduser()).splitlines()
    except DataError as error:
        raise DataError(f"data.environments.drop_list: {error}") from None
    return frozenset(line.strip().removeprefix("./") for line in lines)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """By name. Entries know what they are: to ask for each of a million files takes half a
    minute."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"data.root: {folder} cannot be read: {error.strerror}.") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _size_and_time(entry: os.DirEntry[str]) -> tuple[int, int]:
    try:
        status = entry.stat()
    except OSError:  # a broken link
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _images_below(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in sorted(names) if _is_image(name))
