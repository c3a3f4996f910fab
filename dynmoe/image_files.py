"""Image files: the one place that opens them, for every task.

Pixels are those that torchvision and LLaVA read, `Image.open(file).convert("RGB")`: EXIF
orientation is not applied, transparency is dropped, and of several frames or pages the first is
taken. Where that loses the picture the file is converted rightly, or refused:

- grey of 16 bits (I;16, I): scaled to 8 bits; Pillow would clip all above 255 to white;
- floats (F), and integers beyond 16 bits: refused, since no value is agreed to be white;
- one colour under a varying transparency: laid on a background.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from dynmoe.errors import DataError
from dynmoe.files import check_regular
from dynmoe.passes import in_threads, shown
from dynmoe.seeding import IntArray

# An image is too large when Pillow says so with an error; its warning at half the size is noise.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

DEEP_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N")
TWELVE_BITS = 4095  # a sixteenth of the range of the 16 bits that cameras of 12 bits save in
ORIENTATION = 0x0112  # tag of EXIF

LISTED = 10  # bad images named in a message

FINDINGS = 2
"""Part of the names of kept findings: another number wherever their form, or a check, changes."""

_truncated_lock = threading.Lock()


class BadImage(DataError):
    """An image that cannot be read; `reason` says why."""

    # Not an argument: a loader's worker process raises the error again by its message alone.
    reason = ""


def read_image(path: Path) -> Image.Image:
    """A file as RGB. A truncated file gives the part that is there, as in DomainBed.

    Raises:
        BadImage: no such file, or not an image.
    """
    return _read(path, path)


def decode_image(content: bytes, name: str) -> Image.Image:
    """The content of an image file as RGB, likewise; `name` says where it is from.

    Raises:
        BadImage: not an image.
    """
    return _read(content, name)


def _read(source: Path | bytes, name: Path | str) -> Image.Image:
    try:
        with _opened(source, name) as image:
            return _rgb(image)
    except BadImage:
        with _truncated_lock:  # the switch is global to the process: on for this file only
            before = ImageFile.LOAD_TRUNCATED_IMAGES
            ImageFile.LOAD_TRUNCATED_IMAGES = True
            try:
                with _opened(source, name) as image:
                    return _rgb(image)
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = before


@contextmanager
def _opened(source: Path | bytes, name: Path | str) -> Iterator[Image.Image]:
    """An open image; what goes wrong while it is open is a BadImage too."""
    try:
        if isinstance(source, Path):
            check_regular(source)
        if not (source.stat().st_size if isinstance(source, Path) else source):
            raise ValueError("it is empty")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            yield image
    # NOTE: Pillow's readers of damaged files raise far more than OSError: SyntaxError, ValueError,
    # struct.error, IndexError, TypeError, ..., and DecompressionBombError is a plain Exception.
    except Exception as error:
        bad = BadImage(f"{name}: cannot be read as an image: {_reason(error)}.")
        bad.reason = _reason(error)
        raise bad from None


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of a format that Pillow cannot read"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels. Make it smaller"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return text.strip().rstrip(".") or type(error).__name__


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in DEEP_GREY:
        return _of_deep_grey(image).convert("RGB")
    _refuse_floats(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    pixels = np.asarray(rgba)
    *is_flat, alpha_is_flat = pixels.min(axis=(0, 1)) == pixels.max(axis=(0, 1))
    if all(is_flat) and not alpha_is_flat:
        # A drawing in black on nothing, or in white: without transparency nothing would be seen.
        ground = "white" if pixels[0, 0, :3].min() < 128 else "black"
        rgba = Image.alpha_composite(Image.new("RGBA", rgba.size, ground), rgba)
    return rgba.convert("RGB")


def _of_deep_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(f"integers from {low} to {high}, beyond 16 bits. Convert it to 8 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _refuse_floats(image: Image.Image) -> None:
    if image.mode == "F":
        raise ValueError("floats, of which none is agreed to be white. Convert it to 8 bits")


# Passes over many files before training: can they be read, and how large are they?


class PathsOf(Sequence[Path]):
    """The paths of so many keys, each made when it is asked for: a million take 400 MB."""

    def __init__(self, keys: Sequence[str], path: Callable[[str], Path | None]) -> None:
        self._keys = keys
        self._path = path

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Path:  # type: ignore[override]  # no slices
        return self._of(self._keys[index])

    def __iter__(self) -> Iterator[Path]:
        return map(self._of, self._keys)

    def _of(self, key: str) -> Path:
        path = self._path(key)
        assert path is not None
        return path


@dataclass(frozen=True)
class Survey:
    """Findings about N image files."""

    sizes: IntArray
    """[N, 2] width and height in pixels; 0, 0 for a bad image."""
    bad: dict[int, str]
    """The reason why an image cannot be read, by its index."""
    turned: int = 0
    """Images whose EXIF data ask to turn or mirror them, which is not done."""
    dim: int = 0
    """Decoded images of 16 bits without a value above `TWELVE_BITS`: nearly black as they are."""

    def without_bad(self) -> Survey:
        return replace(self, sizes=np.delete(self.sizes, list(self.bad), axis=0), bad={})


def remarks(found: Sequence[Survey]) -> list[str]:
    """Warnings of images that can be read, and that may look otherwise than they should."""
    turned, dim = sum(each.turned for each in found), sum(each.dim for each in found)
    texts = {
        "images have an EXIF orientation, which is not applied, as in torchvision": turned,
        f"images have 16 bits and no value above {TWELVE_BITS}, a sixteenth of the range: nearly "
        "black as they are read. Scale their values, or save them with 8 bits": dim,
    }
    return [f"{count} {text}" for text, count in texts.items() if count]


def survey(
    paths: Sequence[Path],
    *,
    decode: bool,
    what: str,
    kept: Path | None = None,
    state: str | None = None,
) -> Survey:
    """Read the header of every file; with `decode` all of it, which finds truncated files too (they
    can be read, as far as they go), and dark ones.

    `kept` is a folder that keeps what was found: while all files have the same names, sizes and
    times of change, only bad ones are opened again, since a disk may have failed for a moment.
    `state` stands for all these, where the caller knows them. A long pass says `what` they
    are: `images of train`.
    """
    if kept is None:
        return _look(paths, decode, what)
    seen = _state_of(paths, what) if state is None else state
    rules = json.dumps([FINDINGS, decode, Image.__version__, seen])
    file = kept / f"images-{hashlib.sha256(rules.encode()).hexdigest()[:16]}.found"
    try:
        found = _read_survey(file)
        again = _look([paths[index] for index in found.bad], decode, what)
        if len(again.bad) == len(found.bad):
            return found
    except (OSError, ValueError, KeyError, TypeError, IndexError):  # not there, or damaged
        pass
    found = _look(paths, decode, what)
    with suppress(OSError):  # it is looked again next time
        _write_survey(file, found)
    return found


def _state_of(paths: Sequence[Path], what: str) -> str:
    """A digest of names, sizes and times of change.

    A file that was written anew in its place changes these alone, and no time of its folder.
    """
    digest = hashlib.sha256()
    # A million of them are no list.
    for path in shown(paths, f"{what} looked for", len(paths)):
        name = os.path.abspath(path)
        try:
            status = os.stat(name)
            size, time = status.st_size, status.st_mtime_ns
        except (OSError, ValueError):
            size, time = -1, -1
        digest.update(f"{name}\0{size} {time}\0".encode(errors="backslashreplace"))
    return digest.hexdigest()


def _read_survey(file: Path) -> Survey:
    checksum, _, content = file.read_bytes().partition(b"\n")
    if checksum.decode() != hashlib.sha256(content).hexdigest():
        raise ValueError(f"{file}: another checksum")
    text, _, sizes = content.partition(b"\n")
    facts = json.loads(text)
    bad = {int(index): reason for index, reason in facts["bad"].items()}
    sizes_N2 = np.frombuffer(sizes, dtype="<i4").reshape(-1, 2).astype(np.int64)
    return Survey(sizes_N2, bad, facts["turned"], facts["dim"])


def _write_survey(file: Path, found: Survey) -> None:
    """Write a checksum, a line of JSON, and the sizes as bytes: a million pairs are long JSON."""
    facts = json.dumps({"bad": found.bad, "turned": found.turned, "dim": found.dim})
    content = facts.encode() + b"\n" + found.sizes.astype("<i4").tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")  # ranks write the same one
    part.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    part.replace(file)


def _look(paths: Sequence[Path], decode: bool, what: str) -> Survey:
    def measure(index: int) -> tuple[int, int, bool, bool, str]:
        path = paths[index]
        try:
            with _opened(path, path) as image:
                width, height = image.size
                _refuse_floats(image)
                if decode or image.mode == "I":  # whose values may go beyond 16 bits
                    _rgb(image)
                dim = decode and image.mode in DEEP_GREY and 0 < _brightest(image) <= TWELVE_BITS
                # Without the condition a PNG file would be decoded for it.
                turned = "exif" in image.info and image.getexif().get(ORIENTATION, 1) != 1
                return width, height, turned, dim, ""
        except BadImage as error:
            return 0, 0, False, False, error.reason

    sizes_N2 = np.zeros((len(paths), 2), dtype=np.int64)
    bad: dict[int, str] = {}
    all_turned = all_dim = 0
    found = in_threads(measure, len(paths), f"{what} {'decoded' if decode else 'read'}")
    for index, (width, height, turned, dim, reason) in enumerate(found):
        sizes_N2[index] = width, height
        all_turned += turned
        all_dim += dim
        if reason:
            bad[index] = reason
    return Survey(sizes_N2, bad, all_turned, all_dim)


def _brightest(image: Image.Image) -> int:
    return int(np.asarray(image).max())


def unreadable(bad: Mapping[Path, str]) -> str:
    """The problem of a data set with bad images: the first of them, each with its reason."""
    lines = [f"{path}: {bad[path]}" for path in sorted(bad)[:LISTED]]
    if len(bad) > LISTED:
        lines.append(f"and {len(bad) - LISTED} more")
    return "\n    ".join(
        [
            f"unreadable images: {len(bad)}. Replace or remove them, or leave them out with "
            "data.skip_invalid=true:",
            *lines,
        ]
    )
