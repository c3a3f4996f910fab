"""What a report rests on: how its runs were made, with which commands, and which are missing."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from dynmoe.comparison.conditions import RULES, seeds
from dynmoe.comparison.run import Run, environments
from dynmoe.comparison.runs import Collection
from dynmoe.report.document import Block, Code, Items, Section, Sheet
from dynmoe.report.tables import Table

Words = Callable[[Sequence[Run]], str]


def how_it_was_made(collection: Collection) -> Section:
    """The conditions of every problem's runs in a table, and the commands."""
    problems = collection.problems
    columns = [collection.of(problem) for problem in problems]
    table = Table(
        "Conditions of the runs",
        ("condition", *(problem.dataset for problem in problems)),
        tuple((name, *(words(runs) for runs in columns)) for name, words in CONDITIONS.items()),
        note="Where runs differ, all values are named.",
    )
    commands = "\n".join(_commands(collection))
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
        )
        blocks.append(Sheet("absent", table))
    if collection.warnings:
        blocks += ["Noticed while reading the records:", Items(collection.warnings)]
    return Section("missing", "What is missing", blocks)


def _fact(key: str) -> Words:
    return lambda runs: _all(run.facts.get(key) for run in runs)


def _config(key: str) -> Words:
    return lambda runs: _all(run.config.get(key) for run in runs)


CONDITIONS: dict[str, Words] = {
    "test environments": lambda runs: ", ".join(environments(runs)),
    "protocol": _fact("protocol"),
    "selection rule": lambda runs: _all(RULES[run.facts["selection"]] for run in runs),
    "repetitions": lambda runs: seeds({run.repetition for run in runs}),
    "steps": _fact("steps"),
    "batch size, per training environment": _fact("batch_size"),
    "learning rate": _config("task.optimizer.lr"),
    "weight decay": _config("task.optimizer.weight_decay"),
    "backbone": _fact("backbone"),
    "weights": _fact("weights"),
    "data hash": lambda runs: _all(sorted({str(run.facts.get("data_hash")) for run in runs})),
    "versions": _fact("versions"),
    "machine": _fact("machine"),
    "device, threads": lambda runs: _all(
        f"{run.facts.get('device', 'unknown')}, {run.facts.get('threads', 'unknown')}"
        for run in runs
    ),
    "runtime": _fact("runtime"),
}


def _all(values: Iterable[Any]) -> str:
    return " / ".join(dict.fromkeys(map(_words, values)))


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return "unknown" if value is None else str(value)


def _commands(collection: Collection) -> Iterator[str]:
    """Of the runs, their timing and this report; as far as the folders tell them."""
    found: dict[str, None] = {}
    by_folder: dict[Path, list[Run]] = {}
    for run in collection.runs:
        by_folder.setdefault(run.folder.path.parent, []).append(run)
    for folder, runs in by_folder.items():
        found |= dict.fromkeys(_training(runs))
        timing = folder / "timing.json"
        if timing.exists():
            found[json.loads(timing.read_text(encoding="utf-8"))["command"]] = None
    yield from found
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
    """As Hydra recorded them; none if it did not."""
    file = run.folder.path / ".hydra" / "overrides.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else []
