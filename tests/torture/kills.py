"""Runs that are killed at random moments and at chosen changes of their folders, and go on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from forks import Ended, Fork, at_changes, call, killed_at, start
from tiny_families import Family, difference, traces

END = 60.0  # seconds within which a run has to end after a signal, whichever process got it

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@dataclass
class Report:
    """Counts, and a line for each thing that is wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    say: Callable[[str], None] = print

    def fault(self, kind: str, text: str) -> None:
        self.counts[kind] += 1
        self.wrong.append(f"{kind}: {text}")
        self.say(f"{kind}: {text}")

    def check_end(self, ended: Ended, what: str) -> None:
        """A command may end with any status, but not with a traceback, and not never."""
        if ended.hung:
            self.fault("hangs", f"{what}: {ended.seconds:.0f} s\n{ended.output[-1500:]}")
        if ended.has_traceback:
            self.fault("tracebacks", f"{what}:\n{ended.output[-2500:]}")


class Straight:
    """A run of a family that nothing disturbs, to compare with."""

    def __init__(self, family: Family, work: Path) -> None:
        self.family = family
        self.work = work / family.name
        self.work.mkdir(parents=True)
        place, counted = self.work / "straight", self.work / "changes"
        count = at_changes(place, lambda seen: counted.write_text(str(seen)) and None)

        def inside() -> None:
            without_figures()
            count()

        arguments = self.arguments("straight")
        ended = call("run", arguments, self.work, inside=inside, ranks=family.ranks, limit=600)
        assert ended.status == 0, ended.output
        self.seconds, self.cpu = ended.seconds, ended.cpu
        self.changes = int(counted.read_text())
        self.limit = END + 10 * self.seconds  # of a run that does not hang
        self.traces = traces(self.work / "straight")
        assert len(self.traces) > 3

    def arguments(self, outputs: str) -> list[str]:
        place = self.work / outputs
        cache = self.work / f"cache_{outputs}"
        return [*self.family.arguments, f"paths.outputs={place}", f"paths.cache={cache}"]


def without_figures() -> None:
    """Draw none: they take most of the time of a tiny run."""
    from dynmoe.report import figures

    figures.draw_all = lambda run: None  # type: ignore[assignment]


BACKGROUND = "task.async_save=true"  # each command of a run may have it, or not


def slow_writes(seconds: float) -> None:
    """Let checkpoints take their place late: in the background records get ahead of them."""
    from dynmoe.training import callbacks

    put = callbacks._put_in_place

    def late(unfinished: Path, is_best: bool) -> None:
        time.sleep(seconds)
        put(unfinished, is_best)

    callbacks._put_in_place = late


def kill_and_go_on(straight: Straight, number: int, draw: random.Random, report: Report) -> None:
    """One run, killed one to four times, then finished by the same command, and compared."""
    family, name = straight.family, f"round{number}"
    arguments, outputs = straight.arguments(name), straight.work / name
    draws_figures = number % 8 == 0
    told = []
    for _ in range(draw.choice((1, 2, 3, 4))):
        how = draw.random()
        change = draw.randint(1, straight.changes + 20 * draws_figures) if how < 0.5 else 0
        slow = draw.choice((None, None, 0.0, 0.2))
        given = arguments if slow is None else [*arguments, BACKGROUND]

        def inside(change: int = change, slow: float | None = slow) -> None:
            if not draws_figures:
                without_figures()
            if slow:
                slow_writes(slow)
            killed_at(change, outputs)()

        fork = start("run", given, straight.work, inside=inside, ranks=family.ranks)
        if change:
            told.append(f"killed at change {change}")
        else:
            signum = draw.choice(SIGNALS)
            told.append(_hit(fork, signum, draw.uniform(0.1, 0.9) * straight.seconds, family, draw))
        told_at = time.monotonic() - fork.begun
        ended = fork.wait(straight.limit)
        if slow is not None:
            told[-1] += ", saving in the background"
            report.counts["kills while saving in the background"] += ended.status != 0
        what = f"{family.name} {number}, {', '.join(told)}"
        # Not where the run had ended before; where one of its processes was hit, the other says so.
        report.counts["kills"] += ended.status != 0
        report.check_end(ended, what)
        if not change and ended.status not in (0, 2) and ended.seconds > told_at + END:
            report.fault("slow ends", f"{what}: {ended.seconds - told_at:.0f} s")
    quiet = None if draws_figures else without_figures
    ended = call(
        "run", arguments, straight.work, inside=quiet, ranks=family.ranks, limit=straight.limit
    )
    report.check_end(ended, f"{what}, then finished")
    if ended.status:
        report.fault("not finished", f"{what}: status {ended.status}\n{ended.output[-1500:]}")
    elif found := difference(traces(outputs), straight.traces):
        report.fault("differing records", f"{what}: {found}")
    report.counts[f"runs of {family.name}"] += 1
    shutil.rmtree(outputs, ignore_errors=True)
    shutil.rmtree(straight.work / f"cache_{name}", ignore_errors=True)


def _hit(
    fork: Fork, signum: signal.Signals, after: float, family: Family, draw: random.Random
) -> str:
    """Send a signal to one process of the run, or to all; returns words for it."""
    time.sleep(after)
    pids = [fork.pid]
    whom = "it"
    if family.ranks > 1:
        asked = ["pgrep", "-P", str(fork.pid)]
        others = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
        whom = draw.choice(("rank 0", "rank 1", "both"))
        pids = {"rank 0": pids, "rank 1": [*map(int, others)], "both": [*pids, *map(int, others)]}[
            whom
        ]
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue
    return f"{signum.name} to {whom} after {after:.2f} s"
