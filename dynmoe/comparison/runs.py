"""The runs below folders: which finished, which are absent, and what their settings are called.

A run that cannot be used does not stop the report of the others: a warning names it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dynmoe.comparison.checks import check_config, check_facts, check_results, check_routing
from dynmoe.comparison.run import Outcome, Problem, Repetition, Run, order, short_name
from dynmoe.comparison.settings import name_settings
from dynmoe.comparison.standing import choose
from dynmoe.records import RecordError, RunFolder
from dynmoe.selection import on_sets, rule_of

__all__ = ["Absent", "Collection", "Outcome", "Problem", "Run", "read_runs", "short_name"]


Job = Mapping[str, Any]
"""Of `sweep.json`: the overrides, and the configuration that they make."""


@dataclass(frozen=True)
class Absent:
    """A run that a sweep asks for and that has no result yet."""

    name: str
    """Of its folder."""
    overrides: str
    state: str
    """missing, stopped, running or failed"""
    why: str
    """The first line of what it failed with; empty otherwise."""
    problem: Problem | None = None
    """This and what follows: as far as its `run.json` or the sweep's `sweep.json` tell it."""
    setting: str = ""
    environment: str = ""
    repetition: Repetition | None = None


@dataclass(frozen=True)
class Collection:
    """All that the given folders hold."""

    folders: list[Path]
    runs: list[Run]
    """One for each problem, setting, environment and repetition, in that order."""
    absent: list[Absent]
    warnings: list[str]
    others: list[Run] = field(default_factory=list)
    """Further finished runs that the choice of `runs` needed: draws and searched values of
    hyper-parameters that lost, and runs with two test environments for leave-one-domain-out
    selection."""
    commands: Mapping[Path, Sequence[str]] = field(default_factory=dict)
    """Of sweep folders: those that made their runs, where `sweep.json` remembers them."""

    @property
    def problems(self) -> list[Problem]:
        return list(dict.fromkeys(run.problem for run in self.runs))

    def of(self, problem: Problem) -> list[Run]:
        return [run for run in self.runs if run.problem == problem]


def read_runs(folders: Sequence[Path]) -> Collection:
    """The runs in the folders, which are sweeps or runs themselves.

    Raises:
        RecordError: a folder that is not there or holds no run, or a damaged `sweep.json`.
    """
    warnings: list[str] = []
    finished: list[Run] = []
    begun: list[Run] = []
    absent: dict[Path, Absent] = {}
    sweeps = {folder: _sweep(folder) for folder in map(Path, folders)}
    jobs = {
        path: job for folder, sweep in sweeps.items() for path, job in _jobs(folder, sweep).items()
    }
    for path, job in jobs.items():
        folder = RunFolder(path)
        state = folder.state
        try:
            run = _read(folder, finished=state == "done") or _asked(folder, job)
        except RecordError as error:
            warnings.append(f"{error}; left out")
            continue
        if state == "done" and run is not None:
            finished.append(run)
            warnings += [f"{file}: its last line was cut short; ignored" for file in folder.torn]
        else:
            begun += [run] if run is not None else []
            absent[path] = Absent(path.name, job.get("overrides", ""), state, folder.failure)
    named = _named([*finished, *begun])
    done = _without_copies(named[: len(finished)], warnings)
    runs, others = (_readable(found, warnings) for found in choose(done))
    places = {run.folder.path: run for run in named[len(finished) :]}
    env_names = {run.problem.dataset: run.facts["env_names"] for run in named if run.results}
    return Collection(
        folders=[Path(folder) for folder in folders],
        runs=sorted(runs, key=order),
        absent=[_placed(entry, places.get(path), env_names) for path, entry in absent.items()],
        warnings=[*warnings, *_different_data(done)],
        others=sorted(others, key=order),
        commands={folder: sweep["commands"] for folder, sweep in sweeps.items() if sweep},
    )


