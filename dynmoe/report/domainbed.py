"""DomainBed's result tables, to the digit, from a folder of runs: ours, or DomainBed's own.

Source: domainbed/scripts/collect_results.py and domainbed/lib/reporting.py; Gulrajani & Lopez-Paz
2021, "In Search of Lost Domain Generalization". It needs `results.jsonl` of each run folder alone.
Every trial does its own search over hyper-parameters: the search is part of the algorithm, so the
error over trials contains it. Where DomainBed takes folders in the order in which the disk lists
them, the order here is that of seeds and names.

DomainBed's reader takes every record it finds: its sweeps name a folder by its arguments, so each
run is there once. A folder of ours may hold runs that its tables cannot distinguish: other
(experts, top-k) under the name TopK, other seeds in one trial. Such runs are refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynmoe.records import Record, RecordError, RunFolder
from dynmoe.report.run import NOT_FINITE, Run
from dynmoe.report.tables import Strong, Table, format_trials, latex
from dynmoe.selection import best_of_sweep

# The three selection rules, in DomainBed's order and in the words that it prints.
HEADINGS = {
    "training_domain_validation": "training-domain validation set",
    "leave_one_domain_out": "leave-one-domain-out cross-validation",
    "oracle": "test-domain validation set (oracle)",
}

# Rows: DomainBed's algorithms in its order; all others follow by name.
ALGORITHMS = (
    "ERM ERMPlusPlus Fish IRM GroupDRO Mixup MLDG CORAL MMD DANN CDANN MTL SagNet ARM VREx RSC SD "
    "ANDMask SANDMask IGA SelfReg Fishr TRM IB_ERM IB_IRM CAD CondCAD Transfer CausIRL_CORAL "
    "CausIRL_MMD EQRM RDM ADRMX URM"
)

# Data sets in DomainBed's order, and what it calls their environments. All others follow by name;
# their environments are env0, env1, ...
ENVIRONMENTS = {
    "Debug28": "0 1 2",
    "Debug224": "0 1 2",
    "ColoredMNIST": "+90% +80% -90%",
    "RotatedMNIST": "0 15 30 45 60 75",
    "ColoredDigits": "+90% +80% -90%",
    "RotatedDigits": "0 15 30 45 60 75",
    "VLCS": "C L S V",
    "PACS": "A C P S",
    "OfficeHome": "A C P R",
    "TerraIncognita": "L100 L38 L43 L46",
    "DomainNet": "clip info paint quick real sketch",
    "SVIRO": "aclass escape hilux i3 lexus tesla tiguan tucson x5 zoe",
    "WILDSCamelyon": "hospital_0 hospital_1 hospital_2 hospital_3 hospital_4",
    "WILDSFMoW": "region_0 region_1 region_2 region_3 region_4 region_5",
    **{
        f"Spawrious{kind}_{level}": "Test SC_group_1 SC_group_2"
        for kind in ("O2O", "M2M")
        for level in ("easy", "medium", "hard")
    },
}

# {(data set, algorithm): {trial seed: {test environment: accuracy}}}
Accuracies = dict[tuple[str, str], dict[int, dict[int, float]]]


@dataclass(frozen=True)
class Results:
    total: int
    """Number of records."""
    algorithms: list[str]
    environments: dict[str, list[str]]
    """Names by data set, in the order of the tables."""
    accuracies: dict[str, Accuracies]
    """Reported accuracies by selection rule."""


def write(folder: Path) -> str:
    """Save the tables as `results.txt` and `results.tex` in `folder`, as DomainBed does.

    Return the text, and after it what the averages lack, which DomainBed does not say.
    """
    results = collect(read(folder))
    text = to_text(results)
    (folder / "results.txt").write_text(text, encoding="utf-8")
    (folder / "results.tex").write_text(to_latex(results), encoding="utf-8")
    missing = "".join(f"{sentence}\n" for sentence in [*left_out(folder), *gaps(results)])
    return f"{text}\n{missing}" if missing else text


def collect(records: Sequence[Record]) -> Results:
    """Return what each rule reports for every trial, in the records that `read` returns."""
    sizes = {record["args"]["dataset"]: count_environments(record) for record in records}
    environments = {}
    for dataset in _ordered(sizes, ENVIRONMENTS):
        known = ENVIRONMENTS.get(dataset, "").split()
        ours = [f"env{index}" for index in range(sizes[dataset])]
        environments[dataset] = known if len(known) == sizes[dataset] else ours
    return Results(
        len(records),
        _ordered({record["args"]["algorithm"] for record in records}, ALGORITHMS.split()),
        environments,
        {rule: _accuracies(records, rule) for rule in HEADINGS},
    )


def tables(results: Results, rule: str) -> list[Table]:
    """Return one selection rule's table for each data set, and last that of their averages."""
    accuracies = results.accuracies[rule]
    method = f"model selection method: {HEADINGS[rule]}"
    found = []
    for dataset, names in results.environments.items():
        rows = []
        for algorithm in results.algorithms:
            trials = accuracies.get((dataset, algorithm), {}).values()
            cells = [[trial[env] for trial in trials if env in trial] for env in range(len(names))]
            rows.append(_row(algorithm, cells))
        title = f"Dataset: {dataset}, {method}"
        found.append(Table(title, ("Algorithm", *names, "Avg"), tuple(rows)))
    rows = []
    for algorithm in results.algorithms:
        sweeps = [accuracies.get((dataset, algorithm), {}) for dataset in results.environments]
        cells = [
            [float(np.mean(list(trial.values()))) for trial in trials.values() if trial]
            for trials in sweeps
        ]
        rows.append(_row(algorithm, cells))
    columns = ("Algorithm", *results.environments, "Avg")
    return [*found, Table(f"Averages, {method}", columns, tuple(rows))]


