"""Proves what image_folders reads, in which order, and what it says of a wrong layout."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torchvision.datasets import ImageFolder

from dynmoe import image_files
from dynmoe.data.images.environments import FolderEnvironment, image_folders
from dynmoe.data.images.tree import FileNames
from dynmoe.errors import DataError


def test_files_and_labels_are_those_of_torchvision(tree: Path) -> None:
    (tree / ".cache").mkdir()
    environments = image_folders(str(tree))
    assert [e.name for e in environments] == ["art", "photo", "sketch"]
    for e in environments:
        theirs = ImageFolder(tree / e.name)
        assert isinstance(e, FolderEnvironment)
        assert [str(tree / file) for file in e.files] == [path for path, _ in theirs.samples]
        assert e.labels.tolist() == theirs.targets
        assert list(e.class_names) == theirs.classes
        assert e.load(3).tobytes() == theirs[3][0].tobytes()


def test_root_is_the_tree_or_the_folder_that_holds_it(tree: Path) -> None:
    for root in (tree, tree.parent):
        environments = image_folders(str(root), "Pets", ["sketch", "photo", "art"])
        assert [e.name for e in environments] == ["art", "photo", "sketch"]


def test_two_environments_are_enough(tree: Path) -> None:
    shutil.rmtree(tree / "art")
    assert [e.name for e in image_folders(str(tree))] == ["photo", "sketch"]


def test_what_tools_leave_behind_is_no_environment_and_no_class(tree: Path) -> None:
    for name in ("__MACOSX", ".git", "art/__pycache__", "art/cat/.ipynb_checkpoints"):
        (tree / name).mkdir()
        (tree / name / "0.png").touch()
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (tree / "art" / "cat" / name).touch()
    environments = image_folders(str(tree))
    assert [e.name for e in environments] == ["art", "photo", "sketch"]
    assert environments[0].class_names == ("cat", "dog")
    assert isinstance(environments[0], FolderEnvironment)
    assert len(environments[0]) == 20 and environments[0].left_out == {
        "folders in class folders": 1
    }


def test_what_is_not_read_is_counted(tree: Path) -> None:
    cat = tree / "art" / "cat"
    for index, name in enumerate(("a.GIF", "b.gif", "c.heic", "notes", "readme.txt")):
        (cat / f"{index}.png").rename(cat / name)
    (cat / "9.png").rename(cat / "9.PNG")
    (tree / "art" / "loose.jpg").touch()
    (cat / "album.jpg").mkdir()
    art = image_folders(str(tree))[0]
    assert isinstance(art, FolderEnvironment)
    assert art.left_out == {
        "images outside of class folders": 1,
        "folders in class folders": 1,
        "files with suffix .gif": 2,
        "files with suffix .heic": 1,
        "files with suffix .txt": 1,
        "files without suffix": 1,
    }
    assert len(art) == 15 and "art/cat/9.PNG" in art.files


def test_names_in_one_buffer() -> None:
    names = ["a/\u00fc.png", "a/" + b"\xe9".decode(errors="surrogateescape"), "b c.png"]
    found = FileNames(names)
    assert [*found] == names and [*FileNames([])] == []
    for index in (-1, 3):
        with pytest.raises(IndexError):
            found[index]


def test_a_file_written_anew_in_its_place_is_seen(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder has the same time as before."""
    looked: list[int] = []
    look = image_files._look

    def counted(paths: Sequence[Path], *rest: Any) -> image_files.Survey:
        looked.append(len(paths))
        return look(paths, *rest)

    monkeypatch.setattr(image_files, "_look", counted)

    def content_hash() -> str:
        art = image_folders(str(tree))[0]
        assert isinstance(art, FolderEnvironment)
        art.survey(decode=False, kept=tmp_path / "kept")
        return art.content_hash()

    first, file = content_hash(), tree / "art" / "cat" / "0.png"
    assert content_hash() == first and looked == [20, 0]
    changed = file.parent.stat().st_mtime_ns
    file.write_bytes(file.read_bytes() + b"\0")
    assert file.parent.stat().st_mtime_ns == changed
    assert content_hash() != first and looked == [20, 0, 20]


@pytest.mark.parametrize("place", ["art/cat/train", "sketch/dog/a/b"])
def test_images_below_class_folders_are_refused(tree: Path, place: str) -> None:
    (tree / place).mkdir(parents=True)
    (tree / "art" / "cat" / "0.png").rename(tree / place / "x.jpg")
    message = f"1 images lie deeper than a class folder: {place}/x.jpg. Expected {tree}/environment"
    with pytest.raises(DataError, match=message):
        image_folders(str(tree))


