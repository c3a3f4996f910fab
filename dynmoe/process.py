"""The process of a command: how its threads wait, where its output goes, how it ends.

PyTorch is not imported here: OpenMP reads its settings when PyTorch is loaded, once.
"""

from __future__ import annotations

import _thread
import codecs
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Literal, TextIO

from dynmoe import ranks
from dynmoe.errors import UserError
from dynmoe.version import version

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables that say how a thread of OpenMP waits for the others: OpenMP's, GNU's and Intel's."""

# SIGHUP: the terminal was closed. SIGUSR1: asked for before a time limit (sbatch --signal). Windows
# has neither.
ENDING = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
]

PATIENCE = 3.0
"""Seconds after a signal in which further ones are ignored: libraries end their own processes."""

LEAVE_WITHIN = 20.0
"""Seconds after a signal in which one of several processes has to end. Slurm gives them 30."""

GOES_ON = "The same command goes on from the last evaluation."

_ended_at: float | None = None
_ended_by: int = signal.SIGINT
_has_peers = False  # whether the process trained together with others, and did not end it well
_prog = "dynmoe"
_last_words = ""
_pid = 0  # of the process that catches signals: its forks (loaders of data) do not
_caught: list[int] = []
_role: Literal["", "command", "worker"] = ""  # none: our modules are used by other code


@contextmanager
def command(prog: str, after: str = "") -> Iterator[None]:
    """Run the body as the command `prog`, and end with one message where it cannot go on.

    `--version` on the command line is answered here. `after`: a sentence for who stopped it.

    Raises:
        SystemExit: with 0 after `--version`, 2 on a UserError, 128 + the number of the signal, as
            shells count, on a signal of `ENDING`.
    """
    global _prog, _role, _ended_at, _last_words, _has_peers
    _prog, _role, _ended_at, _has_peers = prog, "command", None, False
    _last_words = f"{prog}: stopped{{}}. {after}".rstrip()
    settle()
    catch_signals()
    try:
        with _one_message(prog):
            yield
    except SystemExit as end:
        if _has_peers:
            # The threads of a broken collective would hold the interpreter up as it ends.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(end.code or 0))
        raise


@contextmanager
def _one_message(prog: str) -> Iterator[None]:
    try:
        if "--version" in sys.argv[1:]:
            print(f"{prog} {version()}")
            raise SystemExit(0)
        yield
    except UserError as error:
        raise refusal(prog, error) from None
    except (KeyboardInterrupt, SystemExit) as error:
        ended = interruption(error)
        if ended is None:
            raise
        _say_stopped(ended.signum)
        raise SystemExit(128 + ended.signum) from None


def _say_stopped(signum: int) -> None:
    """Say once, of data-parallel processes by one, that the command was stopped."""
    global _last_words
    is_first = True
    with suppress(UserError):  # the variables that tell are damaged: nothing else matters now
        is_first = ranks.rank() == 0
    if is_first and _last_words:
        by = "" if signum == signal.SIGINT else f" by {signal.Signals(signum).name}"
        print(_last_words.format(by), file=sys.stderr, flush=True)
    _last_words = ""


def end_at_once(message: str) -> None:
    """End the process from any thread, while its main thread waits for something that is gone."""
    print(f"{_prog}: {message}", file=sys.stderr, flush=True)
    os._exit(2)


def refusal(prog: str, error: UserError) -> SystemExit:
    """Print the message, and return the end of the command."""
    print(f"{prog}: {error}", file=sys.stderr)
    return SystemExit(2)


def settle() -> None:
    """Choose how threads wait, and let no output fail the work; safe to call again.

    A command does this before PyTorch is loaded, and so does every process of a launcher.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        # GNU's OpenMP spins at every barrier: on a machine that is not idle a thread then waits for
        # one that its own spinning keeps off the processor (docs/performance.md).
        os.environ["GOMP_SPINCOUNT"] = "0"
    sys.stdout = _lasting(sys.stdout, sys.__stdout__)
    sys.stderr = _lasting(sys.stderr, sys.__stderr__)


def waiting() -> str:
    """How threads wait in this process: the variables that say it, else `default`."""
    return " ".join(f"{k}={os.environ[k]}" for k in WAITING if k in os.environ) or "default"


def is_command() -> bool:
    """Whether `command` runs in this process."""
    return _role == "command"


def is_worker() -> bool:
    """Whether a launcher started this process for some jobs of a command, which runs elsewhere."""
    return _role == "worker"


# Output. A terminal may know few characters, a pipe may close, a disk may be full: the results are
# in files by then, and a finished run must not count as failed.

PLAIN = {"→": "->", "−": "-", "–": "-", "…": "...", "±": "+-", "×": "x", "✓": "yes", "✗": "no"}


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(character, "?") for character in text), error.end


codecs.register_error("dynmoe.plain", _plain)


class _Lasting(io.FileIO):
    """A file descriptor that drops what cannot be written to it."""

    def write(self, data: Any, /) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written  # None: a full pipe that does not block


def _lasting(stream: TextIO | None, original: TextIO | None) -> TextIO:
    """The stream in a form that raises nothing; one that is not the process's own as it is."""
    if stream is None:  # closed by the shell: >&-
        return open(os.devnull, "w", encoding="utf-8")
    if stream is not original or not isinstance(stream, io.TextIOWrapper):
        return stream
    with suppress(OSError):
        stream.reconfigure(errors="dynmoe.plain")  # handlers of the logging module may hold it
    raw = _Lasting(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="dynmoe.plain",
        line_buffering=True,  # in a file, too, lines can be followed
    )