def gaps(results: Results) -> Iterator[str]:
    """Name what the averages lack: DomainBed averages the environments that a trial has."""
    for rule, name in HEADINGS.items():
        for (dataset, algorithm), trials in results.accuracies[rule].items():
            if not any(trials.values()):  # an X says so
                continue
            for seed, trial in trials.items():
                names = results.environments[dataset]
                absent = [env for index, env in enumerate(names) if index not in trial]
                if absent:
                    yield (
                        f"Incomplete ({name}): {algorithm} on {dataset}, trial seed {seed}, has no "
                        f"result on {', '.join(absent)}; the averages are over the rest."
                    )


def to_text(results: Results) -> str:
    """Return the tables in the layout of `collect_results`: columns of 20 and 25 characters."""
    lines = [f"Total records: {results.total}"]
    for rule in HEADINGS:
        found = tables(results, rule)
        for table in found:
            width = 25 if table is found[-1] else 20
            lines += ["", f"-------- {table.title}"]
            for row in (table.columns, *table.rows):
                lines.append("  ".join(cell.ljust(width)[:width] for cell in row) + " ")
    return "\n".join(lines) + "\n"


def to_latex(results: Results) -> str:
    """Return the same tables as a document, without cutting cells and their braces as DomainBed."""
    lines = [
        r"\documentclass{article}",
        r"\usepackage{booktabs}",
        r"\usepackage{adjustbox}",
        r"\begin{document}",
        r"\section{Full DomainBed results}",
        f"% Total records: {results.total}",
    ]
    for rule, name in HEADINGS.items():
        lines += ["", rf"\subsection{{Model selection: {name}}}"]
        headings = [*results.environments, "Averages"]
        for heading, table in zip(headings, tables(results, rule), strict=True):
            lines += ["", rf"\subsubsection{{{latex(heading)}}}", *_tabular(table)]
    return "\n".join([*lines, r"\end{document}", ""])


def _tabular(table: Table) -> Iterator[str]:
    yield from (r"\begin{center}", r"\adjustbox{max width=\textwidth}{%")
    yield rf"\begin{{tabular}}{{l{'c' * (len(table.columns) - 1)}}}"
    yield r"\toprule"
    yield " & ".join(latex(Strong(column)) for column in table.columns) + r" \\"
    yield r"\midrule"
    for row in table.rows:
        yield " & ".join(latex(cell.replace("+/-", "±")) for cell in row) + r" \\"
    yield from (r"\bottomrule", r"\end{tabular}}", r"\end{center}")


