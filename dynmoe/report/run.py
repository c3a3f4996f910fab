"""One run as reports see it: its problem, its setting's name, its results and routing.

Runs of one problem (data set, protocol, selection rule) are comparable. Within it, the runs of one
*setting* differ in chance alone, and only they are averaged: in seeds, in the test environment, in
where data and weights lie and how they are read, in additional evaluations, and in the repetition
of the previous stage that they start from. Draws of hyper-parameters (`hparams_seed`) belong to one
setting too: the search is part of the method, as in DomainBed. So do the values of the keys that a
protocol searches over (`protocol.searched`), as the learning rate on GLUE.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from dynmoe.config.schema import TokenSparsify
from dynmoe.records import Record, RecordError, RunFolder, stretches
from dynmoe.report.tables import Scale
from dynmoe.report.words import HEADLINES, WORDS, Words
from dynmoe.selection import RULES, judged, selected

Kind = Literal["dense", "fixed", "varying", "adaptive"]
Config = Mapping[str, Any]
"""The flat `config` of a `run.json`."""

KINDS: tuple[Kind, ...] = ("dense", "fixed", "varying", "adaptive")

DENSE = "dense"
"""Name of a model without MoE layers, whatever `moe.algorithm` is: older runs have `ERM`."""

NATIVE = "native"
"""Algorithm of a model's own top-k router, whose k its weights say and no key."""

TARGET = "moe.router.target_k"

NOT_FINITE = "the training loss was not finite at step {}"

Repetition = tuple[int, int]
"""(seed, trial seed)"""


class Problem(NamedTuple):
    """Subject of a table; all its cells share it."""

    dataset: str
    protocol: str
    selection: str

    @property
    def validates(self) -> bool:
        """Whether its rule chooses by scores; the last step is taken without."""
        return self.selection != "last_step"


@dataclass(frozen=True)
class Outcome:
    """The reported result of a run: that of the model at the step that the rule chose."""

    step: int
    accuracy: float
    """The reported number (`dynmoe.selection.judged`): a share of 1, or a loss."""
    validation: float
    """The number that the rule selects by, in the same unit."""
    last: float
    """The reported number of the model at the end of training."""
    is_selected: bool
    """False where the rule cannot decide within one run; then `step` is the last one."""


@dataclass(frozen=True)
class Layer:
    """One MoE layer: its experts over the run, and its routing in the reported model.

    A number that was not recorded is NaN."""

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


