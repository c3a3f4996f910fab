"""A long pass over data says how far it is, and ends at once when it is stopped."""

from __future__ import annotations

import logging
import time

import pytest

from dynmoe import passes
from dynmoe.passes import in_threads, shown


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(passes, "_seconds", 30.0)  # and put back what a test sets
    monkeypatch.setattr(passes.time, "monotonic", lambda: now[0])
    return now


def took(clock: list[float], items: int, seconds: float, total: int | None = None) -> list[int]:
    found = []
    for item in shown(range(items), "images read", total):
        clock[0] += seconds
        found.append(item)
    return found


def test_lines_without_a_terminal(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert took(clock, 1500, 0.0078125) == [*range(1500)]
    assert not caplog.messages  # a short one
    took(clock, 500, 0.5, 500)
    assert caplog.messages == [f"{60 * n} of 500 images read, {30 * n} s" for n in range(1, 9)]
    caplog.clear()
    passes.say_every(5.0)
    took(clock, 2500, 0.0078125)
    assert caplog.messages == [
        "640 images read, 5 s",
        "1,280 images read, 10 s",
        "1,920 images read, 15 s",
    ]


def test_a_bar_on_a_terminal(
    clock: list[float],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("FORCE_COLOR", "1")
    took(clock, 90, 0.01)
    assert not capsys.readouterr().err
    took(clock, 200, 1.0, 200)
    assert "of 200 images read" in capsys.readouterr().err and not caplog.messages
    for name in ("[a]", "{1}", "[/a]"):  # of a folder
        for _ in shown(range(2), f"images of {name} read"):
            clock[0] += 10
        assert f"images of {name} read" in capsys.readouterr().err


def test_parts_count_by_their_size(
    clock: list[float], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)  # a command other than dynmoe-run
    passes.say_every(1.0)
    for _ in shown([[0] * 3, [0] * 4], "texts", size=len):
        clock[0] += 1
    assert capsys.readouterr().err == "3 texts, 1 s\n7 texts, 2 s\n"


def test_a_stop_calls_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "BLOCK", 1)
    called = []

    def slow(index: int) -> int:
        called.append(index)
        time.sleep(0.001)
        return index

    with pytest.raises(KeyboardInterrupt):
        for index in in_threads(slow, 20_000, "images read"):
            if index == 10:
                raise KeyboardInterrupt
    assert len(called) < 10_000
    assert [*in_threads(slow, 20, "images read")] == [*range(20)]
