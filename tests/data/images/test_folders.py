"""Proves what image_folders reads, in which order, and what it says of a wrong layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from dynmoe.data.images.environments import FolderEnvironment, image_folders
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
    for name in ("__MACOSX", ".git", "art/__pycache__"):
        (tree / name).mkdir()
    environments = image_folders(str(tree))
    assert [e.name for e in environments] == ["art", "photo", "sketch"]
    assert environments[0].class_names == ("cat", "dog")


def test_an_environment_without_images_in_class_folders(tree: Path) -> None:
    (tree / "empty").mkdir()
    (tree / "loose").mkdir()
    (tree / "art" / "cat" / "0.png").rename(tree / "loose" / "0.png")
    with pytest.raises(DataError) as error:
        image_folders(str(tree))
    assert str(error.value) == (
        f"data.root: no images in class folders below {tree}/empty, {tree}/loose. "
        f"Expected {tree}/environment/class/image; what is no environment does not belong there."
    )


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
    with pytest.raises(DataError, match=r"data.environments.drop_list: cannot read nowhere.txt"):
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
