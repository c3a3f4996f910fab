"""One run in numbers, computed from its records alone: scores, experts, parameters, cost.

Scores, k, and parameters describe one model: the one at the step that the protocol's rule
selects, or the last one where a single run cannot decide (`dynmoe.selection.selected`).
A number that was not recorded is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dynmoe.metrics.efficiency import activated, exported
from dynmoe.records import Record, RecordError, RunFolder, stretches
from dynmoe.report.words import k_by_part, kinds_of, metrics_of
from dynmoe.selection import judged, judging_set, on_sets, selected


@dataclass(frozen=True)
class Environment:
    """Accuracies in [0, 1] on an environment's two splits. Of a test environment neither was
    trained on, and DomainBed reports the in split."""

    name: str
    is_test: bool
    in_accuracy: float
    out_accuracy: float


@dataclass(frozen=True)
class Scores:
    """A run's results on an evaluation set, as shares of 1."""

    name: str
    is_reported: bool
    score: float
    metrics: Mapping[str, float]
    """Whose mean the score is; empty if it is one alone."""
    kinds: Mapping[str, float] = field(default_factory=dict)
    """By kind of question (`question_sets.kinds_of`)."""


@dataclass(frozen=True)
class Layer:
    """One MoE layer: its experts over the run, and its routing in the model at `Summary.step`."""

    name: str
    start: int
    added: int
    removed: int
    end: int
    experts: int
    k_train: float
    k_test: float
    unrouted: float
    """Share of training tokens that chose no expert."""
    k_train_by_part: Mapping[str, float] = field(default_factory=dict)
    """Of image, prompt and answer tokens; empty where they are not told apart."""
    k_test_by_part: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    folder: Path
    run: Record
    """The facts in `run.json`."""
    step: int
    is_selected: bool
    """Whether the rule chose `step`; else it is the last one."""
    last_step: int
    epoch: float
    """At `step`."""
    has_stopped_early: bool
    """Whether patience ended the run before its planned steps."""
    validation: float
    """What the rule judges the model at `step` by."""
    environments: tuple[Environment, ...]
    """Of runs on environments; the others have `scores`."""
    scores: tuple[Scores, ...]
    layers: tuple[Layer, ...]
    total_parameters: int
    """Of living experts only."""
    activated_parameters: float
    """Per token of what is reported on: parameters outside the MoE layers, routers, and k
    experts per MoE layer."""
    loss: float
    """Mean over the last window of training steps."""
    steps_per_second: float
    peak_memory: float
    """GiB, as DomainBed's `mem_gb`."""
    figures: tuple[str, ...]


def summarize(folder: RunFolder) -> Summary:
    """Read a run that has at least one evaluation; else raise RecordError."""
    run, results = folder.read_run(), folder.read("results")
    if not results:
        raise RecordError(
            f"{folder.path}: expected at least one line in results.jsonl, found none; "
            "the run stopped before its first evaluation, start it again"
        )
    chosen = selected(results, run["selection"], run["test_envs"])
    model, last = dict(chosen or results[-1]), results[-1]
    layers = _layers(run, folder, model["step"])
    costs = run.get("costs", {"parameters": run["parameters"]})  # early versions had no costs
    experts = {layer.name: layer.experts for layer in layers}
    k = {layer.name: layer.k_test for layer in layers}
    has_scores = on_sets(run["selection"])
    return Summary(
        folder=folder.path,
        run=run,
        step=model["step"],
        is_selected=chosen is not None,
        last_step=last["step"],
        epoch=model.get("epoch", math.nan),
        has_stopped_early=_has_stopped_early(run, results),
        validation=judged(model, run).validation,
        environments=() if has_scores else _environments(run, model),
        scores=_scores(run, model) if has_scores else (),
        layers=layers,
        total_parameters=exported(costs, experts),
        activated_parameters=activated(costs, experts, k),
        loss=last.get("loss", math.nan),
        steps_per_second=_steps_per_second(results),
        peak_memory=max(record.get("mem_gb", math.nan) for record in results),
        figures=tuple(sorted(path.name for path in (folder.path / "figures").glob("*.png"))),
    )


def _environments(run: Record, model: Record) -> tuple[Environment, ...]:
    return tuple(
        Environment(
            name,
            index in run["test_envs"],
            model.get(f"env{index}_in_acc", math.nan),
            model.get(f"env{index}_out_acc", math.nan),
        )
        for index, name in enumerate(run["env_names"])
    )


def _scores(run: Record, model: Record) -> tuple[Scores, ...]:
    """Of the evaluation sets, and of the set that selects where it is none of them."""
    reported = [run["env_names"][index] for index in run["test_envs"]]
    names = list(dict.fromkeys([*run["env_names"], judging_set(run)]))
    return tuple(
        Scores(
            name,
            name in reported,
            model.get(f"{name}_score", math.nan),
            {key: model[f"{name}_{key}"] for key in metrics_of(model, name)},
            kinds_of(model, name, names),
        )
        for name in names
    )


def _has_stopped_early(run: Record, results: Sequence[Record]) -> bool:
    """Counted as training counts (`dynmoe.training.callbacks`): NaN is no gain, even at first."""
    patience = run.get("patience")
    if patience is None or results[-1]["step"] + 1 >= run["steps"]:
        return False
    best, without_gain = -math.inf, 0
    for record in results:
        score = judged(record, run).validation
        without_gain = 0 if score > best else without_gain + 1
        best = score if score > best else best
    return without_gain >= patience


def _layers(run: Record, folder: RunFolder, step: int) -> tuple[Layer, ...]:
    routing = [line for line in folder.read("routing") if line["step"] == step]
    events = folder.read("events")
    environments = run["test_envs"] or range(len(run["env_names"]))
    test_sources = {f"env{index}" for index in environments}

    def layer(name: str) -> Layer:
        lines = [line for line in routing if line["layer"] == name]
        train = [line for line in lines if line["source"] == "train"]
        test = [line for line in lines if line["source"] in test_sources]
        updates = [event for event in events if event["layer"] == name]
        start = run["start_experts"][name]
        return Layer(
            name=name,
            start=start,
            added=sum(event["added"] is not None for event in updates),
            removed=sum(len(event["removed"]) for event in updates),
            end=updates[-1]["after"] if updates else start,
            experts=len(lines[-1]["slots"]) if lines else start,
            k_train=_token_mean(train, "mean_k"),
            k_test=_token_mean(test, "mean_k"),
            unrouted=_token_mean(train, "unrouted"),
            k_train_by_part=k_by_part(train),
            k_test_by_part=k_by_part(test),
        )

    return tuple(layer(name) for name in run["parameters"]["layers"])


def _token_mean(lines: Sequence[Record], key: str) -> float:
    tokens = sum(line["tokens"] for line in lines)
    return sum(line[key] * line["tokens"] for line in lines) / tokens if tokens else math.nan


def _steps_per_second(results: Iterable[Record]) -> float:
    """Over all training steps; `step_time` is the mean seconds per step since the last record."""
    found = [(n, n * record.get("step_time", math.nan)) for n, record in stretches(results)]
    seconds = sum(each for _, each in found)
    return sum(n for n, _ in found) / seconds if seconds else math.nan
