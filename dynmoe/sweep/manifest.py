"""The jobs of a sweep, their progress, and `sweep.json`, which keeps another sweep out of a folder.

A run's folder is named by its configuration, so nothing would be overwritten; but a report over the
folder would show two sweeps as one.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock
from omegaconf import DictConfig

from dynmoe.config.runs import flat
from dynmoe.config.shared import once
from dynmoe.config.sweeps import REPETITION, SweepJob
from dynmoe.errors import ConfigError
from dynmoe.records import LOCKS, Record, RunFolder, State, replace_file, stretches
from dynmoe.selection import DOMAINBED, rule_of

FILE = "sweep.json"
Config = Mapping[str, Any]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other launchers from checking and writing meanwhile."""
    (folder / LOCKS).mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCKS / FILE):
        yield


def check(folder: Path, sweep: str, base: Config, jobs: Sequence[Job]) -> None:
    """Compare a sweep with the one that the folder was made for.

    `base` is the configuration of its command without the swept keys. Further seeds, test
    environments and settings may join.

    Raises:
        ConfigError: another sweep, other values of what all jobs share, or of a setting; it names
            every key that differs. Or a damaged file.
    """
    known = _read(folder)
    if not known:
        return
    found = []
    if known["sweep"] != sweep:
        found.append(f"sweep: {known['sweep']} there, {sweep} now")
    found += _differences(known["base"], base)
    before = {job["setting"]: job["config"] for job in known["jobs"].values()}
    for job in jobs:
        if job.setting in before:
            found += _differences(before[job.setting], job.config)
    if found:
        lines = "\n  ".join(dict.fromkeys(found))
        raise ConfigError(
            f"{folder / FILE}: the folder holds a sweep of another configuration\n  {lines}\n"
            "Give this one another folder, name=FOLDER, or keep the old values."
        )


def record(folder: Path, sweep: str, command: str, base: Config, jobs: Sequence[Job]) -> None:
    """Add the command and its jobs to those that are known."""
    known = _read(folder) or {"commands": [], "jobs": {}}
    entries = {
        job.name: {"overrides": job.label, "setting": job.setting, "config": dict(job.config)}
        for job in jobs
    }
    content = {
        "sweep": sweep,
        "commands": list(dict.fromkeys([*known["commands"], command])),
        "base": dict(base),
        "jobs": known["jobs"] | entries,
    }
    replace_file(folder / FILE, json.dumps(content, indent=1) + "\n")


def _read(folder: Path) -> dict[str, Any]:
    """Empty where there is no file."""
    file = folder / FILE
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        for key, kind in (("sweep", str), ("commands", list), ("base", dict), ("jobs", dict)):
            if not isinstance(content[key], kind):
                raise TypeError(key)
        _ = [(job["setting"], job["config"].keys()) for job in content["jobs"].values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file}: expected what an earlier start of the sweep wrote, found damage "
            f"({type(error).__name__}: {error}). Delete it; the next start writes it anew"
        ) from None
    return content


def _differences(old: Config, new: Config) -> Iterator[str]:
    # In JSON form, which has no tuples.
    plain = json.loads(json.dumps(dict(new), default=str))
    for key in sorted((old.keys() | plain.keys()) - set(REPETITION)):
        if old.get(key, "absent") != plain.get(key, "absent"):
            yield f"{key}: {old.get(key, 'absent')} there, {plain.get(key, 'absent')} now"


@dataclass(frozen=True)
class Job:
    overrides: tuple[str, ...]
    """In the form in which Hydra launches the job."""
    label: str
    """The overrides that not all jobs share."""
    setting: str
    """The overrides of its setting, without seeds and test environments."""
    folder: RunFolder
    config: Mapping[str, Any]
    """All that can change its result (dynmoe/config/runs.py, `flat`)."""
    steps: int
    """Optimizer steps; -1: counted in epochs, once the run has read its data."""
    eval_every: int | None
    """Optimizer steps; None: an epoch."""

    @classmethod
    def of(cls, cfg: DictConfig, folder: Path, asked: SweepJob) -> Job:
        """The job with the configuration `cfg` and the run folder `folder`."""
        texts = (asked.overrides, asked.label, asked.setting)
        length = once(cfg, "length", lambda: (cfg.task.steps, cfg.task.eval_every))
        return cls(*texts, RunFolder(folder), flat(cfg), *length)

    @property
    def name(self) -> str:
        return self.folder.path.name

    @property
    def state(self) -> State:
        return self.folder.state


# `mode=plan`: every job of a sweep, where it stands, and how long the rest will take.

# Keys that determine the number of steps of a run that counts them in epochs.
LENGTH = (
    *("data.name", "data.batch_size", "protocol.holdout_fraction"),
    *("task.epochs", "task.steps", "task.eval_every"),
)


