"""A process that is lost ends those that train with it, and is named."""

from __future__ import annotations

import subprocess
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment

from dynmoe import process
from dynmoe.errors import Diverged, UserError
from dynmoe.training import peers


def trainer(*commands: str, world_size: int = 2) -> Any:
    """The first process of a training; the others are shells."""
    procs = [subprocess.Popen(["/bin/sh", "-c", command]) for command in commands]
    launcher = SimpleNamespace(procs=procs, _call_children_scripts=None)
    environment = LightningEnvironment()
    strategy = SimpleNamespace(launcher=launcher, cluster_environment=environment)
    return SimpleNamespace(world_size=world_size, strategy=strategy)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("kill -9 $$", "the process of rank 2 was ended by SIGKILL"),
        ("exit 143", "the process of rank 2 was ended by SIGTERM"),
        ("exit 3", "the process of rank 2 has ended with status 3"),
    ],
)
def test_a_lost_process_is_named_and_the_others_end(command: str, words: str) -> None:
    training = trainer("sleep 60", command, world_size=3)
    other = training.strategy.launcher.procs[0]
    told = pytest.raises(UserError, match=f"{words}.*The same command goes on")
    with told, peers.together(training):
        raise RuntimeError("[gloo] Connection closed by peer")
    assert other.wait(timeout=5) == -9
    assert not training.strategy.launcher.procs  # Lightning's observer has none to observe


def test_a_process_that_waits_for_a_lost_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, said = threading.Event(), list[str]()

    def end(message: str) -> None:
        said.append(message)
        ended.set()

    monkeypatch.setattr(process, "end_at_once", end)
    monkeypatch.setattr(peers, "PARTING", 0.1)
    with peers.together(trainer("kill -9 $$")):
        assert ended.wait(20)  # as in a collective
    assert "rank 1 was ended by SIGKILL" in said[0]


def test_a_process_whose_starter_is_gone_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(peers.STARTER, "1234567")
    told = pytest.raises(UserError, match="first process of this training is gone")
    with told, peers.together(trainer()):
        raise RuntimeError("gloo: Connection reset by peer")


def test_a_broken_connection_to_an_unknown_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SHOWS", 0.1)
    told = pytest.raises(UserError, match=r"another process .* is lost .*NCCL error: remote")
    with told, peers.together(trainer()):
        raise RuntimeError("NCCL error: remote process exited")


def test_errors_that_all_have_are_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SHOWS", 0.1)
    for error in (Diverged("the loss was not finite"), ZeroDivisionError("a bug")):
        with pytest.raises(type(error)), peers.together(trainer("exit 0")):
            raise error


def test_one_device_has_no_peers() -> None:
    before = threading.active_count()
    with peers.together(trainer(world_size=1)):
        assert threading.active_count() == before
