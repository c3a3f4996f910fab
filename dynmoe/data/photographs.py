"""Passes over all photographs before training: are they readable, do they fit in memory?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console
from rich.progress import track

from dynmoe.data.environments import Environment
from dynmoe.data.folders import UNREADABLE, FolderEnvironment
from dynmoe.data.protocol import IntArray

LISTED = 10  # unreadable files named in a message
LONG_PASS = 5000  # files from which a progress bar is shown
BLOCK = 256  # files handed to a thread at once

T = TypeVar("T")


def survey(
    environments: Sequence[FolderEnvironment], *, decode: bool
) -> tuple[list[IntArray], list[str]]:
    """Sizes [N, 2] in pixels (width, height) per environment, and what cannot be read.

    Reads the header of every file; with `decode` all of it, which finds truncated files too (they
    can be trained on, as in DomainBed). An unreadable file has size 0, 0.
    """
    sizes: list[IntArray] = []
    unreadable: list[str] = []

    def measure(environment: FolderEnvironment, index: int) -> tuple[int, int]:
        path = environment.folder / environment.files[index]
        try:
            with Image.open(path) as image:
                if decode:
                    image.load()
                return image.size
        except UNREADABLE:
            unreadable.append(str(path))
            return 0, 0

    for e in environments:
        measured = list(_in_threads(partial(measure, e), len(e), f"checking {e.name}"))
        sizes.append(np.array(measured, dtype=np.int64).reshape(-1, 2))
    if not unreadable:
        return sizes, []
    listing = sorted(unreadable)[:LISTED]
    rest = len(unreadable) - len(listing)
    problem = "\n    ".join(
        [f"unreadable images: {len(unreadable)}. Replace or remove them:", *listing]
        + ([f"and {rest} more"] if rest else [])
    )
    return sizes, [problem]


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
    """The environment with all its images decoded into memory."""
    cache = CachedEnvironment(
        name=environment.name,
        labels=environment.labels,
        class_names=environment.class_names,
        source=environment,
        sizes=sizes,
        pixels=np.empty(decoded_bytes([sizes]), dtype=np.uint8),
        ends=3 * sizes.prod(axis=1).cumsum(),
    )
    for _ in _in_threads(cache.fill, len(cache), f"decoding {cache.name}"):
        pass
    return cache


def _in_threads(function: Callable[[int], T], n: int, description: str) -> Iterator[T]:
    """function(0), ..., function(n - 1), in order; Pillow releases the lock while it works."""
    blocks = [range(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]
    with ThreadPoolExecutor(4 * (os.cpu_count() or 1)) as pool:
        for results in track(
            pool.map(lambda block: [function(i) for i in block], blocks),
            description,
            total=len(blocks),
            console=Console(stderr=True),
            transient=True,
            disable=n < LONG_PASS,
        ):
            yield from results