def _row(algorithm: str, cells: list[list[float]]) -> tuple[str, ...]:
    """Return means over trials, and their plain mean without an error, if none is missing."""
    average = "X"
    if all(cells):
        # Python's sum over numpy numbers adds from left to right, as DomainBed's does.
        average = f"{sum(100 * np.mean(cell) for cell in cells) / len(cells):.1f}"
    return algorithm, *map(format_trials, cells), average


def _accuracies(records: Sequence[Record], rule: str) -> Accuracies:
    groups: dict[tuple[str, str, int, int], list[Record]] = defaultdict(list)
    for record in records:
        args = record["args"]
        for env in args["test_envs"]:
            groups[args["dataset"], args["algorithm"], args["trial_seed"], env].append(record)
    accuracies: Accuracies = {}
    for (dataset, algorithm, trial, env), group in sorted(groups.items()):
        reported = accuracies.setdefault((dataset, algorithm), {}).setdefault(trial, {})
        choice = best_of_sweep(group, rule, env)
        if choice is not None:
            reported[env] = choice.test
    return accuracies


def _ordered(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the known names in their order, then the others by name."""
    rank = {name: index for index, name in enumerate(known)}
    return sorted(names, key=lambda name: (rank.get(name, len(rank)), name))


# Keys of a record's `args` that the tables need.
ARGS = ("dataset", "algorithm", "test_envs", "trial_seed", "hparams_seed")

ACCURACY = re.compile(r"env(\d+)_(?:in|out)_acc")


def read(folder: Path, keep: Callable[[Record], bool] = lambda record: True) -> list[Record]:
    """Return the records of every direct sub-folder with a `results.jsonl` that `keep` accepts,
    those that are `left_out` aside.

    Raises:
        RecordError: no records, a record that lacks a key, or runs that cannot share a table.
    """
    records: list[Record] = []
    runs: dict[Path, Record] = {}
    for file in sorted(folder.glob("*/results.jsonl")):
        run = RunFolder(file.parent)
        if _fault(run):
            continue
        for number, record in enumerate(run.read("results"), start=1):
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
    # DomainBed takes the highest hparams_seed among equally good draws: its groups are
    # sorted by it (domainbed/lib/query.py), and `best_of_sweep` takes the last.
    return sorted(records, key=lambda record: record["args"]["hparams_seed"])


def left_out(folder: Path) -> Iterator[str]:
    """Name the runs of ours that have not finished, or whose loss was not finite."""
    for file in sorted(folder.glob("*/results.jsonl")):
        fault = _fault(RunFolder(file.parent))
        if fault:
            yield f"Left out: {file.parent.name}, {fault}."


def _fault(folder: RunFolder) -> str:
    """Return why a run is left out, or nothing. Runs of DomainBed, without a `run.json`, all count,
    as in its own tables."""
    if not (folder.path / "run.json").exists():
        return ""
    if folder.state != "done":
        return folder.state
    step = Run(folder, folder.read_run(), folder.read("results")).nonfinite_step
    return "" if step is None else NOT_FINITE.format(step)


def count_environments(record: Record) -> int:
    """Return the number of environments of a record."""
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
    """Raise for runs that the tables cannot distinguish."""
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
        if _hparams(other, runs[other]) != _hparams(folder, record):
            raise _mixture(f"different hparams of {algorithm} on {dataset}, {seeds}", other, folder)
        other = same_data.setdefault(dataset, folder)
        if count_environments(runs[other]) != count_environments(record):
            raise _mixture(f"different numbers of environments of {dataset}", other, folder)


def _hparams(folder: Path, record: Record) -> tuple[Any, dict[str, Any]]:
    """Hyper-parameters of a run; those of our mixtures are in `run.json`, which DomainBed lacks."""
    has_facts = (folder / "run.json").exists()
    config = RunFolder(folder).read_run().get("config", {}) if has_facts else {}
    moe = {key: value for key, value in config.items() if key.startswith("moe.")}
    return record.get("hparams"), moe


def _mixture(what: str, first: Path, second: Path) -> RecordError:
    return RecordError(
        f"{first.parent}: found {what}, in {first.name} and {second.name}; expected one. A row of "
        "DomainBed's tables is one setting with one run for each test environment, trial seed and "
        "hparams seed. Leave only those in the folder; for sweeps over settings or seeds use "
        f"`dynmoe-report {first.parent}`."
    )
