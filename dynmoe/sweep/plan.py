"""`mode=plan`: every job of a sweep, where it stands, and how long the rest will take."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import fmean

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dynmoe.report.records import Record, RunFolder
from dynmoe.sweep.jobs import Job


def seconds(results: Sequence[Record]) -> float:
    """Training and evaluation so far, by the records."""
    total, before = 0.0, -1
    for record in results:
        total += (record["step"] - before) * record.get("step_time", 0.0)
        total += record.get("eval_time", 0.0)
        before = record["step"]
    return total


def progress(results: Sequence[Record], steps: int) -> float:
    """The share of the run that its last record has seen."""
    return (results[-1]["step"] + 1) / steps if results else 0.0


def render(jobs: Sequence[Job], parallel: int) -> RenderableType:
    """A line for each job, the counts, and the time left with `parallel` jobs at once."""
    table = Table(box=None, pad_edge=False)
    for column in ("job", "state", "steps", "left"):
        table.add_column(column, justify="right" if column in ("steps", "left") else "left")
    left = dict(zip((job.name for job in jobs), seconds_left(jobs), strict=True))
    for job in jobs:
        state, steps = job.state, job.config["task.steps"]
        done = round(steps * progress(job.folder.read("results"), steps))
        time = "" if state == "done" else _time(left[job.name])
        table.add_row(job.label, _state(job.folder), f"{done}/{steps}", time)
    return Group(table, "", *_totals(jobs, list(left.values()), parallel))


def seconds_left(jobs: Sequence[Job]) -> list[float]:
    """Of each job, by the jobs of its setting that have records, else by all; NaN without any."""
    results = [job.folder.read("results") for job in jobs]
    whole: dict[str, list[float]] = {}
    for job, records in zip(jobs, results, strict=True):
        share = progress(records, job.config["task.steps"])
        if share and seconds(records):
            whole.setdefault(_setting(job), []).append(seconds(records) / share)
    overall = [each for times in whole.values() for each in times] or [math.nan]
    return [
        fmean(whole.get(_setting(job), overall))
        * (1 - progress(records, job.config["task.steps"]))
        * (job.state != "done")
        for job, records in zip(jobs, results, strict=True)
    ]


def _setting(job: Job) -> str:
    return " ".join(text for text in job.label.split() if not text.startswith("seed="))


def _state(folder: RunFolder) -> str:
    return f"failed: {folder.failure}" if folder.state == "failed" else folder.state


def _totals(jobs: Sequence[Job], left: Sequence[float], parallel: int) -> Iterator[Text]:
    counts = Counter(job.state for job in jobs)
    listed = ", ".join(f"{count} {state}" for state, count in counts.items())
    yield Text(f"{len(jobs)} jobs: {listed}", style="bold")
    total = sum(left)
    if math.isnan(total):
        yield Text("Time left: unknown until a first evaluation has been recorded.")
    elif total:
        at_once = f", {_time(total / parallel)} with {parallel} at once" if parallel > 1 else ""
        yield Text(f"Time left: about {_time(total)} of work{at_once}.")


def _time(value: float) -> str:
    if math.isnan(value):
        return "?"
    minutes = math.ceil(value / 60)
    return f"{minutes} min" if minutes < 120 else f"{value / 3600:.1f} h"
