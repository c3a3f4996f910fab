"""What settings cost, by formula from their records: parameters, FLOPs, and the whole search.

The paper's promise is to save a search, so the bill is the search's: everything the grid was
trained for, against the runs that adapted by themselves.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dynmoe.metrics.efficiency import activated, exported, flops, total
from dynmoe.records import Record, RecordError, stretches
from dynmoe.report.run import Problem, Run, in_words
from dynmoe.report.runs import Collection

# What measured hours depend on besides the configuration.
MACHINE = ("machine", "device", "threads")


@dataclass(frozen=True)
class ModelCost:
    """Of the models that are reported, mean over a setting's runs. NaN: not recorded."""

    runs: int
    total: float
    """Parameters in training, empty slots included."""
    exported: float
    """Parameters of living experts and the rest."""
    activated: float
    """Parameters per token of what is reported on."""
    flops: float
    """Of the forward pass of one sample of it."""
    experts: float
    """Living, mean over MoE layers; NaN for dense."""
    mean_k: float
    """Experts per token of it, mean over MoE layers; NaN for dense."""


@dataclass(frozen=True)
class Bill:
    """What it took to train some runs. NaN: not recorded."""

    runs: int
    flops: float
    recorded: float
    """Hours of training and evaluation. Runs side by side on one machine slow one another."""
    measured: float
    """Hours of training alone, at the setting's step time that was measured in turns."""


@dataclass(frozen=True)
class SearchCost:
    """The grid's bill beside an adaptive setting's, for the same environments and repetitions."""

    problem: Problem
    setting: str
    grid: Bill
    own: Bill
    grid_settings: int
    machines: tuple[str, ...]
    """Facts that differ between the runs' machines. If there are any, recorded hours are not
    compared."""


def model_costs(runs: Iterable[Run]) -> dict[str, ModelCost]:
    """Of every setting of one problem, in order."""
    by_setting: defaultdict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_setting[run.setting].append(run)
    return {setting: _mean_cost(members) for setting, members in by_setting.items()}


def search_cost(
    collection: Collection, problem: Problem, setting: str, step_ms: Mapping[str, float]
) -> SearchCost:
    """Every run of the grid, lost draws included, against every run of an adaptive setting.

    Counted are environments and repetitions that the adaptive setting has. `step_ms`: milliseconds
    of a training step of each setting that was measured.
    """
    runs = [run for run in [*collection.runs, *collection.others] if run.problem == problem]
    own = [run for run in runs if run.setting == setting]
    places = {(run.environment, run.repetition) for run in own}
    grid = [
        run for run in runs if run.kind == "fixed" and (run.environment, run.repetition) in places
    ]
    return SearchCost(
        problem,
        setting,
        _bill(grid, step_ms),
        _bill(own, step_ms),
        len({run.setting for run in grid}),
        different_facts([run.facts for run in (*grid, *own)], MACHINE),
    )


def different_facts(facts: Sequence[Record], keys: Iterable[str]) -> tuple[str, ...]:
    """`key (value, value)` of each fact that is not the same everywhere."""
    found = {key: dict.fromkeys(in_words(fact.get(key)) for fact in facts) for key in keys}
    return tuple(f"{key} ({'; '.join(values)})" for key, values in found.items() if len(values) > 1)


def _mean_cost(runs: Sequence[Run]) -> ModelCost:
    columns = np.array([_model_cost(run) for run in runs], dtype=float).T
    return ModelCost(len(runs), *(float(np.mean(column)) for column in columns))


def _model_cost(run: Run) -> tuple[float, ...]:
    """`ModelCost` of one run, without `runs`."""
    costs = run.facts.get("costs")
    if costs is None:
        return (math.nan,) * 6
    lines = (line for line in run.routing_at_outcome if line["source"] in run.tested)
    experts, mean_k = _routed(lines)
    names = list(costs["slots"])
    if not experts.keys() >= set(names):
        return (total(costs), *(math.nan,) * 5)
    forward = flops(costs, experts, mean_k)
    return (
        total(costs),
        exported(costs, experts),
        activated(costs, experts, mean_k),
        math.nan if forward is None else forward,
        float(np.mean([experts[name] for name in names])) if names else math.nan,
        float(np.mean([mean_k[name] for name in names])) if names else math.nan,
    )


def _routed(lines: Iterable[Record]) -> tuple[dict[str, int], dict[str, float]]:
    """Living experts and mean k by layer; k over all tokens of the lines."""
    by_layer: defaultdict[str, list[Record]] = defaultdict(list)
    for line in lines:
        by_layer[line["layer"]].append(line)
    tokens = {name: sum(line["tokens"] for line in found) for name, found in by_layer.items()}
    return (
        {name: len(found[-1]["slots"]) for name, found in by_layer.items()},
        {
            name: sum(line["mean_k"] * line["tokens"] for line in found) / tokens[name]
            for name, found in by_layer.items()
            if tokens[name]
        },
    )