@dataclass(frozen=True)
class Run:
    """One run that has at least one evaluation, or has not begun (`results` is empty)."""

    folder: RunFolder
    facts: Record
    """`run.json`."""
    results: list[Record]
    setting: str = ""
    """The name of its setting, unique within the problem; `read_runs` gives it."""
    chosen: Record | None = None
    """The record that the selection rule chose where it had to look at several runs."""

    def named(self, setting: str) -> Run:
        """The run with this name of its setting, and what has been read of it already."""
        found = replace(self, setting=setting)
        vars(found).update({key: each for key, each in vars(self).items() if key != "setting"})
        return found

    @property
    def config(self) -> dict[str, Any]:
        """Dotted keys and values of all that can change the result."""
        return self.facts["config"]

    @property
    def nonfinite_step(self) -> int | None:
        """Step at which the loss was first seen not to be finite; None if it always was."""
        for record in (self.facts, *self.results):
            if isinstance(record.get("nonfinite_step"), int):
                return int(record["nonfinite_step"])
        losses = ((record["step"], record.get("loss")) for record in self.results)
        return next((n for n, loss in losses if loss is not None and not math.isfinite(loss)), None)

    @cached_property
    def problem(self) -> Problem:
        return Problem(*(self.facts[key] for key in Problem._fields))

    @property
    def tested(self) -> list[str]:
        """Names of the environments or sets that are reported, which are sources of routing."""
        return [self.facts["env_names"][index] for index in self.facts["test_envs"]]

    @property
    def environment(self) -> str:
        """The test environment's name; several are joined by `+`."""
        return "+".join(self.tested)

    @property
    def repetition(self) -> Repetition:
        """(seed, trial seed): runs of different settings with equal ones are matched."""
        return self.facts["seed"], self.facts["trial_seed"]

    @property
    def searched(self) -> dict[str, Any]:
        """The keys that its protocol searches over, and their values here."""
        keys = self.config.get("protocol.searched") or ()
        return {key: self.config.get(key) for key in keys}

    @cached_property
    def is_mostly_frozen(self) -> bool:
        """Whether LoRA or adapters are trained in the place of most weights."""
        if _has_node(self.config, "backbone.lora"):
            return True
        if not _has_node(self.config, "backbone.adapter"):
            return False
        freeze = self.config.get("backbone.adapter.freeze")
        return bool(self.config.get("backbone.pretrained") if freeze is None else freeze)

    @property
    def is_partly_frozen(self) -> bool:
        """Whether it is a stage that trains some parts of its model only."""
        whole = {"vision", "projector", "language_model"}
        return not whole <= set(self.config.get("task.module.trains", whole))

    @cached_property
    def words(self) -> Words:
        reported, measure = self.facts["reported"], str(self.facts["measure"])
        if measure != "loss":
            measure = HEADLINES.get("".join(reported["sets"][:1]), measure)
        return WORDS[self.facts["modality"]].of(measure, reported["measure"])

    @property
    def scale(self) -> Scale:
        """Of the measure that it is selected by, and reported by."""
        return self.words.scale

    @cached_property
    def kind(self) -> Kind:
        """`adaptive`: training adds and removes experts. Else the experts stay as they are:
        `fixed` if all tokens activate equally many, `varying` if the router decides how many."""
        config = self.facts["config"]
        if config.get("moe.router", "") is None:
            return "dense"
        if config.get("moe.adaptation", "") is not None:
            return "adaptive"
        has_k = "moe.top_k" in config or config.get("moe.algorithm") == NATIVE
        return "fixed" if has_k and TARGET not in config else "varying"

    @property
    def target_k(self) -> float | None:
        """Mean experts per token that its router holds, mean over MoE layers; None without."""
        found = self.config.get(TARGET)
        return None if found is None else float(np.mean(found))

    @cached_property
    def outcome(self) -> Outcome:
        chosen = self.chosen or selected(self.results, self.facts)
        last = judged(self.results[-1], self.facts)
        reported = last if chosen is None else judged(chosen, self.facts)
        return Outcome(
            reported.record["step"],
            accuracy=reported.test,
            validation=reported.validation,
            last=last.test,
            is_selected=chosen is not None,
        )

    @cached_property
    def reported(self) -> Record:
        """The result of the model that is reported."""
        return next(each for each in self.results if each["step"] == self.outcome.step)

    @cached_property
    def scores(self) -> Mapping[str, Mapping[str, float]]:
        """Measures of the reported model by set, in the order of `env_names`."""
        found, order = self.reported["scores"], self.facts["env_names"]

        def place(name: str) -> int:
            own = name if name in order else name.rpartition("/")[0]
            return order.index(own) if own in order else len(order)

        return {name: found[name] for name in sorted(found, key=place)}

    @cached_property
    def training_routing(self) -> list[Record]:
        """The routing records of training, at every step; those of sets are most of the file."""
        lines = self._routing(b'"source": "train"')
        return [line for line in lines if line.get("source") == "train"]

    @cached_property
    def routing_at_outcome(self) -> list[Record]:
        """The routing records of the model that is reported, without reading the others."""
        lines = self._routing(f'"step": {self.outcome.step},'.encode())
        return [line for line in lines if line["step"] == self.outcome.step]

    def _routing(self, mark: bytes) -> list[Record]:
        """The routing records whose line contains `mark`: most of the time of a large report would
        go into parsing the others."""
        lines = self.folder.lines("routing")
        return [json.loads(line) for line in lines if mark in line]

    @cached_property
    def events(self) -> list[Record]:
        return self.folder.read("events")

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The MoE layers, from the first up; k on the reported places, or else on all."""
        tested = self.tested or self.facts["env_names"]

        def layer(name: str, start: int) -> Layer:
            lines = [line for line in self.routing_at_outcome if line["layer"] == name]
            train = [line for line in lines if line["source"] == "train"]
            test = [line for line in lines if line["source"] in tested]
            updates = [event for event in self.events if event["layer"] == name]
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
            )

        return tuple(layer(*each) for each in self.facts["start_experts"].items())

    @property
    def steps_taken(self) -> int:
        """Patience may end a run before its planned steps."""
        return int(self.results[-1]["step"]) + 1

    @property
    def step_seconds(self) -> float:
        """Mean over all training steps; `step_time` is the mean since the record before."""
        found = [(n, n * each["step_time"]) for n, each in stretches(self.results)]
        return sum(seconds for _, seconds in found) / sum(n for n, _ in found)

    @property
    def peak_memory(self) -> float:
        """GiB, as DomainBed's `mem_gb`."""
        return float(max(record["mem_gb"] for record in self.results))


def read_run(folder: RunFolder) -> Run:
    """A run that has at least one evaluation, finished or not; else raise RecordError."""
    run = Run(folder, folder.read_run(), folder.read("results"))
    run = replace(run, setting=short_name(run))
    if not run.results:
        why = "the run stopped before its first evaluation, start it again"
        if folder.is_done:
            why = "they are gone, run it again with overwrite=true"
        raise RecordError(
            f"{folder.path}: expected at least one line in results.jsonl, found none; {why}"
        )
    return run


def _token_mean(lines: Sequence[Record], key: str) -> float:
    tokens = sum(line["tokens"] for line in lines)
    return sum(line[key] * line["tokens"] for line in lines) / tokens if tokens else math.nan


def short_name(run: Run) -> str:
    """Name of the mixture, and of what its backbone leaves out or adds and its data are mixed by:
    `dense`, `top-2 of 8`, `GMoE top-1 of 6`, `DynMoE, adapters, 0.7 of patches, uniform mixing`."""
    rule = run.config.get("mixing.rule")
    mixed = [] if rule is None else [f"{rule} mixing"]
    return ", ".join([_mixture_name(run), *_tuned(run.config), *mixed])


