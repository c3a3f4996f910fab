"""Folders of runs whose files are cut, flipped, emptied, exchanged or gone, and then used again."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from forks import call, killed_at
from kills import Report, Straight, without_figures
from tiny_families import Family, difference, runs, traces, without_time

from dynmoe.records import RunFolder

STOPPED = 4  # moments at which runs were killed that are damaged then

Draw = random.Random
Harm = Callable[[Path, Draw], str]


def cut(file: Path, draw: Draw) -> str:
    content = file.read_bytes()
    file.write_bytes(content[: (at := draw.randrange(max(1, len(content))))])
    return f"cut at {at} of {len(content)}"


def flip(file: Path, draw: Draw) -> str:
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 20))):
        if content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return "flipped"


def zero(file: Path, draw: Draw) -> str:
    content = bytearray(file.read_bytes())
    first = draw.randrange(max(1, len(content)))
    content[first:] = bytes(len(content) - first)
    file.write_bytes(content)
    return f"zero from {first}"


def empty(file: Path, draw: Draw) -> str:
    file.write_bytes(b"")
    return "empty"


def remove(file: Path, draw: Draw) -> str:
    file.unlink()
    return "removed"


def garbage(file: Path, draw: Draw) -> str:
    file.write_bytes(
        draw.choice((draw.randbytes(200), b"[1, 2]\n", b'{"step": null}\n', b"a: [b\n"))
    )
    return "garbage"


def folder(file: Path, draw: Draw) -> str:
    file.unlink()
    file.mkdir()
    return "a folder"


def lose_line(file: Path, draw: Draw) -> str:
    lines = file.read_bytes().splitlines(keepends=True)
    if lines:
        del lines[(at := draw.randrange(len(lines)))]
        file.write_bytes(b"".join(lines))
        return f"line {at} lost"
    return "as it was"


def double_line(file: Path, draw: Draw) -> str:
    lines = file.read_bytes().splitlines(keepends=True)
    if lines:
        at = draw.randrange(len(lines))
        file.write_bytes(b"".join([*lines, lines[at]]))
        return f"line {at} doubled"
    return "as it was"


def exchange(file: Path, draw: Draw) -> str:
    other = draw.choice(sorted(each for each in file.parent.iterdir() if each.is_file()))
    shutil.copyfile(other, file.with_name("exchanged"))
    file.with_name("exchanged").replace(file)
    return f"replaced by {other.name}"


HARMS: tuple[Harm, ...] = (
    *(cut, flip, flip, zero, empty, remove, garbage, folder),
    *(lose_line, double_line, exchange),
)


class States:
    """Folders of runs of a family: some killed at a moment, one finished."""

    def __init__(self, family: Family, work: Path, seed: int) -> None:
        self.straight = Straight(family, work)
        self.work, self.family = self.straight.work, family
        self.case = self.work / "case"
        self.arguments = self.straight.arguments("case")
        draw = Draw(f"{seed} states")
        self.kept = []
        moments = [self.straight.changes * (i + 1) // (STOPPED + 1) for i in range(STOPPED)]
        for number, moment in enumerate([*moments, 0]):
            inside = _both(without_figures, killed_at(moment + draw.randrange(3), self.case))
            call(
                "run",
                self.arguments,
                self.work,
                inside=inside if moment else without_figures,
                ranks=family.ranks,
                limit=self.straight.limit,
            )
            self.kept.append(self.work / f"kept{number}")
            self.case.rename(self.kept[-1])
        self.told = self._evaluations(self.kept[-1])

    def _evaluations(self, kept: Path) -> dict[Path, str]:
        """The scores of each run, by its folder."""
        told = {}
        shutil.copytree(kept, self.case)
        for run in runs(self.case):
            ended = call("evaluate", [f"run={run.path}"], self.work)
            assert ended.status == 0, ended.output
            told[run.path] = table(ended.output)
        shutil.rmtree(self.case)
        return told


def table(output: str) -> str:
    """The scores that dynmoe-eval prints: lines of its table, without what was recorded."""
    return "\n".join(line for line in output.splitlines() if line.startswith("│"))


def _both(*calls: Callable[[], None]) -> Callable[[], None]:
    def inside() -> None:
        for each in calls:
            each()

    return inside


def damage_and_go_on(states: States, number: int, draw: Draw, report: Report) -> None:
    """Damage one or two files of a run, and give a command: it refuses, or all is as it was."""
    kept = draw.choice(states.kept)
    shutil.copytree(kept, states.case)
    run = draw.choice(runs(states.case))
    was_done = run.is_done
    told: list[str] = []
    harmed: set[str] = set()
    for _ in range(draw.choice((1, 1, 1, 2))):
        files = sorted(file for file in run.path.rglob("*") if file.is_file())
        # Records, checkpoints and facts more often than what nothing reads.
        weights = [1 if {".hydra", "csv", "figures"} & set(file.parts) else 4 for file in files]
        file = draw.choices(files, weights)[0]
        is_log = "csv" in file.relative_to(run.path).parts
        name = "csv" if is_log else file.name.removesuffix(".jsonl")
        harmed.add(f"{run.path.name}/{name}")
        told.append(f"{file.relative_to(run.path)} {draw.choice(HARMS)(file, draw)}")
    command = draw.choices(("run", "evaluate", "report"), (5, 3, 2))[0]
    what = f"{states.family.name} {number} ({kept.name}), {'; '.join(told)}: {command}"
    lines = _whole_lines(run)
    given = {
        "run": states.arguments,
        "evaluate": [f"run={run.path}"],
        "report": [str(run.path)],
    }[command]
    inside = without_figures if command == "run" else None
    ranks = states.family.ranks if command == "run" else 1
    ended = call(command, given, states.work, inside=inside, ranks=ranks)
    report.counts["damaged states"] += 1
    report.counts[f"damaged states, {command}: status {ended.status}"] += 1
    report.check_end(ended, what)
    if ended.status not in (0, 2):
        report.fault("other ends", f"{what}: {ended.status}\n{ended.output[-1500:]}")
    if command == "run" and ended.status == 0:
        found = traces(states.case)
        # Logs are never read, and a selected checkpoint may be removed by hand. A finished run is
        # not trained again and stays as it is; its records are read where it is the one shown.
        is_shown = str(run.path) in ended.output.splitlines()
        unread = {
            name
            for name in harmed
            if name.endswith("/csv")
            or name not in found
            or (was_done and not (is_shown and isinstance(states.straight.traces.get(name), list)))
        }
        found, expected = (
            {name: value for name, value in each.items() if name not in unread}
            for each in (found, states.straight.traces)
        )
        if found := difference(found, expected):
            report.fault("silent wrong", f"{what}: {found}\n{ended.output[-600:]}")
    elif lost := [line for line in lines if line not in _whole_lines(run)]:
        report.fault("lost lines", f"{what}: {lost[0][:80]}\n{ended.output[-600:]}")
    is_scored = command == "evaluate" and ended.status == 0 and was_done
    told_before = states.told[run.path]
    if is_scored and table(ended.output) != told_before and "differ" not in ended.output:
        report.fault("silent wrong", f"{what}:\n{ended.output[-1500:]}\n{told_before}")
    shutil.rmtree(states.case)


def _whole_lines(run: RunFolder) -> list[str]:
    """Without what is measured: a run that goes on may write a line again before it refuses."""
    found = []
    for file in sorted(run.path.glob("*.jsonl")):
        for line in file.read_bytes().splitlines(keepends=True) if file.is_file() else ():
            if line.endswith(b"\n"):
                found.append(_told(line))
    return found


def _told(line: bytes) -> str:
    try:
        return repr(without_time(json.loads(line)))
    except (ValueError, AttributeError):  # damaged
        return repr(line)