# Signals.


class Stopped(KeyboardInterrupt):
    """Ctrl-C, or a signal that asks the process to end. Libraries clean up as on Ctrl-C."""

    def __init__(self, signum: int = signal.SIGINT) -> None:
        super().__init__(signum)
        self.signum = signum


@contextmanager
def stopped_in_c() -> Iterator[None]:
    """Raise Stopped where a signal has come and another error arrives: code in C that calls Python
    (PyTorch reading a sequence) may put an error of its own in the place of ours."""
    try:
        yield
    except Exception as error:
        if _ended_at is not None and threading.current_thread() is threading.main_thread():
            raise Stopped(_ended_by) from error
        raise


def interruption(error: BaseException | None) -> Stopped | None:
    """The interruption that `error` is, or that a library turned into an exit."""
    # NOTE: Lightning's trainer answers Ctrl-C with sys.exit(1) (trainer/call.py).
    if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
        error = error.__context__
    if isinstance(error, Stopped):
        return error
    return Stopped() if isinstance(error, KeyboardInterrupt) else None


def catch_signals() -> None:
    """Raise Stopped on the signals of `ENDING`, and end at once on another one that comes later.

    What is ignored stays ignored (nohup).
    """
    global _pid
    _pid = os.getpid()
    if sys.unraisablehook is not _unraised:
        sys.unraisablehook = _unraised
    if threading.current_thread() is threading.main_thread():
        _caught[:] = [s for s in ENDING if signal.getsignal(s) is not signal.SIG_IGN]
        catch_signals_again()


def _unraised(unraisable: Any) -> None:
    """Ask again: Python drops what is raised while it removes an object, and would go on."""
    global _ended_at
    error = unraisable.exc_value
    if isinstance(error, Stopped) and os.getpid() == _pid:
        _ended_at = None
        # A moment later: what the handler raises within this hook is dropped, too.
        _thread.start_new_thread(_ask_again, (error.signum,))
    else:
        sys.__unraisablehook__(unraisable)


def _ask_again(signum: int) -> None:
    time.sleep(0.2)
    os.kill(_pid, signum)


def catch_signals_again() -> None:
    """Take back what a library has put its own handlers on: Lightning's waits for the other ranks,
    which may wait for this one."""
    for signum in _caught:
        signal.signal(signum, _stop)


def follow_command() -> None:
    """Prepare a process that a launcher started: Ctrl-C is for the command, which ends this one.

    A launcher that handles SIGTERM itself (Slurm's preemption by submitit) keeps its handlers.
    """
    global _role
    _role = "worker"
    settle()
    on_main_thread = threading.current_thread() is threading.main_thread()
    if on_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        catch_signals()


@contextmanager
def ends_in_time(seconds: float = LEAVE_WITHIN) -> Iterator[None]:
    """End the process so long after a signal of `ENDING` that reaches it in the body, wherever it
    is then: it may wait for another process in a collective, where no handler of Python runs."""
    global _has_peers
    if threading.current_thread() is not threading.main_thread():
        yield  # only there can signals be told
        return
    hears, tells = os.pipe()
    os.set_blocking(tells, False)
    before = signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: _deafen(tells))
    args = (hears, seconds)
    threading.Thread(target=_end_after_a_signal, args=args, name="end", daemon=True).start()
    try:
        yield
    except BaseException:
        _has_peers = True
        raise
    finally:
        signal.set_wakeup_fd(before)
        os.close(tells)  # ends the thread, unless there was a signal


def _deafen(tells: int) -> None:
    """A fork has signals of its own, and would tell its parent."""
    before = signal.set_wakeup_fd(-1)
    if before != tells:
        signal.set_wakeup_fd(before)


def _end_after_a_signal(hears: int, seconds: float) -> None:
    with open(hears, "rb", buffering=0) as told:
        while heard := told.read(1):
            if heard[0] in _caught:
                time.sleep(seconds)
                _say_stopped(heard[0])
                os._exit(128 + heard[0])


def _stop(signum: int, frame: FrameType | None) -> None:
    global _ended_at, _ended_by
    if os.getpid() != _pid:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        return
    now = time.monotonic()
    if _ended_at is None:
        _ended_at, _ended_by = now, signum
        raise Stopped(signum)
    if now - _ended_at >= PATIENCE:  # some library holds the process up
        _say_stopped(signum)
        os._exit(128 + signum)