def _bill(runs: Sequence[Run], step_ms: Mapping[str, float]) -> Bill:
    return Bill(
        len(runs),
        sum(_training_flops(run) for run in runs),
        sum(_hours(run) for run in runs),
        sum(_steps(run) * step_ms.get(run.setting, math.nan) for run in runs) / 3.6e6,
    )


def _training_flops(run: Run) -> float:
    """3 x the forward pass x samples, with the experts and the k of each recorded window.

    Not known of LoRA runs, whose backward pass leaves out the products of frozen weights.
    """
    costs = run.facts.get("costs")
    if run.has_lora or costs is None or costs["flops"] is None:
        return math.nan
    # A fixed mixture routes the same at every step; reading one step saves most of the time.
    lines = run.routing if run.kind == "adaptive" else run.routing_at_outcome
    windows: defaultdict[int, list[Record]] = defaultdict(list)
    for line in lines:
        if line["source"] == "train":
            windows[line["step"]].append(line)
    at_outcome = windows[run.outcome.step]
    forward = 0.0
    for steps, record in stretches(run.results):
        experts, mean_k = _routed(windows.get(record["step"], at_outcome))
        if not mean_k.keys() >= costs["slots"].keys():
            return math.nan
        forward += steps * (flops(costs, experts, mean_k) or math.nan)
    return 3 * forward * _samples_per_step(run.facts)


def _samples_per_step(facts: Record) -> int:
    """Where it is not recorded, DomainBed's rule: a batch for each training environment."""
    training = len(facts["env_names"]) - len(facts["test_envs"])
    return int(facts.get("samples_per_step", facts["batch_size"] * training))


def _steps(run: Run) -> int:
    """Those taken: patience may end a run before its planned steps."""
    return int(run.results[-1]["step"]) + 1


def _hours(run: Run) -> float:
    """Training and evaluation, as recorded; NaN where a record lacks its time."""
    seconds = sum(
        steps * record.get("step_time", math.nan) + record.get("eval_time", math.nan)
        for steps, record in stretches(run.results)
    )
    return seconds / 3600


# Measured times of settings: the `timing.json` files that `dynmoe-bench step --runs` writes.
#
# Times of different machines, settings or workloads are refused, not compared.

Mode = Literal["train", "inference"]
Range = tuple[float, float]

# What a file of `dynmoe-bench` holds, and each row of `timing.json`.
PARTS = {"command": str, "machine": dict, "settings": dict, "workload": dict, "rows": list}
ROW = {
    *("run", "mode", "median_ms", "quartiles_ms", "samples_per_s", "samples_per_s_quartiles"),
    *("peak_bytes", "contaminated", "rounds"),
}


@dataclass(frozen=True)
class Timing:
    """One setting in one mode. Of several measured runs: mean of medians, widest quartiles."""

    milliseconds: float
    """Of one training step, or one forward pass of a batch."""
    quartiles: Range
    samples_per_second: float
    samples_quartiles: Range
    peak_bytes: float | None
    contaminated: bool
    """Other processes were busy during more than half of the samples."""


@dataclass(frozen=True)
class Timings:
    by_setting: Mapping[tuple[str, Mode], Timing]
    conditions: str
    """Machine, settings and workload; empty without a measurement."""
    refused: str
    """Why the times are not compared; empty if they are."""
    commands: tuple[str, ...] = ()
    """Those that measured."""

    @property
    def step_ms(self) -> dict[str, float]:
        """Milliseconds of a training step, by setting."""
        return {
            setting: timing.milliseconds
            for (setting, mode), timing in self.by_setting.items()
            if mode == "train"
        }


def read_timings(collection: Collection) -> dict[Problem, Timings]:
    """The times of every problem's settings.

    Raises:
        RecordError: a damaged `timing.json`.
    """
    files = dict.fromkeys(_files(collection))
    contents = {file: read_measured(file, ROW, "step") for file in files}
    return {problem: _timings(collection.of(problem), contents) for problem in collection.problems}


