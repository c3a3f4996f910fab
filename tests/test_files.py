"""A file takes another's place when it is on the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dynmoe.files import replace_synced


def test_on_the_disk_before_it_takes_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, place = tmp_path / "new", tmp_path / "place"
    new.write_text("new")
    place.write_text("old")
    seen: list[tuple[int, str]] = []

    def fsync(descriptor: int) -> None:
        seen.append((os.fstat(descriptor).st_ino, place.read_text()))

    monkeypatch.setattr(os, "fsync", fsync)
    inode = new.stat().st_ino
    replace_synced(new, place)
    assert seen == [(inode, "old"), (tmp_path.stat().st_ino, "new")]
    assert not new.exists()


def test_a_file_that_cannot_be_synced_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, place = tmp_path / "new", tmp_path / "place"
    new.write_text("new")
    place.write_text("old")

    def fsync(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        replace_synced(new, place)
    assert place.read_text() == "old"