def test_a_folder_of_splits_in_every_environment_is_refused(tree: Path) -> None:
    for environment in ("art", "photo", "sketch"):
        for split in ("train", "val"):
            (tree / environment / split).mkdir()
        (tree / environment / "cat").rename(tree / environment / "train" / "cat")
        (tree / environment / "dog").rename(tree / environment / "val" / "dog")
    with pytest.raises(DataError, match="60 images lie deeper than a class folder: art/train/cat/"):
        image_folders(str(tree))


def test_unicode_forms_of_a_name_are_one_name(tree: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for environment in ("art", "photo", "sketch"):
        form = decomposed if environment == "sketch" else composed
        (tree / environment / "dog").rename(tree / environment / form)
    (tree / "photo").rename(tree / decomposed)
    found = image_folders(str(tree), environments=["art", composed, "sketch"])
    assert [e.name for e in found] == ["art", composed, "sketch"]
    assert {e.class_names for e in found} == {(composed, "cat")}
    assert found[2].load(0).mode == "RGB"
    before = found[2].content_hash()
    (tree / "sketch" / decomposed).rename(tree / "sketch" / composed)
    assert image_folders(str(tree))[2].content_hash() == before
    (tree / "sketch" / decomposed).mkdir()
    with pytest.raises(DataError, match=f"two folders in {tree}/sketch are called {composed}"):
        image_folders(str(tree))


def test_names_that_are_no_text_are_refused(tree: Path) -> None:
    (tree / "art" / "dog").rename(tree / "art" / b"caf\xe9".decode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"folder called 'caf.*Rename it"):
        image_folders(str(tree))


def test_a_home_folder_may_be_written_short(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tree.parent))
    assert len(image_folders("~/Pets")) == len(image_folders("~", "Pets")) == 3


def test_an_environment_without_images_in_class_folders(tree: Path) -> None:
    (tree / "empty").mkdir()
    (tree / "loose").mkdir()
    (tree / "art" / "cat" / "0.png").rename(tree / "loose" / "0.png")
    with pytest.raises(DataError) as error:
        image_folders(str(tree))
    assert str(error.value) == (
        f"data.root: no images in class folders below {tree}/empty, {tree}/loose. "
        "Found 1 images outside of class folders; images are .jpg, .jpeg, .png, .ppm, .bmp, .pgm, "
        ".tif, .tiff, .webp. "
        f"Expected {tree}/environment/class/image; what is no environment does not belong there."
    )


def test_a_folder_of_other_suffixes_names_them(tree: Path) -> None:
    for file in (tree / "art").rglob("*.png"):
        file.rename(file.with_suffix(".GIF"))
    with pytest.raises(DataError, match=r"20 files with suffix \.gif; images are \.jpg"):
        image_folders(str(tree))


@pytest.mark.parametrize("name", ["train", "Val", "validation", "test"])
def test_folders_called_like_splits_are_refused_until_they_are_named(tree: Path, name: str) -> None:
    (tree / "photo").rename(tree / name)
    with pytest.raises(DataError, match=rf"{name} in .*environment/class/image.*environments=\["):
        image_folders(str(tree))
    assert len(image_folders(str(tree), environments=["art", name, "sketch"])) == 3


def test_an_empty_root(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        image_folders(str(tmp_path))
    assert str(error.value) == (
        f"data.root: {tmp_path} holds no environments. Expected {tmp_path}/environment/class/image."
    )


def test_drop_list_leaves_images_out(tree: Path, tmp_path: Path) -> None:
    drop_list = tmp_path / "duplicates.txt"
    drop_list.write_text("art/cat/0.png\nart/dog/9.png\nart/dog/long_gone.png\n")
    art, photo, _ = image_folders(str(tree), drop_list=str(drop_list))
    assert (len(art), len(photo)) == (18, 20)
    drop_list.write_bytes(b"\xef\xbb\xbfart/cat/0.png\r\n./art/dog/9.png \r\n")
    art = image_folders(str(tree), drop_list=str(drop_list))[0]
    assert isinstance(art, FolderEnvironment)
    assert art.left_out == {"images of data.environments.drop_list": 2}
    with pytest.raises(
        DataError, match=r"data.environments.drop_list: nowhere.txt: cannot be read"
    ):
        image_folders(str(tree), drop_list="nowhere.txt")


def test_missing_root(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        image_folders(str(tmp_path / "nowhere"), "PACS")
    assert str(error.value) == (
        f"data.root: no folder {tmp_path / 'nowhere'}. "
        "Give the folder of the environments, or one that holds PACS/."
    )


def test_wrong_environments_are_listed_with_those_expected(tree: Path) -> None:
    with pytest.raises(DataError) as error:
        image_folders(str(tree), "Pets", ["art", "cartoon", "photo"])
    assert str(error.value).splitlines()[1:5] == [
        "  expected: art, cartoon, photo",
        "  found:    art, photo, sketch",
        "  missing:  cartoon",
        "  not part of it: sketch",
    ]
