"""Faults, by a seed: `make torture ROUNDS=200`.

Prints what it did, each thing that is wrong, and counts at the end; exits 1 where something is.
"""

from __future__ import annotations

import argparse
import gc
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TypeVar

import forks
import fuzz
import groups
from damage import States, damage_and_go_on
from kills import Report, Straight, kill_and_go_on
from tiny_families import Family, families
from updates import compare

T = TypeVar("T")
Part = Callable[[Path, range, int, list[str], Report], None]


def kills(work: Path, rounds: range, seed: int, names: list[str], report: Report) -> None:
    """Kill runs of the families in turn."""
    straight = _once_each(names, work, lambda family: Straight(family, work))
    for number in _told(rounds, report):
        draw = random.Random(f"{seed} {number}")
        kill_and_go_on(straight(number), number, draw, report)


def updates(work: Path, rounds: range, seed: int, names: list[str], report: Report) -> None:
    """Compare five updates of experts a round on two processes."""
    compare(5 * len(rounds), seed, work, report)


def damage(work: Path, rounds: range, seed: int, names: list[str], report: Report) -> None:
    """Damage the folders of stopped and finished runs."""
    states = _once_each(names, work, lambda family: States(family, work, seed))
    for number in _told(rounds, report):
        draw = random.Random(f"{seed} damage {number}")
        damage_and_go_on(states(number), number, draw, report)


def _once_each(names: list[str], work: Path, make: Callable[[Family], T]) -> Callable[[int], T]:
    """By the number of a round what its family needs, made in the first round of that family."""
    known = families(work / "data")
    made = cache(lambda name: make(known[name]))
    turns = names or list(known)
    return lambda number: made(turns[number % len(turns)])


def _told(rounds: range, report: Report) -> Iterator[int]:
    """The rounds, with the counts so far after every tenth."""
    for number in rounds:
        yield number
        if number % 10 == 9:
            report.say(f"{number + 1} rounds: {dict(report.counts)}")


PARTS: dict[str, Part] = {
    **{"kills": kills, "damage": damage, "updates": updates},
    **{"commands": fuzz.commands, "data": fuzz.data_files},
}


ALONE = ("updates", "data")
"""Parts that start no commands."""

IMPORTING = ("vision", "language", "lm", "vl")
"""Families that import what the others do."""


def preload(work: Path, names: list[str], report: Report) -> None:
    """Import what runs of the families import."""
    known = families(work / "preload_data")
    for name in [name for name in IMPORTING if name in names or not names] or ["vision"]:
        begun = time.monotonic()
        forks.preload([*known[name].arguments, f"paths.outputs={work / 'preload'}"], work)
        report.say(f"{name}: imported, {time.monotonic() - begun:.0f} s")
    # What is here stays: a collection in a fork would look at all of it, and copy its pages.
    gc.collect()
    gc.freeze()


def torture(parts: list[str], rounds: range, seed: int, names: list[str], report: Report) -> Report:
    """Run the parts in a folder of their own."""
    work = Path(tempfile.mkdtemp(prefix="torture"))
    try:
        is_loaded = False
        for part in parts:
            if not is_loaded and part not in ALONE:
                preload(work, names, report)
                is_loaded = True
            begun = time.monotonic()
            PARTS[part](work / part, rounds, seed, names, report)
            report.say(f"{part}: {time.monotonic() - begun:.0f} s, {dict(report.counts)}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="go on at this round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="*", default=[])
    given = parser.parse_args()
    report = Report(say=lambda line: print(line, flush=True))
    rounds = range(given.first, given.first + given.rounds)
    try:
        with groups.read_once():
            torture(given.parts, rounds, given.seed, given.families, report)
    except KeyboardInterrupt:
        print("stopped")
    finally:
        for name, count in sorted(report.counts.items()):
            print(f"{count:6} {name}")
    raise SystemExit(bool(report.wrong))


if __name__ == "__main__":
    main()
