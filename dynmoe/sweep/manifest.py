"""`sweep.json`: what a sweep's folder is for, so that no other sweep is ever mixed into it.

A run's folder is named by its configuration, so nothing would be overwritten; but a report over the
folder would show two sweeps as one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynmoe.errors import ConfigError
from dynmoe.report.records import replace_file
from dynmoe.sweep.jobs import Job

FILE = "sweep.json"
Config = Mapping[str, Any]

# More of these are more of the same sweep.
REPETITION = ("seed", "trial_seed", "hparams_seed", "data.test_envs")


def check(folder: Path, sweep: str, base: Config, jobs: Sequence[Job]) -> None:
    """Compare a sweep with the one that the folder was made for.

    `base` is the configuration of its command without what it sweeps. More jobs are welcome: other
    seeds, further settings.

    Raises:
        ConfigError: another sweep, or other values; it names every key that differs.
    """
    known = _read(folder)
    if not known:
        return
    found = []
    if known["sweep"] != sweep:
        found.append(f"sweep: {known['sweep']} there, {sweep} now")
    found += _differences(known["base"], base)
    before = {job["overrides"]: job["config"] for job in known["jobs"].values()}
    for job in jobs:
        if job.label in before:
            found += _differences(before[job.label], job.config)
    if found:
        lines = "\n  ".join(dict.fromkeys(found))
        raise ConfigError(
            f"{folder / FILE}: the folder holds a sweep of another configuration\n  {lines}\n"
            "Give this one a folder of its own, name=FOLDER, or keep the old values."
        )


def write(folder: Path, sweep: str, base: Config, jobs: Sequence[Job]) -> None:
    """Add the jobs to those that are known."""
    known = _read(folder)
    entries = known["jobs"] if known else {}
    entries |= {job.name: {"overrides": job.label, "config": dict(job.config)} for job in jobs}
    content = {"sweep": sweep, "base": dict(base), "jobs": entries}
    replace_file(folder / FILE, json.dumps(content, indent=1) + "\n")


def _read(folder: Path) -> dict[str, Any]:
    file = folder / FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _differences(old: Config, new: Config) -> Iterator[str]:
    # As JSON, which has no tuples.
    plain = json.loads(json.dumps(dict(new), default=str))
    for key in sorted((old.keys() | plain.keys()) - set(REPETITION)):
        if old.get(key, "absent") != plain.get(key, "absent"):
            yield f"{key}: {old.get(key, 'absent')} there, {plain.get(key, 'absent')} now"
