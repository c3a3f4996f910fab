"""The jobs of a sweep, and `sweep.json`, which keeps a second sweep out of its folder.

A run's folder is named by its configuration, so nothing would be overwritten; but a report over the
folder would show two sweeps as one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import DictConfig

from dynmoe.config.identity import flat
from dynmoe.config.sweeps import REPETITION, SweepJob
from dynmoe.errors import ConfigError
from dynmoe.records import LOCKS, RunFolder, State, replace_file

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
            "Give this one a folder of its own, name=FOLDER, or keep the old values."
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
    # As JSON, which has no tuples.
    plain = json.loads(json.dumps(dict(new), default=str))
    for key in sorted((old.keys() | plain.keys()) - set(REPETITION)):
        if old.get(key, "absent") != plain.get(key, "absent"):
            yield f"{key}: {old.get(key, 'absent')} there, {plain.get(key, 'absent')} now"


@dataclass(frozen=True)
class Job:
    overrides: tuple[str, ...]
    """As Hydra launches the job."""
    label: str
    """The overrides that not all jobs share."""
    setting: str
    """The overrides of its setting, without seeds and test environments."""
    folder: RunFolder
    config: Mapping[str, Any]
    """All that can change its result (dynmoe/config/identity.py, `flat`)."""
    steps: int
    """Optimizer steps; -1: counted in epochs, once the run has read its data."""
    eval_every: int | None
    """Optimizer steps; None: an epoch."""

    @classmethod
    def of(cls, cfg: DictConfig, folder: Path, asked: SweepJob) -> Job:
        """The job with the configuration `cfg` and the run folder `folder`."""
        texts = (asked.overrides, asked.label, asked.setting)
        return cls(*texts, RunFolder(folder), flat(cfg), cfg.task.steps, cfg.task.eval_every)

    @property
    def name(self) -> str:
        return self.folder.path.name

    @property
    def state(self) -> State:
        return self.folder.state
