"""What a report rests on: how its runs were made, with which commands, and which are missing."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from dynmoe.report.costs import Timings, generation_rows
from dynmoe.report.document import Block, Code, Items, Section, Sheet
from dynmoe.report.run import Problem, Run, conditions, every, seeds
from dynmoe.report.runs import Collection
from dynmoe.report.settings import start_name
from dynmoe.report.tables import Table, format_number
from dynmoe.report.words import capital
from dynmoe.selection import RULES

Words = Callable[[Sequence[Run]], str]


# What a problem's runs do not have; a row of it alone is left out.
ABSENT = "-"


class Row(NamedTuple):
    name: str
    words: Words


def how_it_was_made(collection: Collection, timings: Iterable[Timings]) -> Section:
    """The conditions of every problem's runs in a table, and the commands."""
    problems = collection.problems
    columns = [collection.of(problem) for problem in problems]
    rows = [(row.name, *map(row.words, columns)) for row in _conditions()]
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
    """Runs without a result, and what was noticed while reading; without blocks if neither."""
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
    """What is reported of each run of a problem, so that all the means can be worked out again."""
    runs = collection.of(problem)
    words = runs[0].words
    step, note = "last step", ""
    more: tuple[str, ...] = ()
    if problem.validates:
        step, note = "selected step", "; validation is what selected the step"
        more = (f"validation, {words.scale}", f"{words.noun} at the last step, {words.scale}")
    return Table(
        f"Every run on {problem.dataset}",
        ("setting", words.place, "seed", "trial seed", step, words.column, *more),
        tuple(
            (
                *(run.setting, run.environment, *map(str, run.repetition), str(run.outcome.step)),
                *map(_percent, _numbers(run)),
            )
            for run in runs
        ),
        note=f"{capital(words.measure)}{words.split}{note}.",
        conditions=conditions(runs),
    )


def _numbers(run: Run) -> tuple[float, ...]:
    found = run.outcome
    more = (found.validation, found.last) if run.problem.validates else ()
    return (found.accuracy, *more)


def _percent(share: float) -> str:
    return "X" if math.isnan(share) else f"{100 * share:.2f}"


def _fact(key: str) -> Words:
    return lambda runs: every(run.facts.get(key) for run in runs)


def _fact_if_any(key: str) -> Words:
    return lambda runs: every(
        ABSENT if run.facts.get(key) is None else run.facts[key] for run in runs
    )


def _config(key: str) -> Words:
    return lambda runs: every(run.config.get(key) for run in runs)


def _conditions() -> Iterator[Row]:
    """What stands in the rows, in order."""
    yield Row("measure", lambda runs: every(run.words.measure for run in runs))
    yield Row("reported on", lambda runs: every(map(_reported, runs)))
    yield Row("examples", lambda runs: every(map(_sizes, runs)))
    yield Row("tokens of an example, mean", lambda runs: every(map(_mean_tokens, runs)))
    yield Row("patience, in evaluations", _fact_if_any("patience"))
    yield Row("stage", _fact_if_any("stage"))
    yield Row("started from", lambda runs: every(map(_start, runs)))
    yield Row("protocol", _fact("protocol"))
    yield Row("selection rule", lambda runs: every(RULES[run.facts["selection"]] for run in runs))
    yield Row("repetitions", lambda runs: seeds({run.repetition for run in runs}))
    yield Row("steps", _fact("steps"))
    yield Row("batch size", lambda runs: every(map(_batch, runs)))
    yield Row("learning rate", _config("task.optimizer.lr"))
    yield Row("weight decay", _config("task.optimizer.weight_decay"))
    yield Row("backbone", _fact("backbone"))
    yield Row("weights", _fact("weights"))
    yield Row(
        "data hash",
        lambda runs: every(sorted({str(run.facts.get("data_hash")) for run in runs})),
    )
    yield Row("versions", _fact("versions"))
    yield Row("machine", _fact("machine"))
    yield Row("device, threads", lambda runs: every(map(_device, runs)))
    yield Row("runtime", _fact("runtime"))


def _start(run: Run) -> str:
    start = start_name(run.config)
    return f"{start}, of the same seed" if start else ABSENT


def _mean_tokens(run: Run) -> str:
    tokens = run.facts.get("mean_tokens")
    return ABSENT if tokens is None else format_number(tokens, ".1f")


def _reported(run: Run) -> str:
    return ", ".join(run.facts["reported"]["sets"])


def _batch(run: Run) -> str:
    """In DomainBed each training environment has a batch in every step."""
    size, samples = run.facts["batch_size"], run.facts.get("samples_per_step")
    return str(size) if samples in (None, size) else f"{size} x {samples // size}"


def _device(run: Run) -> str:
    return f"{run.facts.get('device', 'unknown')}, {run.facts.get('threads', 'unknown')}"


def _sizes(run: Run) -> str:
    """`2490 train, 277 dev`: training examples, and those that select or are reported."""
    sizes = run.facts.get("sizes") or {}
    facts = run.facts
    names = ["train", *facts["selects"]["sets"], *facts["reported"]["sets"]]
    found = {name: sizes[name] for name in names if sizes.get(name)}
    return ", ".join(f"{count} {name}" for name, count in found.items()) or "unknown"


def _commands(collection: Collection, timings: Iterable[Timings]) -> Iterator[str]:
    """Of the runs, their timing and this report; as far as the folders tell them."""
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
    """The sweep's command, or that of the first run of each setting."""
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
    """As the user wrote them: dynmoe-run hands values to Hydra as `++key=value`. None if Hydra
    recorded none."""
    file = run.folder.path / ".hydra" / "overrides.yaml"
    texts = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else []
    return [text.removeprefix("++") for text in texts]