def _mixture_name(run: Run) -> str:
    config = run.config
    if run.kind == "dense":
        return DENSE
    if run.kind in ("varying", "adaptive"):
        return str(config["moe.algorithm"])
    if "moe.top_k" not in config:
        return f"{config['moe.algorithm']}, {config['moe.num_experts']} experts"
    own = "" if config["moe.algorithm"] == "TopK" else f"{config['moe.algorithm']} "
    return f"{own}top-{config['moe.top_k']} of {config['moe.num_experts']}"


def _tuned(config: Config) -> Iterator[str]:
    """Sparse-Tuning's parts; options that are not written have their defaults."""
    if _has_node(config, "backbone.adapter"):
        yield "adapters"
    if _has_node(config, "backbone.token_sparsify"):
        yield f"{config.get('backbone.token_sparsify.keep', TokenSparsify.keep)} of patches"


def _has_node(config: Config, node: str) -> bool:
    """Whether a mapping is there, empty ones included."""
    return config.get(node) is not None or any(key.startswith(f"{node}.") for key in config)


def order(run: Run) -> tuple[Any, ...]:
    """Dense first, then fixed mixtures by algorithm, experts and k, adaptive ones last."""
    config = run.config
    return (
        *run.problem,
        KINDS.index(run.kind),
        config["moe.algorithm"],
        config.get("moe.num_experts", 0) if run.kind == "fixed" else 0,
        config.get("moe.top_k", 0) if run.target_k is None else run.target_k,
        run.setting,
        run.facts["test_envs"],
        run.repetition,
        run.facts["hparams_seed"],
    )


def environments(runs: Iterable[Run]) -> list[str]:
    """The test environments of one problem's runs, in the data set's order."""
    found = {run.environment: run.facts["test_envs"] for run in runs}
    return sorted(found, key=lambda name: found[name])


def settings(runs: Iterable[Run]) -> list[str]:
    """The settings of one problem's runs, in order."""
    return list(dict.fromkeys(run.setting for run in runs))


def by_setting(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each setting, in order."""
    return {name: [run for run in runs if run.setting == name] for name in settings(runs)}


def conditions(runs: Sequence[Run]) -> str:
    """The foot of a table: protocol, selection, repetitions, weights, data, versions of its runs.

    Where runs differ in one of them, all values are named; at most three hashes of data, since
    splits, and the deal of digits into environments, differ between repetitions.
    """
    facts = [run.facts for run in runs]
    repetitions = sorted({run.repetition for run in runs})
    versions = sorted({item for fact in facts for item in fact["versions"].items()})
    steps = ((fact.get("patience") is not None) * "at most " + str(fact["steps"]) for fact in facts)
    hashes = sorted({fact["data_hash"] for fact in facts})
    more = f" and {len(hashes) - 3} more" if len(hashes) > 3 else ""
    parts = [
        f"Protocol {every(fact['protocol'] for fact in facts)}",
        f"selection by {every(RULES[fact['selection']] for fact in facts)}",
        f"{counted(len(repetitions), 'repetition')} ({seeds(repetitions)})",
        f"{every(steps)} steps",
        f"backbone {every(fact['backbone'] for fact in facts)}",
        f"weights {every(fact['weights'] for fact in facts)}",
        f"data {' / '.join(hashes[:3])}{more}",
        f"versions {', '.join(f'{name} {text}' for name, text in versions)}",
    ]
    at_the_end = sorted({run.setting for run in runs if not run.outcome.is_selected})
    if at_the_end:
        parts.append(f"the last step, as one run cannot decide: {', '.join(at_the_end)}")
    return f"{'; '.join(parts)}."


def counted(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def in_words(value: object) -> str:
    """A fact as text: `cpu Example CPU, cores 2`; `unknown` where it was not recorded."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return "unknown" if value is None else str(value)


def different_facts(facts: Sequence[Record], keys: Iterable[str]) -> tuple[str, ...]:
    """Return `key (value; value)` of each fact that is not the same everywhere."""
    found = {key: dict.fromkeys(in_words(fact.get(key)) for fact in facts) for key in keys}
    return tuple(f"{key} ({'; '.join(values)})" for key, values in found.items() if len(values) > 1)


def every(values: Iterable[object]) -> str:
    """All values that differ: `8 / 16`."""
    return " / ".join(dict.fromkeys(map(in_words, values)))


def seeds(repetitions: Iterable[Repetition]) -> str:
    """`seeds 0, 1, 2`, or `seed/trial seed 0/0, 1/1` where trial seeds vary too."""
    pairs = sorted(repetitions)
    if len({trial for _, trial in pairs}) > 1:
        return f"seed/trial seed {', '.join(f'{seed}/{trial}' for seed, trial in pairs)}"
    return f"seed{'s' * (len(pairs) != 1)} {', '.join(str(seed) for seed, _ in pairs)}"
