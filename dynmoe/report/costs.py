"""Costs of settings: parameters, FLOPs and the whole search by formula, and measured speed.

The paper's promise is to save a search, so the bill is the search's: everything the grid was
trained for, against the runs that adapted by themselves.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dynmoe.metrics.efficiency import activated, exported, flops, total
from dynmoe.records import Record, RecordError, stretches
from dynmoe.report.run import Problem, Run, by_setting, different_facts
from dynmoe.report.runs import Collection

# Facts that measured hours depend on besides the configuration.
MACHINE = ("machine", "device", "threads")


@dataclass(frozen=True)
class ModelCost:
    """Size of the models that are reported, mean over a setting's runs. NaN: not recorded."""

    runs: int
    total: float
    """Parameters in training, empty slots included."""
    exported: float
    """Parameters of living experts and the rest."""
    activated: float
    """Parameters per token of what is reported on."""
    flops: float
    """FLOPs of the forward pass of one sample of it."""
    experts: float
    """Living experts, mean over MoE layers; NaN for dense."""
    mean_k: float
    """Experts per token of it, mean over MoE layers; NaN for dense."""


@dataclass(frozen=True)
class Bill:
    """Costs of training some runs. NaN: not recorded."""

    runs: int
    flops: float
    recorded: float
    """Hours of training and evaluation. Runs side by side on one machine slow one another."""
    measured: float
    """Hours of training alone, at the setting's measured step time."""


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


def model_costs(runs: Sequence[Run]) -> dict[str, ModelCost]:
    """Return the costs of every setting of one problem, in order."""
    return {
        setting: ModelCost(len(members), *np.mean(list(map(_model_cost, members)), axis=0).tolist())
        for setting, members in by_setting(runs).items()
    }


def search_cost(
    collection: Collection, problem: Problem, setting: str, step_ms: Mapping[str, float]
) -> SearchCost:
    """Compare every run of the grid, lost draws included, with every run of an adaptive setting.

    It counts the environments and repetitions that the adaptive setting has. `step_ms`:
    milliseconds of a training step of each setting that was measured.
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


def _model_cost(run: Run) -> tuple[float, ...]:
    """`ModelCost` of one run, without `runs`."""
    costs, layers = run.facts["costs"], run.layers
    experts = {layer.name: layer.experts for layer in layers}
    mean_k = {layer.name: layer.k_test for layer in layers}
    if any(map(math.isnan, mean_k.values())):  # no routing was recorded
        return (total(costs), *(math.nan,) * 5)
    forward = flops(costs, experts, mean_k)
    return (
        total(costs),
        exported(costs, experts),
        activated(costs, experts, mean_k),
        math.nan if forward is None else forward,
        float(np.mean(list(experts.values()))) if layers else math.nan,
        float(np.mean(list(mean_k.values()))) if layers else math.nan,
    )


def _bill(runs: Sequence[Run], step_ms: Mapping[str, float]) -> Bill:
    seconds = [
        steps * record["step_time"] + record["eval_time"]
        for run in runs
        for steps, record in stretches(run.results)
    ]
    return Bill(
        len(runs),
        sum(map(_training_flops, runs)),
        sum(seconds) / 3600,
        sum(run.steps_taken * step_ms.get(run.setting, math.nan) for run in runs) / 3.6e6,
    )


def _training_flops(run: Run) -> float:
    """3 x the forward pass x samples, with the experts and the k of each recorded window.

    Not known of runs with LoRA or adapters, whose backward pass leaves out the products of frozen
    weights.
    """
    costs = run.facts["costs"]
    if run.is_mostly_frozen or costs["flops"] is None:
        return math.nan
    # A fixed mixture routes the same at every step; reading one step saves most of the time.
    lines = run.routing_at_outcome if run.kind == "fixed" else run.training_routing
    windows: defaultdict[int, list[Record]] = defaultdict(list)
    for line in lines:
        if line["source"] == "train":
            windows[line["step"]].append(line)
    at_outcome = windows[run.outcome.step]
    forward = 0.0
    for steps, record in stretches(run.results):
        layers = {line["layer"]: line for line in windows.get(record["step"], at_outcome)}
        if not layers.keys() >= costs["slots"].keys():
            return math.nan
        experts = {name: len(line["slots"]) for name, line in layers.items()}
        mean_k = {name: line["mean_k"] for name, line in layers.items()}
        forward += steps * (flops(costs, experts, mean_k) or math.nan)
    return 3 * forward * int(run.facts["samples_per_step"])


# Measurements of `dynmoe-bench`: `timing.json` of `step --runs`, `generation.json` of `generate
# --runs`. Each holds rows, and the circumstances of their measurement. Times of different
# machines, settings or workloads are refused, not compared.

Mode = Literal["train", "inference"]
Range = tuple[float, float]
Measurement = Mapping[str, Any]
"""The content of a file, or one of its rows."""

CONTENT = {"command": str, "machine": dict, "settings": dict, "workload": dict, "rows": list}
TIMING_KEYS = {
    *("run", "mode", "median_ms", "quartiles_ms", "samples_per_s", "samples_per_s_quartiles"),
    *("peak_bytes", "contaminated", "rounds"),
}
GENERATION_KEYS = {
    *("run", "prompt_ms", "prompt_quartiles_ms", "token_ms", "tokens_per_s"),
    *("tokens_per_s_quartiles", "reference", "ratio", "ratio_quartiles", "peak_bytes"),
    *("contaminated", "rounds"),
}


@dataclass(frozen=True)
class Timing:
    """One setting in one mode; several measured runs give a mean of medians, widest quartiles."""

    milliseconds: float
    """One training step, or one forward pass of a batch."""
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
    """The commands that produced the timings."""

    @property
    def step_ms(self) -> dict[str, float]:
        """Milliseconds of a training step, by setting."""
        return {
            setting: timing.milliseconds
            for (setting, mode), timing in self.by_setting.items()
            if mode == "train"
        }


@dataclass(frozen=True)
class Generations:
    """Speed of answering; all rows answered the same questions with equally many new tokens."""

    rows: tuple[Measurement, ...] = ()
    """In the order of the settings, the reference of each problem first; keys as
    `dynmoe.benchmark.results.GenerationRow`."""
    conditions: str = ""
    """Machine, settings and workload."""
    command: str = ""
    """The command that produced them."""


def read_timings(collection: Collection) -> dict[Problem, Timings]:
    """Return the times of every problem's settings.

    Raises:
        RecordError: a damaged `timing.json`.
    """
    files = dict.fromkeys(
        file.resolve() for folder in collection.folders if (file := _beside(folder, "timing.json"))
    )
    contents = {file: _read_measured(file, TIMING_KEYS, "step") for file in files}
    return {problem: _timings(collection.of(problem), contents) for problem in collection.problems}


def generation_rows(folder: Path) -> Generations:
    """Return what was measured of the runs in `folder`, a sweep or one of its runs; else no rows.

    Raises:
        RecordError: a damaged `generation.json`.
    """
    file = _beside(folder, "generation.json")
    if file is None:
        return Generations()
    content = _read_measured(file, GENERATION_KEYS, "generate")
    names = (folder.name,) if file.parent != folder else None
    rows = tuple(row for row in content["rows"] if names is None or row["run"] in names)
    return Generations(rows, _in_words(_circumstances(content)), content["command"])


def _beside(folder: Path, name: str) -> Path | None:
    """Return the file of a sweep's folder, or beside the folder of a run."""
    return next((at / name for at in (folder, folder.parent) if (at / name).exists()), None)


