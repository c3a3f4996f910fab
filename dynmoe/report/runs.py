"""The runs below folders: which finished, which are absent, and what their settings are called.

A run that cannot be used does not stop the report of the others: a warning names it.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dynmoe.records import Record, RecordError, RunFolder
from dynmoe.report.record_checks import (
    check_config,
    check_facts,
    check_losses,
    check_results,
    check_routing,
)
from dynmoe.report.run import (
    NOT_FINITE,
    Problem,
    Repetition,
    Run,
    counted,
    different_facts,
    order,
)
from dynmoe.report.setting_names import name_settings
from dynmoe.report.words import block_name
from dynmoe.selection import best_of_sweep, by_loss, rule_of

Job = Mapping[str, Any]
"""A job of `sweep.json`: its overrides, and the configuration that they make."""


@dataclass(frozen=True)
class Absent:
    """A run that a sweep asks for and that has no result yet."""

    name: str
    """The name of its folder."""
    overrides: str
    state: str
    """missing, stopped, running or failed; of a finished run diverged, short or without a score"""
    why: str
    """The first line of its error, or what a finished run lacks; empty if there is no reason."""
    problem: Problem | None = None
    """This and the following fields: as far as `run.json` or `sweep.json` tell them."""
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
    """The commands that made the runs of each sweep folder, where `sweep.json` has them."""

    @property
    def problems(self) -> list[Problem]:
        return list(dict.fromkeys(run.problem for run in self.runs))

    def of(self, problem: Problem) -> list[Run]:
        return [run for run in self.runs if run.problem == problem]


def read_runs(folders: Sequence[Path], by_loss: bool = False) -> Collection:
    """The runs in the folders, which are sweeps or runs themselves.

    `by_loss`: they are selected and reported by their mean loss in the place of their score.

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
            run = _read(folder, state == "done", by_loss) or _asked(folder, job)
        except RecordError as error:
            warnings.append(f"{error}; left out")
            continue
        fault = _fault(run) if state == "done" and run is not None else None
        if state == "done" and run is not None and fault is None:
            finished.append(run)
            warnings += [f"{file}: its last line was cut short; ignored" for file in folder.torn]
        else:
            begun += [run] if run is not None else []
            found = fault or (state, folder.failure)
            absent[path] = Absent(path.name, job.get("overrides", ""), *found)
    named = name_settings([*finished, *begun])
    done = _without_pairs(named[: len(finished)], warnings)
    done = _without_copies(done, warnings)
    runs, others = (_readable(found, warnings) for found in choose(done))
    places = {run.folder.path: run for run in named[len(finished) :]}
    env_names = {run.problem.dataset: run.facts["env_names"] for run in named if run.results}
    return Collection(
        folders=[Path(folder) for folder in folders],
        runs=sorted(runs, key=order),
        absent=[_placed(entry, places.get(path), env_names) for path, entry in absent.items()],
        warnings=[*warnings, *_thinned(runs), *_different_data(done), *different_conditions(runs)],
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
        jobs, commands = dict(sweep["jobs"]), list(map(str, sweep["commands"]))
        for name, job in jobs.items():
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


def _read(folder: RunFolder, finished: bool, is_by_loss: bool) -> Run | None:
    """The run, if it has begun; without results unless it is finished."""
    if not finished and not (folder.path / "run.json").exists():
        return None
    facts = folder.read_run()
    check_facts(folder, facts)
    results = folder.read("results") if finished else []
    if finished and not (results and facts["test_envs"]):
        remedy = "leave the run out" if results else "run it again with overwrite=true"
        raise RecordError(
            f"{folder.path}: expected results on a test environment, found none; {remedy}"
        )
    check_results(folder, facts, results)
    if is_by_loss:
        facts = by_loss(facts)
        check_losses(folder, facts, results)
    return Run(folder, facts, results)


def _asked(folder: RunFolder, job: Job) -> Run | None:
    """A run that has not begun, with the facts that the configuration of its job tells."""
    config = job.get("config")
    if not config:
        return None
    facts = {
        "dataset": config.get("data.name", ""),
        "protocol": config.get("protocol.name", ""),
        "selection": rule_of(config),
        "test_envs": config.get("data.test_envs", [0]),
        **{key: config.get(key, 0) for key in ("seed", "trial_seed", "hparams_seed")},
        "config": config,
    }
    return Run(folder, facts, [])


def _fault(run: Run) -> tuple[str, str] | None:
    """Return why a finished run has no result that a mean may contain: its state, and a reason."""
    if run.nonfinite_step is not None:
        return "diverged", NOT_FINITE.format(run.nonfinite_step)
    planned = run.facts["steps"]
    if run.steps_taken < planned and run.facts.get("patience") is None:
        return "short", f"{run.steps_taken} of {planned} steps are recorded"
    if not math.isfinite(run.outcome.accuracy):
        sets = ", ".join(run.facts["reported"]["sets"])
        return "without a score", f"{run.words.measure} on {sets} is not a number"
    return None


def _without_pairs(runs: Iterable[Run], warnings: list[str]) -> list[Run]:
    """The runs but those that hold out several environments beside others that hold out one.

    In DomainBed they only help to select, by leave-one-domain-out validation.
    """
    found = list(runs)
    single = {run.problem for run in found if len(run.facts["test_envs"]) == 1}
    kept = [
        run
        for run in found
        if len(run.facts["test_envs"]) == 1
        or run.problem not in single
        or run.problem.selection == "leave_one_domain_out"
    ]
    if len(kept) < len(found):
        warnings.append(
            f"{counted(len(found) - len(kept), 'run')} with several test environments left out: "
            "such runs serve protocol.selection=leave_one_domain_out alone"
        )
    return kept


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


def _thinned(runs: Sequence[Run]) -> Iterator[str]:
    """Runs whose routing of sets was not recorded at the step that is reported."""
    found = [
        run
        for run in runs
        if run.layers and {line["source"] for line in run.routing_at_outcome} == {"train"}
    ]
    if found:
        yield (
            f"{counted(len(found), 'run')} with no k and no costs, the first is "
            f"{found[0].folder.path}: task.routing_every > 1 left the routing of sets out at step "
            f"{found[0].outcome.step}, which is reported. Train with task.routing_every=1 for them"
        )


def _placed(entry: Absent, run: Run | None, env_names: Mapping[str, list[str]]) -> Absent:
    """An absent run with the place it will have; environments are named as in finished runs."""
    if run is None:
        return entry
    names = env_names.get(run.problem.dataset, [])
    # Names stand there only where the folders of the data were not at hand.
    tests = [i for i in run.facts["test_envs"] if isinstance(i, int) and i < len(names)]
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
        hashes[run.problem, run.repetition].add(run.facts["data_hash"])
    return [
        f"{problem.dataset}, seed {seed}, trial seed {trial}: runs on different data "
        f"({', '.join(sorted(found))}) are compared; do not trust their differences"
        for (problem, (seed, trial)), found in hashes.items()
        if len(found) > 1
    ]


def different_conditions(runs: Sequence[Run]) -> list[str]:
    """Circumstances in which the compared runs of a problem differ and that can change results."""
    found = []
    for problem in dict.fromkeys(run.problem for run in runs):
        members = [run for run in runs if run.problem == problem]
        facts = [
            {key: run.facts.get(key) for key in ("device", "threads")}
            | run.facts["runtime"]
            | run.facts["versions"]
            for run in members
        ]
        different = different_facts(facts, dict.fromkeys(key for each in facts for key in each))
        mixtures = [run for run in members if run.facts["start_experts"]]
        layers = [
            {"MoE layers": " ".join(map(block_name, run.facts["start_experts"]))}
            for run in mixtures
        ]
        different += different_facts(layers, ["MoE layers"])
        if different:
            found.append(
                f"{problem.dataset}: compared runs differ in {', '.join(different)}; do not trust "
                "small differences"
            )
        tokens = different_tokens([run.facts for run in members])
        found += [f"{problem.dataset}: {warning}" for warning in tokens]
    return found


def different_tokens(facts: Sequence[Record]) -> list[str]:
    """Warnings of language models whose losses are means over other tokens, or over tokens that
    have other lengths of text before them."""
    facts = [each for each in facts if "tokenizer" in each]
    # A trial seed deals other documents to training, and so to a vocabulary that is learnt.
    trials: defaultdict[int, list[Record]] = defaultdict(list)
    for each in facts:
        trials[each["trial_seed"]].append(each)
    keys = ("tokenizer", "vocabulary")
    by_trial = (different_facts(members, keys) for members in trials.values())
    lengths = different_facts([each["config"] for each in facts], ["data.length"])
    warnings = []
    if tokenizers := next(filter(None, by_trial), ()):
        warnings.append(
            f"compared runs differ in {', '.join(tokenizers)}; loss, perplexity and accuracy are "
            "of other tokens, bits per byte compare"
        )
    if lengths:
        warnings.append(
            f"compared runs differ in {lengths[0]}; tokens of longer blocks have more text before "
            "them, in bits per byte too"
        )
    return warnings


# The runs that represent their repetitions, and are reported.
#
# A search belongs to its method, whatever was searched over: of its runs those with the best
# validation are reported.


def choose(runs: Iterable[Run]) -> tuple[list[Run], list[Run]]:
    """The runs that represent their repetitions, and the others.

    The best of several draws of hyper-parameters by validation is taken, as in DomainBed, and one
    of the values that a protocol searches over, for all repetitions of a setting.
    """
    runs = list(runs)
    trials: defaultdict[object, list[Run]] = defaultdict(list)
    for run in _with_best_values(sorted(runs, key=order)):
        trials[run.problem, run.setting, run.repetition].append(run)
    standing = [run for trial in trials.values() for run in _standing(trial)]
    paths = {run.folder.path for run in standing}
    return standing, [run for run in runs if run.folder.path not in paths]


def _with_best_values(runs: Iterable[Run]) -> Iterable[Run]:
    """The runs of each setting with the searched values of the best mean validation.

    Values that lack repetitions which others have are not taken: their mean is of other runs.
    """
    searches: defaultdict[object, defaultdict[str, list[Run]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for run in runs:
        searches[run.problem, run.setting][json.dumps(run.searched)].append(run)
    for by_values in searches.values():
        most = max(map(len, by_values.values()))
        complete = [members for members in by_values.values() if len(members) == most]
        yield from complete[0] if len(complete) == 1 else max(complete, key=_mean_validation)


def _mean_validation(runs: Iterable[Run]) -> float:
    """More is better."""
    mean = float(np.mean([run.scale.better * run.outcome.validation for run in runs]))
    return -math.inf if math.isnan(mean) else mean


def _standing(trial: Sequence[Run]) -> Iterable[Run]:
    """For each test environment of one setting's repetition, the run that represents it.

    The last of equally good draws is taken, as in DomainBed.
    """
    finds_pairs = trial[0].problem.selection == "leave_one_domain_out"
    draws: defaultdict[tuple[int, ...], list[Run]] = defaultdict(list)
    for run in trial:
        draws[tuple(run.facts["test_envs"])].append(run)
    for tests, candidates in draws.items():
        if not finds_pairs:
            yield max(reversed(candidates), key=lambda run: _mean_validation([run]))
        elif len(tests) == 1:
            holding_out = (run.results for run in trial if tests[0] in run.facts["test_envs"])
            records = chain.from_iterable(holding_out)
            choice = best_of_sweep(records, "leave_one_domain_out", tests[0])
            if choice is None:  # without its pairs: the last step is shown
                yield candidates[0]
                continue
            draw = choice.record["args"]["hparams_seed"]
            (best,) = (run for run in candidates if run.facts["hparams_seed"] == draw)
            yield replace(best, chosen=dict(choice.record))
