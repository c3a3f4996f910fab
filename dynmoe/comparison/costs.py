"""What settings cost, by formula from their records: parameters, FLOPs, and the whole search.

The paper's promise is to save a search, so the bill is the search's: everything the grid was
trained for, against the runs that adapted by themselves.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dynmoe.comparison.conditions import in_words
from dynmoe.comparison.run import Problem, Run
from dynmoe.comparison.runs import Collection
from dynmoe.metrics.efficiency import activated, exported, flops, total
from dynmoe.records import Record, stretches

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
    sources = {f"env{index}" for index in run.facts["test_envs"]}
    experts, mean_k = _routed(line for line in run.routing_at_outcome if line["source"] in sources)
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