def _timings(runs: Iterable[Run], contents: Mapping[Path, dict[str, Any]]) -> Timings:
    settings = {run.folder.path.resolve(): run.setting for run in runs}
    rows: defaultdict[tuple[str, Mode], list[Mapping[str, Any]]] = defaultdict(list)
    circumstances, commands = [], []
    for file, content in contents.items():
        own = [
            (settings[path], row)
            for row in content["rows"]
            for folder in (file.parent, file.parent.parent)  # of a sweep, or of the run itself
            if (path := (folder / row["run"]).resolve()) in settings
        ]
        for setting, row in own:
            rows[setting, row["mode"]].append(row)
        if own:
            commands.append(content["command"])
            circumstances.append(
                {
                    f"{part}.{key}": value
                    for part in ("machine", "settings", "workload")
                    for key, value in content[part].items()
                }
            )
    keys = dict.fromkeys(key for facts in circumstances for key in facts)
    different = different_facts(circumstances, keys)
    if different:
        refused = f"measured under different conditions: {', '.join(different)}"
        return Timings({}, "", refused, tuple(commands))
    conditions = ", ".join(
        f"{key.split('.', 1)[1]} {value}"
        for facts in circumstances[:1]
        for key, value in facts.items()
    )
    by_setting = {key: _timing(found) for key, found in rows.items()}
    return Timings(by_setting, conditions, "", tuple(commands))


def _files(collection: Collection) -> Iterable[Path]:
    """Beside the sweeps' run folders, in the order the folders were given."""
    for folder in collection.folders:
        for place in (folder, folder.parent):
            if (place / "timing.json").exists():
                yield (place / "timing.json").resolve()
                break


def read_measured(file: Path, row: Set[str], command: str) -> dict[str, Any]:
    """A file that `dynmoe-bench <command> --runs` wrote; each of its rows has the keys `row`.

    Raises:
        RecordError: it is something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if _is_whole(content, row):
        return content
    raise RecordError(
        f"{file}: expected what `dynmoe-bench {command} --runs {file.parent}` writes, found "
        "something else; measure again, or delete the file"
    )


def _is_whole(content: Any, row: Set[str]) -> bool:
    return (
        isinstance(content, dict)
        and all(isinstance(content.get(part), kind) for part, kind in PARTS.items())
        and all(isinstance(each, dict) and each.keys() >= row for each in content["rows"])
    )


def _timing(rows: list[Mapping[str, Any]]) -> Timing:
    peaks = [row["peak_bytes"] for row in rows if row["peak_bytes"] is not None]
    return Timing(
        float(np.mean([row["median_ms"] for row in rows])),
        _widest(row["quartiles_ms"] for row in rows),
        float(np.mean([row["samples_per_s"] for row in rows])),
        _widest(row["samples_per_s_quartiles"] for row in rows),
        float(max(peaks)) if peaks else None,
        any(2 * row["contaminated"] > row["rounds"] for row in rows),
    )


def _widest(ranges: Iterable[Range]) -> Range:
    low, high = zip(*ranges, strict=True)
    return min(low), max(high)


# How fast trained models answer: the `generation.json` of `dynmoe-bench generate --runs`.

FILE = "generation.json"


@dataclass(frozen=True)
class Generation:
    """One setting. All of a table answered the same questions with equally many new tokens."""

    run: str
    """The name of the run's folder."""
    problem: str
    """`dataset, protocol, selection`"""
    setting: str
    """Its name when it was measured; that of a report's settings is found by `run`."""
    batch: int
    """Questions answered at once."""
    new_tokens: int
    """Of each answer."""
    prompt_ms: float
    """Of a batch of questions up to the first new token."""
    prompt_quartiles_ms: Range
    token_ms: float
    """Of each further token of a batch's answers."""
    tokens_per_s: float
    """New tokens of all answers, of the whole time."""
    tokens_per_s_quartiles: Range
    reference: str
    """The setting that `ratio` is over: the dense one if there is one."""
    ratio: float
    """Speed over the reference's in the same rounds, the median."""
    ratio_quartiles: Range
    mean_k: Mapping[str, float]
    """Experts per token of prompt, image and answer, the mean over MoE layers; empty if dense."""
    peak_bytes: int
    """Beyond the weights."""
    rounds: int
    contaminated: int
    """Rounds during which other processes were busy."""


@dataclass(frozen=True)
class Generations:
    rows: tuple[Generation, ...] = ()
    conditions: str = ""
    """Machine, settings and workload."""
    command: str = ""
    """The one that measured."""


def generation_rows(folder: Path) -> Generations:
    """What was measured of the runs in `folder`, a sweep or one of its runs; else no rows.

    Rows are in the order of the settings, the reference of each problem first.

    Raises:
        RecordError: a damaged `generation.json`.
    """
    names = [field.name for field in fields(Generation)]
    for place in (folder, folder.parent):
        if (place / FILE).exists():
            content = read_measured(place / FILE, set(names), "generate")
            is_run = place != folder
            rows = tuple(
                Generation(**{name: _value(row[name]) for name in names})
                for row in content["rows"]
                if not is_run or row["run"] == folder.name
            )
            return Generations(rows, _conditions(content), content["command"])
    return Generations()


def _conditions(content: Mapping[str, Any]) -> str:
    parts = (content[part] for part in ("machine", "settings", "workload"))
    return ", ".join(f"{key} {value}" for facts in parts for key, value in facts.items())


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
