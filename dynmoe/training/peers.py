"""The processes that train together: when one is lost the others end, and say which one it was."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment

from dynmoe import process, ranks
from dynmoe.errors import UserError

LOOK = 0.5  # seconds between two looks at the other processes
SHOWS = 5.0  # seconds within which it shows that a process has ended whose connection broke
STARTER = "DYNMOE_STARTER"  # the process that starts the others tells them its number
PARTING = 10.0  # seconds that a process gets to end by itself once another one is lost


@contextmanager
def together(trainer: L.Trainer) -> Iterator[None]:
    """The body trains in several processes. When one of them ends early, all do, within seconds.

    Processes that Slurm or torchrun has started are ended by them; those of another node by nobody
    before the time limit of a collective.

    Raises:
        UserError: another process is lost, by name where this one has started it.
    """
    if trainer.world_size == 1:
        yield
        return
    watch = _Watch(trainer)
    with process.ends_in_time():
        watch.start()
        try:
            yield
        except UserError:  # the same in all processes, or of one that has said it
            watch.end(SHOWS)
            raise
        except Exception as error:
            lost = watch.found(SHOWS) or _broken_connection(error)
            watch.end(0.0 if lost else SHOWS)
            if not lost:
                raise
            raise UserError(lost) from error
        except BaseException:  # Ctrl-C and the signals that do the same
            watch.end(0.0)
            raise
        watch.leave()


class _Watch(threading.Thread):
    """Looks at the processes that this one has started, or at the one that has started this."""

    def __init__(self, trainer: L.Trainer) -> None:
        super().__init__(name="peers", daemon=True)
        self._launcher: Any = trainer.strategy.launcher
        self._has_started = hasattr(self._launcher, "_call_children_scripts")  # as commands
        environment = getattr(trainer.strategy, "cluster_environment", None)
        is_started = isinstance(environment, LightningEnvironment) and ranks.rank() > 0
        # The number of the starter, not of the parent now: it may be gone before this one looks.
        self._parent = int(os.environ.get(STARTER, "0")) if is_started else None
        if not is_started:
            os.environ[STARTER] = str(os.getpid())
        self._others: list[subprocess.Popen[bytes]] = []
        self._has_left, self._has_found = threading.Event(), threading.Event()
        self._lost = ""

    def run(self) -> None:
        while not self._lost and not self._has_left.wait(LOOK):
            self._lost = self._look()
        if self._lost:
            self._has_found.set()
            # The connection to a lost process breaks, and the main thread leaves; or it waits on.
            if not self._has_left.wait(PARTING):
                self._kill()
                process.end_at_once(self._lost)

    def _look(self) -> str:
        """Say which process is lost, if one is."""
        # NOTE: Lightning's own observer would kill this process too (SIGKILL), without a word,
        # 5 s after another one has ended. It ends itself when it has none to observe.
        started = self._launcher.procs if self._has_started else []
        while started:
            self._others.append(started.pop(0))
        for rank, other in enumerate(self._others, start=ranks.rank() + 1):
            if status := other.poll():
                return _sentence(f"the process of rank {rank}", _end(status))
        if self._parent is not None and os.getppid() != self._parent:
            return _sentence("the first process of this training", "is gone")
        return ""

    def found(self, wait: float) -> str:
        """The process that is lost, which may show a moment after its connection broke."""
        self._has_found.wait(wait)
        return self._lost

    def leave(self) -> None:
        """The main thread has left the training."""
        self._has_left.set()

    def end(self, wait: float) -> None:
        """End the processes that this one has started; they get ``wait`` seconds to do so."""
        self.leave()
        deadline = time.monotonic() + wait
        while any(each.poll() is None for each in self._others) and time.monotonic() < deadline:
            time.sleep(LOOK / 5)
        self._kill()

    def _kill(self) -> None:
        for each in self._others:
            each.kill()


def _end(status: int) -> str:
    """How a process has ended: Popen counts signals as negative, shells from 128."""
    number = -status if status < 0 else status - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"has ended with status {status}"
    return f"was ended by {name}" + (" (for want of memory, perhaps)" if name == "SIGKILL" else "")


def _sentence(who: str, how: str) -> str:
    return f"{who} {how}. The others end with it. {process.GOES_ON}"


def _broken_connection(error: Exception) -> str:
    """The sentence about a collective that failed, where nobody knows which process is lost."""
    text = str(error)
    is_broken = isinstance(error, torch.distributed.DistError) or any(
        name in text for name in ("gloo", "NCCL")
    )
    if not is_broken:
        return ""
    reason = " ".join(text.split())[:200]
    return _sentence("another process of this training", f"is lost ({reason})")
