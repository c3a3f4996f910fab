"""Commands in forks of this process, which has imported all that they need: each starts at once.

A fork runs the command's own main function, with its own arguments, folder, output and process
group, and ends as the command does.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import groups

Main = Callable[[], object]

HANG = 400.0  # seconds that a command of a tiny run never needs, on a busy machine either

# Events of Python's audit hooks that come before a change of a folder.
CHANGES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int  # negative: the signal that killed it
    output: str
    seconds: float
    cpu: float = 0.0
    hung: bool = False

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.output


def main_of(command: str) -> Main:
    """The main function of `run`, `evaluate` or `report`."""
    main: Main = importlib.import_module(f"runners.{command}").main
    return main


@dataclass
class Fork:
    """A command that runs in a fork."""

    pid: int
    log: Path
    begun: float

    def signal(self, signum: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def wait(self, limit: float = HANG) -> Ended:
        """Its end. After `limit` seconds all of its processes are killed: it hangs."""
        try:
            return self._end(time.monotonic() + limit)
        finally:
            kill_group(self.pid)  # also where the torture itself is stopped

    def _end(self, deadline: float) -> Ended:
        hung = False
        while True:
            done, status, usage = os.wait4(self.pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                hung = True
                kill_group(self.pid)
            time.sleep(0.02)
        seconds = time.monotonic() - self.begun
        output = self.log.read_text(errors="replace") if self.log.exists() else ""
        cpu = usage.ru_utime + usage.ru_stime
        return Ended(os.waitstatus_to_exitcode(status), output, seconds, cpu, hung)


def kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def start(
    command: str,
    arguments: Sequence[str],
    folder: Path,
    *,
    inside: Callable[[], None] | None = None,
    ranks: int = 1,
) -> Fork:
    """Start a command in `folder`; `inside` is called in the fork first."""
    log = folder / f"{command}.out"
    log.unlink(missing_ok=True)
    begun = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _become(command, arguments, folder, log, inside, ranks)
    return Fork(pid, log, begun)


def call(command: str, arguments: Sequence[str], folder: Path, **how: Any) -> Ended:
    """Run a command to its end."""
    limit = how.pop("limit", HANG)
    return start(command, arguments, folder, **how).wait(limit)


def _become(
    command: str,
    arguments: Sequence[str],
    folder: Path,
    log: Path,
    inside: Callable[[], None] | None,
    ranks: int,
) -> None:
    status = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(output, number)
        sys.stdout = sys.__stdout__ = _text(1)  # type: ignore[misc]
        sys.stderr = sys.__stderr__ = _text(2)  # type: ignore[misc]
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.default_int_handler if signum == 2 else signal.SIG_DFL)
        if ranks > 1:
            _Spare.prepare(ranks - 1)
        if inside is not None:
            inside()
        status = _run(command, arguments)
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _text(number: int) -> io.TextIOWrapper:
    raw = io.FileIO(number, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", line_buffering=True)


def _run(command: str, arguments: Sequence[str]) -> int:
    sys.argv = [f"dynmoe-{command}", *arguments]
    try:
        main_of(command)()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


class _Spare:
    """In the place of subprocess.Popen, by which Lightning starts a process of its own for each
    device: a fork that has been waiting for its command."""

    waiting: list[tuple[int, int]]

    @classmethod
    def prepare(cls, number: int) -> None:
        cls.waiting = []
        for _ in range(number):
            hears, tells = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(tells)
                with open(hears, "rb") as told:
                    given = told.read()
                if not given:
                    os._exit(0)
                command, env = pickle.loads(given)
                os.environ.clear()
                os.environ.update(env)
                status = _run("run", command[3:])
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
            os.close(hears)
            cls.waiting.append((pid, tells))
        from lightning.pytorch.strategies.launchers import subprocess_script

        place: Any = subprocess_script
        place.subprocess = type("subprocess", (), {"Popen": cls})

    def __init__(self, command: Sequence[str], env: Mapping[str, str], cwd: str | None) -> None:
        self.pid, tells = self.waiting.pop()
        self.returncode: int | None = None
        command = command if command[1] == "-m" else ["", *command]
        with open(tells, "wb") as told:
            pickle.dump((list(command), dict(env)), told)

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def preload(arguments: Sequence[str], folder: Path) -> None:
    """Import here what a run with these arguments imports there."""
    from dynmoe import process
    from dynmoe.config.compose import preflight
    from dynmoe.training import build  # most of it, which is not imported twice then

    assert build
    process.settle()
    known = folder / "known"

    def leave_known() -> None:
        end = os._exit

        def left(status: int) -> None:
            known.write_bytes(pickle.dumps((sorted(sys.modules), groups.CHOSEN, groups.READ)))
            end(status)

        os._exit = left  # type: ignore[assignment]

    ended = call("run", arguments, folder, inside=leave_known, limit=600)
    assert ended.status == 0, ended.output
    preflight(list(arguments))  # keeps what it read of conf/
    names, chosen, read = pickle.loads(known.read_bytes())
    groups.CHOSEN.update(chosen)
    groups.READ.update(read)
    for name in names:
        with suppress(Exception):
            importlib.import_module(name)


def at_changes(root: Path, act: Callable[[int], None]) -> Callable[[], None]:
    """Call `act` in a fork with the number (from 1) of every change below `root`, before it."""

    def watch() -> None:
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in CHANGES and _is_below(arguments[0], root):
                if event == "open" and not _writes(*arguments[1:3]):
                    return
                seen += 1
                act(seen)

        sys.addaudithook(hook)

    return watch


def killed_at(number: int, root: Path) -> Callable[[], None]:
    """Kill a fork before its change `number` below `root`."""

    def act(seen: int) -> None:
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return at_changes(root, act)


def _is_below(place: object, root: Path) -> bool:
    return isinstance(place, str | os.PathLike) and os.fspath(place).startswith(str(root))


def _writes(mode: object, flags: object) -> bool:
    by_mode = isinstance(mode, str) and bool(set(mode) & set("wax+"))
    by_flags = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))
    return by_mode or by_flags