def _read_measured(file: Path, keys: Set[str], command: str) -> Measurement:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if (
        isinstance(content, dict)
        and all(isinstance(content.get(part), kind) for part, kind in CONTENT.items())
        and all(isinstance(row, dict) and row.keys() >= keys for row in content["rows"])
    ):
        return content
    raise RecordError(
        f"{file}: expected what `dynmoe-bench {command} --runs {file.parent}` writes, found "
        "something else; measure again, or delete the file"
    )


def _circumstances(content: Measurement) -> dict[str, Any]:
    """Return the facts that a measurement depends on, `machine.cpu` and so on."""
    return {
        f"{part}.{key}": value
        for part in ("machine", "settings", "workload")
        for key, value in content[part].items()
    }


def _in_words(circumstances: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.split('.', 1)[1]} {value}" for key, value in circumstances.items())


def _timings(runs: Iterable[Run], contents: Mapping[Path, Measurement]) -> Timings:
    settings = {run.folder.path.resolve(): run.setting for run in runs}
    rows: defaultdict[tuple[str, Mode], list[Measurement]] = defaultdict(list)
    used = []
    for file, content in contents.items():
        own = [
            (settings[path], row)
            for row in content["rows"]
            for folder in (file.parent, file.parent.parent)  # of a sweep, or of the run itself
            if (path := (folder / row["run"]).resolve()) in settings
        ]
        for setting, row in own:
            rows[setting, row["mode"]].append(row)
        used += [content] if own else []
    commands = tuple(content["command"] for content in used)
    circumstances = list(map(_circumstances, used))
    different = different_facts(circumstances, dict.fromkeys(k for c in circumstances for k in c))
    if different:
        refused = f"measured under different conditions: {', '.join(different)}"
        return Timings({}, "", refused, commands)
    by_setting = {key: _timing(found) for key, found in rows.items()}
    return Timings(by_setting, "".join(map(_in_words, circumstances[:1])), "", commands)


def _timing(rows: Sequence[Measurement]) -> Timing:
    def widest(key: str) -> Range:
        low, high = zip(*(row[key] for row in rows), strict=True)
        return min(low), max(high)

    peaks = [row["peak_bytes"] for row in rows if row["peak_bytes"] is not None]
    return Timing(
        float(np.mean([row["median_ms"] for row in rows])),
        widest("quartiles_ms"),
        float(np.mean([row["samples_per_s"] for row in rows])),
        widest("samples_per_s_quartiles"),
        float(max(peaks)) if peaks else None,
        any(map(is_contaminated, rows)),
    )


def is_contaminated(row: Measurement) -> bool:
    """Whether other processes were busy during more than half of the rounds."""
    return bool(2 * row["contaminated"] > row["rounds"])
