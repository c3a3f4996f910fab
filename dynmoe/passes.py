"""Long passes over data before training say how far they are, and end at once when stopped."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

log = logging.getLogger(__name__)

BAR_AFTER = 1.0  # seconds of a pass until a terminal shows a bar
BLOCK = 256  # calls that a thread is handed at once

T = TypeVar("T")

_seconds = 30.0


def say_every(seconds: float) -> None:
    """Set how often a pass says a line where no terminal shows its bar (runtime.progress_every)."""
    global _seconds
    _seconds = seconds


def shown(
    items: Iterable[T],
    what: str,
    total: int | None = None,
    size: Callable[[T], int] = lambda _: 1,
) -> Iterator[T]:
    """Yield the items of a pass, and show how many of `total` are done: a bar on a terminal, else a
    line now and then. `what` follows the number: `images read`; `size` counts an item."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    of = "" if total is None else f" of {total:,}"
    # Names of folders are in it: neither fields nor markup.
    text = progress.TextColumn("{task.completed:,}{task.description}", markup=False)
    left = [] if total is None else [progress.BarColumn(), progress.TimeRemainingColumn()]
    columns = [text, progress.TimeElapsedColumn(), *left]
    bar = progress.Progress(*columns, console=console, transient=True)
    task = bar.add_task(f"{of} {what}", total=total)
    every = BAR_AFTER if console.is_terminal else _seconds
    began = said = time.monotonic()
    done = 0
    try:
        for item in items:
            yield item
            done += size(item)
            now = time.monotonic()
            if now - said < every:
                continue
            said = now
            if console.is_terminal:
                bar.start()
                bar.update(task, completed=done)
                every = 0.1
            else:
                _say(f"{done:,}{of} {what}, {now - began:.0f} s")
    finally:
        if bar.live.is_started:
            bar.stop()


def _say(line: str) -> None:
    if log.isEnabledFor(logging.INFO):  # of a run: Hydra's, which writes to run.log as well
        log.info("%s", line)
    else:
        print(line, file=sys.stderr)


def in_threads(function: Callable[[int], T], n: int, what: str) -> Iterator[T]:
    """function(0), ..., function(n - 1), in order, by threads: Pillow releases the lock while it
    works. `what`: see `shown`."""
    pool = ThreadPoolExecutor(4 * (os.cpu_count() or 1))
    try:
        blocks = [range(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]
        found = pool.map(lambda block: [function(i) for i in block], blocks)
        for results in shown(found, what, n, len):
            yield from results
    finally:
        # On Ctrl-C what is left is not called: without this a stop would wait for all files.
        pool.shutdown(cancel_futures=True)
