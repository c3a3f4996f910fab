"""Checkpoints that are written while training goes on (task.async_save)."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import TINY_DYNMOE, Run, forty_images, tiny_config
from torch import nn

from dynmoe import job
from dynmoe.process import Stopped
from dynmoe.records import RunFolder
from dynmoe.training import callbacks
from dynmoe.training.callbacks import RECORDS
from dynmoe.training.saving import (
    BackgroundFiles,
    CheckpointFiles,
    _copied,
    all_written,
    is_whole,
    save,
)

# Saves after 1, 2, 4 and 5 steps; updates of experts after 2 and 4.
SHORT = (
    *("task.steps=5", "task.eval_every=3", "+task.save_every=2"),
    *("moe.adaptation.length=2", "moe.adaptation.period=2"),
)


class Late:
    """Each write begins when the training waits for it, at its next save or its end; what is kept
    meanwhile has to be whole, and of an earlier step."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked, self.found = threading.Event(), list[str]()
        write, wait = CheckpointFiles.save_checkpoint, BackgroundFiles.wait

        def late(files: CheckpointFiles, content: Any, path: Any, options: Any = None) -> None:
            assert self.asked.wait(60)
            self.look(path)
            write(files, content, path, options)
            self.look(path)

        def waiting(files: BackgroundFiles) -> None:
            self.asked.set()
            wait(files)
            self.asked.clear()

        patch.setattr(CheckpointFiles, "save_checkpoint", late)
        patch.setattr(BackgroundFiles, "wait", waiting)

    def look(self, unfinished: Path) -> None:
        for name in ("last.ckpt", "selected.ckpt"):
            file = unfinished.with_name(name)
            if file.exists() and not is_whole(file):
                self.found.append(str(file))


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Every checkpoint of the test's runs, as it takes its place."""
    found: dict[str, dict[str, Any]] = {}
    put = callbacks._put_in_place

    def keep(unfinished: Path, is_best: bool) -> None:
        put(unfinished, is_best)
        content = torch.load(unfinished.with_name("last.ckpt"), weights_only=True)
        content[RECORDS].pop("results")  # with times
        key = f"{unfinished.parts[-3]} {content['global_step']} {is_best}"
        found[key] = content

    monkeypatch.setattr(callbacks, "_put_in_place", keep)
    return found


@pytest.mark.slow
def test_each_checkpoint_is_that_of_its_step(
    run: Run, tmp_path: Path, kept: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments, adaptation, positions: all that a run without the key saves, though the
    steps up to the next save are over when it is written."""
    data = [text for text in forty_images(tmp_path / "data") if not text.startswith("task.")]
    plain = run(*data, *SHORT, name="plain")
    late = Late(monkeypatch)
    background = run(*data, *SHORT, "task.async_save=true", name="late")
    found = {key.removeprefix("late "): each for key, each in kept.items() if "late" in key}
    expected = {key.removeprefix("plain "): each for key, each in kept.items() if "plain" in key}
    assert [int(key.split()[0]) for key in found] == [1, 2, 4, 5]
    assert found.keys() == expected.keys() and late.found == []
    for key, content in expected.items():
        assert {"optimizer_states", "callbacks", "loops"} < content.keys()
        assert differing(found[key], content) == []
    assert background.read("events") == plain.read("events") != []
    names = {path.name for path in (background.path / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "selected.ckpt"}


def differing(a: Any, b: Any, at: str = "") -> list[str]:
    """The places in which two checkpoints are not equal bit for bit."""
    if isinstance(a, Mapping | list | tuple):
        first, second = (x if isinstance(x, Mapping) else dict(enumerate(x)) for x in (a, b))
        found = [] if [*first] == [*second] else [at]
        for key in first.keys() & second.keys():
            found += differing(first[key], second[key], f"{at}/{key}")
        return found
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
        return [] if same else [at]
    return [] if type(a) is type(b) and repr(a) == repr(b) else [at]


def test_a_copy_shares_no_memory_but_within_itself() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    numbers = [1, [2]]
    content = {"state_dict": model.state_dict(), "numbers": numbers, "part": torch.arange(9)[2:4]}
    copy = _copied(content)
    before = {name: tensor.clone() for name, tensor in copy["state_dict"].items()}
    with torch.no_grad():
        model["embed"].weight.add_(1)
    numbers[1].append(3)  # type: ignore[union-attr, attr-defined]
    assert copy["numbers"] == [1, [2]]
    assert all(torch.equal(before[name], each) for name, each in copy["state_dict"].items())
    embed, head = copy["state_dict"].values()
    assert embed.data_ptr() == head.data_ptr()
    assert copy["state_dict"]._metadata == content["state_dict"]._metadata


# One writer, with a trainer of which nothing but this is used.


class Writer:
    """Saves numbers, each once ``go`` is set; ``events`` has what happened in order."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.files = folder, BackgroundFiles()
        self.go, self.events = threading.Event(), list[str]()
        self.error: Exception | None = None
        self.trainer: Any = SimpleNamespace(
            strategy=SimpleNamespace(checkpoint_io=self.files),
            save_checkpoint=self.dump,
            is_global_zero=True,
        )
        self.number = 0
        write = CheckpointFiles.save_checkpoint

        def waits(files: CheckpointFiles, content: Any, path: Any, options: Any = None) -> None:
            assert self.go.wait(60)
            if self.error is not None:
                raise self.error
            write(files, content, path, options)

        patch.setattr(CheckpointFiles, "save_checkpoint", waits)

    def dump(self, file: Path) -> None:
        self.events.append(f"copied {self.number}")
        self.files.save_checkpoint({"number": self.number}, file)

    def save(self, number: int) -> None:
        self.number = number
        file = self.folder / f"{number}.ckpt"
        save(self.trainer, file, lambda: self.events.append(f"written {number}"))

    def soon(self, act: Callable[[], None]) -> None:
        threading.Timer(0.05, act).start()

    def fails(self) -> None:
        self.error = OSError(errno.ENOSPC, "No space left on device", str(self.folder))


@pytest.fixture
def writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Writer]:
    made = Writer(tmp_path, monkeypatch)
    yield made
    made.go.set()


