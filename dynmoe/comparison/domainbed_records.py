"""The records of a folder of DomainBed runs, checked: each row of its tables must mean one setting.

DomainBed's own reader (domainbed/lib/reporting.py) takes what it finds. Its sweeps name a folder by
what was asked for, so each is there once; a folder of ours may hold runs that its tables cannot
tell apart: other (experts, top-k) under the name TopK, other seeds in one trial.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynmoe.records import Record, RecordError, RunFolder

# What a table needs of `args`.
ARGS = ("dataset", "algorithm", "test_envs", "trial_seed", "hparams_seed")

ACCURACY = re.compile(r"env(\d+)_(?:in|out)_acc")


def read(folder: Path, keep: Callable[[Record], bool] = lambda record: True) -> list[Record]:
    """The records of every direct sub-folder with a `results.jsonl` that `keep` lets through.

    Raises:
        RecordError: no records, a record that lacks a key, or runs that cannot share a table.
    """
    records: list[Record] = []
    runs: dict[Path, Record] = {}
    for file in sorted(folder.glob("*/results.jsonl")):
        for number, record in enumerate(RunFolder(file.parent).read("results"), start=1):
            _check(record, f"{file}, line {number}")
            if keep(record):
                records.append(record)
                runs[file.parent] = record
    if not records:
        raise RecordError(
            f"{folder}: expected run folders with a results.jsonl in it, found no record; "
            "give the folder that holds the run folders"
        )
    _refuse_mixtures(runs)
    # Of equally good draws DomainBed takes the one with the highest hparams_seed: its groups are
    # sorted by it (domainbed/lib/query.py), and `best_of_sweep` takes the last.
    return sorted(records, key=lambda record: record["args"]["hparams_seed"])


def count_environments(record: Record) -> int:
    """How many environments a record is about."""
    return 1 + max((int(found[1]) for found in map(ACCURACY.fullmatch, record) if found), default=0)


def _check(record: Record, place: str) -> None:
    args = record.get("args") or {}
    absent = [f"args.{key}" for key in ARGS if key not in args]
    tested = args.get("test_envs", [])
    count = max([count_environments(record), *(env + 1 for env in tested)])
    keys = [f"env{env}_{split}_acc" for env in range(count) for split in ("in", "out")]
    absent += [key for key in keys if key not in record]
    if absent:
        raise RecordError(
            f"{place}: expected a record of DomainBed's format, found no {', '.join(absent)}; "
            "move the run folder elsewhere, or run it again"
        )


def _refuse_mixtures(runs: dict[Path, Record]) -> None:
    """Runs that the tables could not tell apart."""
    same_run: dict[Any, Path] = {}
    same_draw: dict[Any, Path] = {}
    same_data: dict[str, Path] = {}
    for folder, record in runs.items():
        dataset, algorithm, test_envs, trial, draw = (record["args"][key] for key in ARGS)
        run = f"{algorithm} on {dataset}, test envs {sorted(test_envs)}"
        seeds = f"trial seed {trial}, hparams seed {draw}"
        other = same_run.setdefault((run, seeds), folder)
        if other != folder:
            raise _mixture(f"two runs of {run}, {seeds}", other, folder)
        # DomainBed's hyper-parameters are a function of these (hparams_registry.py).
        other = same_draw.setdefault((dataset, algorithm, draw, trial if draw else None), folder)
        if runs[other].get("hparams") != record.get("hparams"):
            raise _mixture(f"different hparams of {algorithm} on {dataset}, {seeds}", other, folder)
        other = same_data.setdefault(dataset, folder)
        if count_environments(runs[other]) != count_environments(record):
            raise _mixture(f"different numbers of environments of {dataset}", other, folder)


def _mixture(what: str, first: Path, second: Path) -> RecordError:
    return RecordError(
        f"{first.parent}: found {what}, in {first.name} and {second.name}; expected one. A row of "
        "DomainBed's tables is one setting with one run for each test environment, trial seed and "
        "hparams seed. Leave only those in the folder; for sweeps over settings or seeds use "
        f"`dynmoe-report {first.parent}`."
    )
