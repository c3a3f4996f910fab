"""Provenance of a report: conditions and commands of its runs, and which runs are missing."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import yaml

from dynmoe.report.costs import Timings, generation_rows
from dynmoe.report.document import Block, Code, Items, Section, Sheet
from dynmoe.report.run import Problem, Run, conditions, every, seeds
from dynmoe.report.runs import Collection
from dynmoe.report.settings import start_name
from dynmoe.report.tables import Table, format_number
from dynmoe.report.words import capital
from dynmoe.selection import RULES

ABSENT = "-"
"""Cell of a condition that does not apply to a problem; a row of such cells is left out."""

CellText = Callable[[Sequence[Run]], str]


def how_it_was_made(collection: Collection, timings: Iterable[Timings]) -> Section:
    """Return the conditions of every problem's runs in a table, and the commands."""
    problems = collection.problems
    columns = [collection.of(problem) for problem in problems]
    rows = [(name, *map(text, columns)) for name, text in CONDITIONS.items()]
    table = Table(
        "Conditions of the runs",
        ("condition", *(problem.dataset for problem in problems)),
        tuple(row for row in rows if set(row[1:]) != {ABSENT}),
        note="Where runs differ, all values are named.",
        in_words=True,
    )
    commands = "\n".join(_commands(collection, timings))
    return Section("made", "How it was made", [Sheet("conditions", table), Code(commands)])


def what_is_missing(collection: Collection) -> Section:
    """Name runs without a result, and warnings of the reader; without blocks if there are none."""
    blocks: list[Block] = []
    if collection.absent:
        table = Table(
            "Runs without a result",
            ("run", "state", "job", "failed with"),
            tuple(
                (entry.name, entry.state, entry.overrides or "-", entry.why or "-")
                for entry in collection.absent
            ),
            note="Nothing above counts them. The sweep's command, started again, runs them.",
            in_words=True,
        )
        blocks.append(Sheet("absent", table))
    if collection.warnings:
        blocks += ["Noticed while reading the records:", Items(collection.warnings)]
    return Section("missing", "What is missing", blocks)


def every_run(collection: Collection, problem: Problem) -> Table:
    """Return the results of each run of a problem, so that all means can be computed again."""
    runs = collection.of(problem)
    words = runs[0].words
    step, note, more = "last step", "", []
    if problem.validates:
        step, note = "selected step", "; validation is what selected the step"
        more = [f"validation, {words.scale}", f"{words.noun} at the last step, {words.scale}"]
    rows = []
    for run in runs:
        found = run.outcome
        numbers = (found.accuracy, found.validation, found.last)[: 1 + len(more)]
        percent = ("X" if math.isnan(share) else f"{100 * share:.2f}" for share in numbers)
        rows.append(
            (run.setting, run.environment, *map(str, (*run.repetition, found.step)), *percent)
        )
    return Table(
        f"Every run on {problem.dataset}",
        ("setting", words.place, "seed", "trial seed", step, words.column, *more),
        tuple(rows),
        note=f"{capital(words.measure)}{words.split}{note}.",
        conditions=conditions(runs),
    )


def _each(value: Callable[[Run], object]) -> CellText:
    """All values that differ between runs."""
    return lambda runs: every(map(value, runs))


def _fact(key: str, missing: str | None = None) -> CellText:
    return _each(lambda run: missing if run.facts.get(key) is None else run.facts[key])


def _config(key: str) -> CellText:
    return _each(lambda run: run.config.get(key))


def _start(run: Run) -> str:
    start = start_name(run.config)
    return f"{start}, of the same seed" if start else ABSENT


def _sizes(run: Run) -> str:
    """`2490 train, 277 dev`: training examples, and those that select or are reported."""
    facts, sizes = run.facts, run.facts.get("sizes") or {}
    names = ["train", *facts["selects"]["sets"], *facts["reported"]["sets"]]
    found = {name: sizes[name] for name in names if sizes.get(name)}
    return ", ".join(f"{count} {name}" for name, count in found.items()) or "unknown"


def _mean_tokens(run: Run) -> str:
    tokens = run.facts.get("mean_tokens")
    return ABSENT if tokens is None else format_number(tokens, ".1f")


def _batch(run: Run) -> str:
    """In DomainBed each training environment has a batch in every step."""
    size, samples = run.facts["batch_size"], run.facts.get("samples_per_step")
    return str(size) if samples in (None, size) else f"{size} x {samples // size}"


def _data(runs: Sequence[Run]) -> str:
    return every(sorted({str(run.facts.get("data_hash")) for run in runs}))


CONDITIONS: dict[str, CellText] = {
    "measure": _each(lambda run: run.words.measure),
    "reported on": _each(lambda run: ", ".join(run.facts["reported"]["sets"])),
    "examples": _each(_sizes),
    "tokens of an example, mean": _each(_mean_tokens),
    "patience, in evaluations": _fact("patience", ABSENT),
    "stage": _fact("stage", ABSENT),
    "started from": _each(_start),
    "protocol": _fact("protocol"),
    "selection rule": _each(lambda run: RULES[run.facts["selection"]]),
    "repetitions": lambda runs: seeds({run.repetition for run in runs}),
    "steps": _fact("steps"),
    "batch size": _each(_batch),
    "learning rate": _config("task.optimizer.lr"),
    "weight decay": _config("task.optimizer.weight_decay"),
    "backbone": _fact("backbone"),
    "weights": _fact("weights"),
    "data hash": _data,
    "versions": _fact("versions"),
    "machine": _fact("machine"),
    "device, threads": _each(
        lambda run: ", ".join(str(run.facts.get(key, "unknown")) for key in ("device", "threads"))
    ),
    "runtime": _fact("runtime"),
}


def _commands(collection: Collection, timings: Iterable[Timings]) -> Iterator[str]:
    """Yield the commands of the runs, of their timing and of this report, as far as recorded."""
    found: dict[str, None] = {}
    by_folder: dict[Path, list[Run]] = {}
    for run in collection.runs:
        by_folder.setdefault(run.folder.path.parent, []).append(run)
    for folder, runs in by_folder.items():
        found |= dict.fromkeys(collection.commands.get(folder) or _training(runs))
    yield from found
    yield from dict.fromkeys(command for each in timings for command in each.commands)
    answered = [generation_rows(folder).command for folder in collection.folders]
    yield from dict.fromkeys(command for command in answered if command)
    yield shlex.join(["dynmoe-report", *map(str, collection.folders)])


def _training(runs: Sequence[Run]) -> Iterator[str]:
    """Yield the sweep's command, or that of the first run of each setting."""
    jobs = {run.folder.path: _overrides(run) for run in runs}
    shared = [
        text for text in next(iter(jobs.values())) if all(text in job for job in jobs.values())
    ]
    if any(text.startswith("sweep=") for text in shared):
        yield shlex.join(["dynmoe-run", *shared])
        return
    seen = set()
    for run in runs:
        job = jobs[run.folder.path]
        if job and run.setting not in seen:
            seen.add(run.setting)
            yield shlex.join(["dynmoe-run", *job])


def _overrides(run: Run) -> list[str]:
    """Return them as the user wrote them: dynmoe-run hands values to Hydra as `++key=value`."""
    file = run.folder.path / ".hydra" / "overrides.yaml"
    texts = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else []
    return [text.removeprefix("++") for text in texts]