def test_a_second_save_waits_before_it_copies(writer: Writer) -> None:
    writer.save(1)
    assert writer.events == ["copied 1"] and writer.files.is_writing
    writer.soon(writer.go.set)
    with all_written(writer.trainer, print):
        writer.save(2)
    assert writer.events == ["copied 1", "written 1", "copied 2", "written 2"]
    assert not writer.files.is_writing
    for thread in [each for each in threading.enumerate() if each.name.startswith("checkpoint")]:
        thread.join(10)  # its result is there a moment before it ends
        assert not thread.is_alive()


def test_a_strategy_that_writes_by_itself_is_done(writer: Writer) -> None:
    writer.trainer.save_checkpoint = lambda file: writer.events.append("written by itself")
    writer.save(1)
    assert writer.events == ["written by itself", "written 1"]


def test_an_error_is_raised_by_the_next_save(writer: Writer) -> None:
    writer.save(1)
    writer.fails()
    writer.go.set()
    with pytest.raises(OSError, match="No space"), all_written(writer.trainer, pytest.fail):
        writer.save(2)
    assert writer.events == ["copied 1"]


def test_an_error_is_raised_at_the_end(writer: Writer) -> None:
    writer.go.set()
    writer.fails()
    with pytest.raises(OSError, match="No space"), all_written(writer.trainer, pytest.fail):
        writer.save(1)


def test_an_error_beside_another_one_is_told(writer: Writer) -> None:
    writer.fails()
    told: list[str] = []
    with pytest.raises(Stopped), all_written(writer.trainer, told.append):
        writer.save(1)
        writer.soon(writer.go.set)
        raise Stopped
    assert "waiting" in told[0] and "No space" in told[1]


def test_a_signal_waits_for_the_write(writer: Writer) -> None:
    """One that arrives while the end of the training waits for it."""

    def stop(signum: int, frame: object) -> None:
        writer.soon(writer.go.set)
        raise Stopped(signum)

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with pytest.raises(Stopped), all_written(writer.trainer, print):
            writer.save(1)
            writer.soon(lambda: os.kill(os.getpid(), signal.SIGUSR1))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert writer.events == ["copied 1", "written 1"]
    assert (writer.folder / "1.ckpt").exists()


def test_what_others_save_is_there_at_once(writer: Writer) -> None:
    """A callback of one's own, in the midst of a write."""
    writer.save(1)
    began = time.monotonic()
    writer.soon(writer.go.set)
    writer.files.save_checkpoint({"number": 7}, writer.folder / "own.ckpt")
    assert (writer.folder / "own.ckpt").exists() and time.monotonic() - began < 60
    writer.files.wait()


def test_a_run_whose_last_checkpoint_finds_no_room_is_not_done(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    unfinished = tmp_path / "checkpoints" / "unfinished.ckpt"
    unfinished.symlink_to("/dev/full")
    with pytest.raises(OSError) as full:
        job.train(tiny_config("task.steps=1", "task.async_save=true", moe="dense"), folder)
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(unfinished))
    assert [record["step"] for record in folder.read("results")] == [0]
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


STARTED = """
import threading
from pathlib import Path
from dynmoe import process
from dynmoe.training.saving import BackgroundFiles, CheckpointFiles
from runners.run import main
write, wait, waited_for = CheckpointFiles.save_checkpoint, BackgroundFiles.wait, threading.Event()
def slow(files, content, path, options=None):
    write(files, content, path, options)
    if content["global_step"] == 4:
        Path("written").touch()
        waited_for.wait(60)
def waiting(files):
    if process._ended_at is not None:
        waited_for.set()
    wait(files)
CheckpointFiles.save_checkpoint, BackgroundFiles.wait = slow, waiting
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stopped_run_ends_with_the_write_under_way(
    tmp_path: Path, signum: signal.Signals
) -> None:
    """As a process: the second checkpoint takes its place when the stopped run waits for it."""
    given = (*TINY_DYNMOE, "task.steps=9999", "task.eval_every=3", "task.async_save=true")
    paths = os.pathsep.join(map(str, (Path(__file__).parents[2], *sys.path)))
    process = subprocess.Popen(
        [sys.executable, "-c", STARTED, *given, f"paths.outputs={tmp_path}"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "written").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    (last,) = tmp_path.glob("*/*/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 1
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, err
    assert "same command goes on" in err and "waiting until a checkpoint is on disk" in out
    assert torch.load(last, weights_only=True)["global_step"] == 4
    assert RunFolder(last.parents[1]).state == "stopped"
