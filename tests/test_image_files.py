"""Proves what pixels an image file gives in every task, and what is refused as no image."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from dynmoe import image_files
from dynmoe.data.images.environments import FolderEnvironment
from dynmoe.data.images.tree import FileNames
from dynmoe.data.vl.conversations import ImageFolder
from dynmoe.image_files import BadImage, Survey, decode_image, read_image, remarks, survey
from dynmoe.questions.files import load_image

RAMP = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(4, 0)  # 257 apart
NOISE = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)


def png_of_16_bits(channels: int) -> bytes:
    """A ramp in the first of 2 (grey, alpha), 3 or 4 channels; Pillow cannot write such files."""
    pixels = np.full((*RAMP.shape, channels), 65535, dtype=">u2")
    pixels[..., 0] = RAMP
    kind = {2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", RAMP.shape[1], RAMP.shape[0], 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    parts = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts.items()
    )


def saved(image: Image.Image, suffix: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, Image.registered_extensions()[suffix], **options)
    return file.getvalue()


def big_endian() -> Image.Image:
    return Image.frombytes("I;16B", RAMP.shape[::-1], RAMP.astype(">u2").tobytes())


@pytest.mark.parametrize(
    "content",
    [
        *(saved(Image.fromarray(RAMP), suffix) for suffix in (".png", ".tif", ".ppm")),
        saved(Image.fromarray(RAMP.astype(np.int32)), ".tif"),
        saved(big_endian(), ".tif"),
        *map(png_of_16_bits, (2, 3, 4)),
    ],
    ids=["I;16 PNG", "I;16 TIFF", "I PPM", "I TIFF", "I;16B TIFF", "LA", "RGB", "RGBA"],
)
def test_sixteen_bits_become_the_eight_they_mean(content: bytes) -> None:
    pixels = np.asarray(decode_image(content, "ramp"))
    assert pixels.shape == (4, 256, 3)
    assert (pixels[..., 0] == np.arange(256)).all()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.linspace(0, 1, 16, dtype=np.float32), "floats"),
        (np.arange(16, dtype=np.int32) - 1, "beyond 16 bits"),
        (np.arange(16, dtype=np.int32) * 65536, "beyond 16 bits"),
    ],
)
def test_values_without_an_agreed_white_are_refused(values: Any, reason: str) -> None:
    with pytest.raises(BadImage, match=f"^here: cannot be read as an image: .*{reason}"):
        decode_image(saved(Image.fromarray(values.reshape(4, 4)), ".tif"), "here")


def test_dark_images_of_16_bits_are_read_alike_and_counted(tmp_path: Path) -> None:
    """An image of 8 bits that was saved with 16 cannot be told from a dark one."""
    paths = []
    for high in (0, 1, 255, 256, 65535):
        paths.append(tmp_path / f"{high}.png")
        Image.fromarray(np.full((2, 2), high, np.uint16)).save(paths[-1])
    assert [np.asarray(read_image(path)).max() for path in paths] == [0, 0, 1, 1, 255]
    assert not survey(paths, decode=False, what="").bad
    (text,) = remarks([survey(paths, decode=True, what="")])
    assert text.startswith("3 images have 16 bits") and "save them with 8 bits" in text


def test_integers_beyond_16_bits_are_found_by_the_header(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 65536, np.int32)).save(tmp_path / "a.tif")
    assert "beyond 16 bits" in survey([tmp_path / "a.tif"], decode=False, what="").bad[0]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"])
def test_other_modes_are_read_as_torchvision_and_llava_do(mode: str) -> None:
    suffix = ".tif" if mode in ("CMYK", "YCbCr") else ".png"
    content = saved(Image.fromarray(NOISE).convert(mode), suffix)
    expected = Image.open(io.BytesIO(content)).convert("RGB")
    assert decode_image(content, "x").tobytes() == expected.tobytes()


def test_a_palette_with_transparency_keeps_its_colours() -> None:
    image = Image.fromarray(NOISE).quantize(8)
    content = saved(image, ".png", transparency=bytes([0, 128, *[255] * 6]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(content, "x").tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize(("drawn", "ground"), [(0, 255), (255, 0)])
def test_a_drawing_that_is_in_the_transparency_alone_is_seen(drawn: int, ground: int) -> None:
    pixels = np.full((8, 8, 4), drawn, dtype=np.uint8)
    pixels[..., 3] = np.eye(8) * 255
    found = np.asarray(decode_image(saved(Image.fromarray(pixels), ".png"), "x"))
    assert (found[..., 0] == np.where(np.eye(8), drawn, ground)).all()


def test_orientation_is_not_applied_and_the_first_frame_is_taken() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.new("RGB", (8, 4))
    assert decode_image(saved(wide, ".jpg", exif=exif), "x").size == (8, 4)
    frames = [Image.new("L", (4, 4), grey) for grey in (10, 200)]
    for suffix in (".gif", ".png", ".tif"):
        moving = saved(frames[0], suffix, save_all=True, append_images=frames[1:])
        assert decode_image(moving, "x").getpixel((0, 0)) == (10, 10, 10)


def cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def test_a_truncated_file_gives_what_is_there_and_leaves_pillow_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    content = saved(Image.fromarray(NOISE), ".jpg")
    whole = decode_image(content, "whole")
    path.write_bytes(cut(content))
    for found in (
        read_image(path),
        load_image(path),
        ImageFolder(tmp_path).load("cut.jpg"),
        FolderEnvironment(
            *("e", np.zeros(1, np.int64), ("c",), tmp_path, FileNames(["cut.jpg"])),
            *(np.ones(1, np.int64), np.ones(1, np.int64)),
        ).load(0),
        decode_image(path.read_bytes(), "row 1"),
    ):
        assert found.size == whole.size and found.mode == "RGB"
        assert found.crop((0, 0, 64, 16)).tobytes() == whole.crop((0, 0, 64, 16)).tobytes()
        assert found.tobytes() != whole.tobytes()
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert survey([path], decode=False, what="").bad == {}
    assert "truncated" in survey([path], decode=True, what="").bad[0].lower()


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Paths that are no images, by a word of the reason."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.jpg").touch()
    (folder / "folder.jpg").mkdir()
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "page.jpg").write_text("<html>Not Found</html>")
    os.mkfifo(folder / "pipe.jpg")
    Image.new("1", (20000, 10000)).save(folder / "huge.png")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(folder / "depth.tif")
    return {
        "empty": folder / "empty.jpg",
        "folder": folder / "folder.jpg",
        "symbolic links": folder / "loop.jpg",
        "not an image": folder / "page.jpg",
        "pipe": folder / "pipe.jpg",
        "178,956,970 pixels": folder / "huge.png",
        "floats": folder / "depth.tif",
        "No such file": folder / "none.jpg",
    }


@pytest.mark.parametrize("open_image", [read_image, load_image])
def test_what_is_no_image_is_one_kind_of_error_with_the_file(
    bad: dict[str, Path], open_image: Any
) -> None:
    for reason, path in bad.items():
        with pytest.raises(BadImage, match=reason) as error:
            open_image(path)
        assert str(error.value).startswith(f"{path}: cannot be read as an image: ")


@pytest.mark.parametrize("decode", [False, True])
def test_a_survey_finds_them_all(bad: dict[str, Path], tmp_path: Path, decode: bool) -> None:
    good, turned = tmp_path / "good.png", tmp_path / "turned.jpg"
    Image.new("RGB", (7, 5)).save(good)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (6, 4)).save(turned, exif=exif)
    found = survey([good, *bad.values(), turned], decode=decode, what="checking")
    assert found.sizes.tolist() == [[7, 5], *[[0, 0]] * len(bad), [6, 4]]
    assert found.turned == 1
    assert sorted(found.bad) == list(range(1, 1 + len(bad)))
    for word, reason in zip(bad, found.bad.values(), strict=True):
        assert word in reason


def test_kept_findings_hold_while_the_files_are_as_they_were(
    bad: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = tmp_path / "good.png"
    Image.new("RGB", (7, 5)).save(good)
    paths, kept = [good, *bad.values()], tmp_path / "kept"
    looked: list[int] = []
    look = image_files._look

    def counted(paths: list[Path], decode: bool, what: str) -> Survey:
        looked.append(len(paths))
        return look(paths, decode, what)

    monkeypatch.setattr(image_files, "_look", counted)

    def files_looked_at(decode: bool = True) -> list[int]:
        looked.clear()
        found = survey(paths, decode=decode, what="", kept=kept)
        assert (found.sizes.tolist(), sorted(found.bad)) == (sizes, [*range(1, len(paths))])
        return [*looked]

    sizes = [[7, 5], *[[0, 0]] * len(bad)]
    assert files_looked_at() == [len(paths)]
    assert files_looked_at() == [len(bad)]
    (file,) = kept.iterdir()
    content = file.read_bytes()
    place = content.index(np.array([7, 5], "<i4").tobytes())
    file.write_bytes(content[:place] + b"\x08" + content[place + 1 :])
    assert files_looked_at() == [len(paths)]
    assert files_looked_at(decode=False) == [len(paths)]
    os.utime(good, ns=(0, 1))
    assert files_looked_at() == [len(paths)]
    # A disk that failed for a moment: one of the bad files can be read after all.
    monkeypatch.setattr(image_files, "_look", lambda paths, *_: Survey(np.ones((1, 2), int), {}))
    assert survey(paths, decode=True, what="", kept=kept).bad == {}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged tags
def test_damaged_bytes_raise_nothing_else() -> None:
    rng = np.random.default_rng(1)
    refused = 0
    for suffix in (".avif", ".bmp", ".gif", ".jpg", ".png", ".ppm", ".tif", ".webp"):
        content = saved(Image.fromarray(NOISE[:16, :16]), suffix)
        for _ in range(25):
            damaged = bytearray(content)
            for place in rng.integers(min(len(content), 120), size=3):
                damaged[place] = rng.integers(256)
            try:
                decode_image(bytes(damaged), "x")
            except BadImage:
                refused += 1
    assert refused > 50