def _sweep(folder: Path) -> dict[str, Any]:
    """`sweep.json` of a folder; empty if it has none."""
    file = folder / "sweep.json"
    if not file.exists():
        return {}
    try:
        sweep = json.loads(file.read_text(encoding="utf-8"))
        jobs, commands = dict(sweep["jobs"]), list(map(str, sweep.get("commands", [])))
        for name, job in jobs.items():
            if job.get("config"):
                check_config(f"{file}, {name}", job["config"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RecordError(
            f"{file}: expected the jobs of a sweep, found damage; start the sweep again"
        ) from None
    return {"jobs": jobs, "commands": commands}


def _jobs(folder: Path, sweep: Mapping[str, Any]) -> dict[Path, Job]:
    """The run folders in a folder, or itself, and those that its sweep asks for."""
    if not folder.is_dir():
        raise RecordError(f"{folder}: expected the folder of a sweep or a run, found no folder")
    if (folder / "run.json").exists():
        return {folder: {}}
    asked: Mapping[str, Job] = sweep.get("jobs", {})
    found = {
        file.parent.name for kind in ("run.json", "failed.txt") for file in folder.glob(f"*/{kind}")
    }
    if not found and not asked:
        raise RecordError(
            f"{folder}: expected a sweep or a run, found no run.json in it or in its folders; "
            "give outputs/<name> or outputs/<name>/<run>"
        )
    return {folder / name: asked.get(name, {}) for name in sorted(found | asked.keys())}


def _read(folder: RunFolder, finished: bool) -> Run | None:
    """The run, if it has begun; without results unless it is finished."""
    if not finished and not (folder.path / "run.json").exists():
        return None
    facts = folder.read_run()
    check_facts(folder, facts)
    results = folder.read("results") if finished else []
    if finished and not (results and facts["test_envs"]):
        raise RecordError(f"{folder.path}: expected results on a test environment, found none")
    check_results(folder, facts, results)
    return Run(folder, facts, results)


def _asked(folder: RunFolder, job: Job) -> Run | None:
    """A run that has not begun, as far as the configuration of its job tells it."""
    config = job.get("config")
    if not config:
        return None
    selection = rule_of(config)
    facts = {
        "dataset": config.get("data.name", ""),
        "protocol": config.get("protocol.name", ""),
        "selection": selection,
        "test_envs": [0] if on_sets(selection) else config.get("data.test_envs", []),
        **{key: config.get(key, 0) for key in ("seed", "trial_seed", "hparams_seed")},
        "config": config,
    }
    return Run(folder, facts, [])


def _named(runs: Sequence[Run]) -> list[Run]:
    """The runs with the names of their settings."""
    positions: defaultdict[Problem, list[int]] = defaultdict(list)
    for position, run in enumerate(runs):
        positions[run.problem].append(position)
    named = list(runs)
    for members in positions.values():
        configs = [runs[position].config for position in members]
        names = name_settings([short_name(runs[position]) for position in members], configs)
        for position, name in zip(members, names, strict=True):
            named[position] = replace(runs[position], setting=name)
    return named


def _without_copies(runs: Iterable[Run], warnings: list[str]) -> list[Run]:
    first: dict[object, Run] = {}
    repeats = []
    for run in runs:
        search = (run.facts["hparams_seed"], json.dumps(run.searched))
        key = (run.problem, run.setting, run.environment, run.repetition, search)
        if first.setdefault(key, run) is not run:
            repeats.append(f"{run.folder.path}: repeats {first[key].folder.path}; left out")
    if len(repeats) > 1:
        repeats = [f"{len(repeats)} runs repeat others, the first is {repeats[0]}"]
    warnings += repeats
    return list(first.values())


def _readable(runs: Iterable[Run], warnings: list[str]) -> list[Run]:
    """The runs whose routing and events are sound."""
    sound = []
    for run in runs:
        try:
            check_routing(run)
            sound.append(run)
        except RecordError as error:
            warnings.append(f"{error}; left out")
    return sound


def _placed(entry: Absent, run: Run | None, env_names: Mapping[str, list[str]]) -> Absent:
    """An absent run with the place it will have; environments are named as in finished runs."""
    if run is None:
        return entry
    names = env_names.get(run.problem.dataset, [])
    tests = [index for index in run.facts["test_envs"] if index < len(names)]
    return replace(
        entry,
        problem=run.problem,
        setting=run.setting,
        environment="+".join(names[index] for index in tests),
        repetition=run.repetition,
    )


def _different_data(runs: Iterable[Run]) -> list[str]:
    """Repetitions of one problem that did not see the same data, with the hashes that differ."""
    hashes: defaultdict[tuple[Problem, Repetition], set[str]] = defaultdict(set)
    for run in runs:
        hashes[run.problem, run.repetition].add(str(run.facts.get("data_hash", "unknown")))
    return [
        f"{problem.dataset}, seed {seed}, trial seed {trial}: runs on different data "
        f"({', '.join(sorted(found))}) are compared; do not trust their differences"
        for (problem, (seed, trial)), found in hashes.items()
        if len(found) > 1
    ]
