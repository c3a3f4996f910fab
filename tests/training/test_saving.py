"""Checkpoints that are written whole or not at all, and read only where they are whole."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import pytest
import torch

from dynmoe.errors import ConfigError
from dynmoe.job import _clear, _step_of
from dynmoe.records import Kind, RunFolder, Seal
from dynmoe.training.callbacks import RECORDS
from dynmoe.training.saving import CheckpointFiles, is_whole, read_checkpoint

KINDS: tuple[Kind, ...] = ("results", "routing")
CONTENT = {"state_dict": {"weight": torch.arange(2000.0)}, "global_step": 3}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "last.ckpt"
    CheckpointFiles().save_checkpoint(CONTENT, path)
    return path


def test_a_checkpoint_comes_back(file: Path) -> None:
    for found in (read_checkpoint(file), CheckpointFiles().load_checkpoint(file)):
        assert found["global_step"] == 3
        assert torch.equal(found["state_dict"]["weight"], torch.arange(2000.0))


def test_no_flipped_bit_is_read(file: Path) -> None:
    """It is refused, or lies in what fills a file up, and changes nothing."""
    whole = file.read_bytes()
    refused = 0
    for place in range(0, len(whole), 37):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        try:
            found = read_checkpoint(file)
        except ConfigError as error:
            refused += str(file) in str(error)
        else:
            assert torch.equal(found["state_dict"]["weight"], torch.arange(2000.0)), place
    assert refused > 0.9 * 8000 / 37  # all of the weights' 8,000 bytes


def test_whole_checkpoints_beside_a_damaged_one_are_named(file: Path) -> None:
    file.with_name("selected.ckpt").write_bytes(file.read_bytes())
    file.with_name("copy.ckpt").write_bytes(file.read_bytes()[:500])
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"Whole checkpoints beside it: selected\.ckpt$"):
        read_checkpoint(file)
    assert is_whole(file.with_name("selected.ckpt")) and not is_whole(file)


def test_a_run_does_not_go_on_beside_a_damaged_selected_checkpoint(file: Path) -> None:
    folder = RunFolder(file.parent.parent)
    selected = file.with_name("selected.ckpt")
    step = _step_of(folder, file)  # its selected one was removed by hand
    selected.write_bytes(file.read_bytes())
    assert _step_of(folder, file) == step
    selected.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"selected\.ckpt: is damaged.*Remove it"):
        _step_of(folder, file)
    selected.unlink()
    selected.mkdir()
    with pytest.raises(ConfigError, match=r"selected\.ckpt: is damaged.*Remove it"):
        _step_of(folder, file)


def test_records_that_a_user_took_away(tmp_path: Path) -> None:
    """A run goes on without them where its user says so; without its results it cannot."""
    folder, file = RunFolder(tmp_path), tmp_path / "checkpoints" / "last.ckpt"
    for kind in KINDS:
        folder.append(kind, {"step": 1}, {"step": 3})
    CheckpointFiles().save_checkpoint({**CONTENT, RECORDS: Seal(folder).at(2)}, file)
    assert _step_of(folder, file) == 2

    (tmp_path / "routing.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"routing\.jsonl: .*touch .*overwrite=true") as refused:
        _step_of(folder, file)
    mark = Path(str(refused.value).split("touch ")[1].split(". ")[0])
    mark.touch()
    assert _step_of(folder, file) == 2
    assert "routing.jsonl: changed" in (tmp_path / "run.log").read_text()

    (tmp_path / "results.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"results\.jsonl.*overwrite=true") as refused:
        _step_of(folder, file)
    assert "touch" not in str(refused.value)
    _clear(folder)
    assert not mark.exists()


def test_a_full_disk_names_the_file_and_leaves_no_part(tmp_path: Path) -> None:
    file = tmp_path / "unfinished.ckpt"
    file.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"unfinished\.ckpt") as full:
        CheckpointFiles().save_checkpoint(CONTENT, file)
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(file))
    assert not file.is_symlink()


def test_no_other_folder_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "there is none"))
    CheckpointFiles().save_checkpoint(CONTENT, tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