@dataclass(frozen=True)
class Standing:
    """The progress of a job, read from its folder."""

    job: Job
    state: State
    results: Sequence[Record]
    planned: int | None
    """Optimizer steps; None where the data has not told yet how many an epoch has."""
    eval_every: int | None

    @classmethod
    def of(cls, job: Job) -> Standing:
        begun = (job.folder.path / "run.json").exists()
        facts = job.folder.read_run() if begun else {}
        return cls(
            job,
            job.state,
            job.folder.read("results"),
            job.steps if job.steps > 0 else facts.get("steps"),
            job.eval_every or facts.get("eval_every"),
        )

    @property
    def steps(self) -> int:
        """Optimizer steps that the records have seen."""
        return self.results[-1]["step"] + 1 if self.results else 0

    @property
    def length(self) -> tuple[Any, ...]:
        """Jobs with equal values are equally long."""
        return tuple(self.job.config.get(key) for key in LENGTH)

    @property
    def evaluations(self) -> int:
        """Planned evaluations; image runs have one after the first step already."""
        assert self.planned is not None and self.eval_every is not None
        if rule_of(self.job.config) not in DOMAINBED:
            return math.ceil(self.planned / self.eval_every)
        return math.ceil((self.planned - 1) / self.eval_every) + 1


def render(jobs: Sequence[Job], parallel: int) -> str:
    """A line for each job, the counts, and the time left with `parallel` jobs at once."""
    standings = _completed([Standing.of(job) for job in jobs])
    left = seconds_left(standings)
    rows = [("job", "state", "steps", "left", "")]
    for each, seconds in zip(standings, left, strict=True):
        done, failed = each.state == "done", each.state == "failed"
        steps, time = f"{each.steps}/{each.planned or '?'}", "" if done else _time(seconds)
        why = each.job.folder.failure if failed else ""
        rows.append((each.job.label, each.state, steps, time, why))
    # NOTE: rich takes half a second for a thousand lines, and reads [a] in a value as markup.
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{job:{wide[0]}}  {state:{wide[1]}}  {steps:>{wide[2]}}  {time:>{wide[3]}}  {why}".rstrip()
        for job, state, steps, time, why in rows
    ]
    return "\n".join([*lines, "", *_totals(standings, left, parallel)])


def _completed(standings: Sequence[Standing]) -> list[Standing]:
    """A job that has not read its data is as long as an equally long one that has."""
    known = {each.length: each for each in standings if each.planned}
    others = [each if each.planned else known.get(each.length, each) for each in standings]
    return [
        replace(each, planned=other.planned, eval_every=other.eval_every)
        for each, other in zip(standings, others, strict=True)
    ]


def seconds_left(standings: Sequence[Standing]) -> list[float]:
    """Seconds left of each job at the pace of its setting, else of all; NaN without any record."""
    paces: dict[str, list[Mapping[str, float]]] = {}
    for each in standings:
        if each.results:
            paces.setdefault(each.job.setting, []).append(_pace(each.results))
    overall = [pace for found in paces.values() for pace in found]
    return [_left(each, paces.get(each.job.setting, overall)) for each in standings]


def _pace(results: Sequence[Record]) -> Mapping[str, float]:
    """Mean seconds of a step and of an evaluation."""
    trained = sum(steps * record["step_time"] for steps, record in stretches(results))
    return {
        "step": trained / (results[-1]["step"] + 1),
        "evaluation": fmean(record.get("eval_time", 0.0) for record in results),
    }


def _left(standing: Standing, paces: Sequence[Mapping[str, float]]) -> float:
    if standing.state == "done":
        return 0.0
    if not paces or standing.planned is None or standing.eval_every is None:
        return math.nan
    steps = standing.planned - standing.steps
    evaluations = max(0, standing.evaluations - len(standing.results))
    return sum(
        count * fmean(pace[what] for pace in paces)
        for count, what in ((steps, "step"), (evaluations, "evaluation"))
    )


def _totals(standings: Sequence[Standing], left: Sequence[float], parallel: int) -> Iterator[str]:
    counts = Counter(each.state for each in standings)
    listed = ", ".join(f"{count} {state}" for state, count in counts.items())
    yield f"{len(standings)} job{'s' * (len(standings) != 1)}: {listed}"
    total = sum(left)
    if math.isnan(total):
        yield "Time left: unknown until a first evaluation has been recorded."
    elif total:
        soonest = max(total / parallel, *left)  # no job is divided
        at_once = f", {_time(soonest)} with {parallel} at once" if parallel > 1 else ""
        yield f"Time left: about {_time(total)} of work{at_once}."


def _time(value: float) -> str:
    if math.isnan(value):
        return "?"
    minutes = math.ceil(value / 60)
    return f"{minutes} min" if minutes < 120 else f"{value / 3600:.1f} h"
