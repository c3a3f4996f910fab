"""What reports call things: a run is measured by accuracy on environments, or by a task's own
measure on evaluation sets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dynmoe.records import Record
from dynmoe.report.tables import format_number
from dynmoe.selection import on_sets

# The single measures of a task, in the words of tables; results have them as `<set>_<measure>`.
METRICS = {
    "accuracy": "accuracy",
    "f1": "F1",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
}

# Sets of questions whose score is not the share of right answers.
HEADLINES = {
    "pope": "mean F1 over the splits",
    "mme": "points of perception / 2000",
    "textvqa": "VQA accuracy",
    "vqav2": "VQA accuracy",
    "vizwiz": "VQA accuracy",
}


class Words(NamedTuple):
    measure: str
    """What is reported."""
    place: str
    """What it is reported on."""
    part: str
    """Any part of the data that is evaluated, reported or not."""
    token: str
    """Of what is reported on."""
    sample: str
    """What FLOPs are counted of."""

    @property
    def noun(self) -> str:
        """The measure in short, within sentences."""
        return "accuracy" if self.measure == "accuracy" else "score"

    @property
    def nouns(self) -> str:
        return "accuracies" if self.measure == "accuracy" else "scores"

    @property
    def scale(self) -> str:
        """What all numbers are shown in: correlations, which may be below 0, are no shares."""
        return "%" if "accuracy" in self.measure else "x 100"

    @property
    def unit(self) -> str:
        """What follows a number within a sentence."""
        return " %" if self.scale == "%" else ""

    @property
    def column(self) -> str:
        """The heading of a column of numbers."""
        return f"{self.measure}, {self.scale}"


def words_of(facts: Mapping[str, Any]) -> Words:
    """Of a run; `facts` are those of its `run.json`."""
    if on_sets(facts["selection"]):
        reported = [facts["env_names"][index] for index in facts["test_envs"]]
        measure = HEADLINES.get(reported[0], facts.get("measure", "accuracy"))
        what = "conversation about one image" if is_vision_language(facts) else "text"
        text = f"{what} of the training set's mean length"
        return Words(measure, "evaluation set", "evaluation set", "token", text)
    return Words("accuracy", "test environment", "environment", "test token", "sample")


def is_vision_language(facts: Mapping[str, Any]) -> bool:
    """Whether a run is about questions on images; it is one of several stages then."""
    return facts.get("stage") is not None


def has_fixed_k(facts: Mapping[str, Any]) -> bool:
    """Whether every token has the same number of experts."""
    return "moe.top_k" in facts["config"]


def metrics_of(record: Mapping[str, Any], name: str) -> list[str]:
    """The keys of the metrics whose mean is the score on an evaluation set; none if it is one."""
    found = [key for key in METRICS if f"{name}_{key}" in record]
    return found if len(found) > 1 else []


def layer_name(module: str) -> str:
    """What figures and tables call an MoE layer: the last parts of its module's name,
    `layer.10.intermediate` of `model.bert.encoder.layer.10.intermediate`."""
    return ".".join(module.split(".")[-3:])


def capital(text: str) -> str:
    """With a capital first letter; the others stay."""
    return text[:1].upper() + text[1:]


# Results on sets of questions, by kind of question. A result's keys are `<set>_<what>`.

SHUFFLED = "shuffled"
"""The name of the set of the reported set's questions about images of others."""

POINTS = "_points"


def kinds_of(record: Mapping[str, Any], name: str, names: Sequence[str]) -> dict[str, float]:
    """What a result tells of a set beside its score: accuracies of kinds of questions in [0, 1],
    MME's points. `names` are all sets."""
    longer = tuple(f"{other}_" for other in names if other.startswith(f"{name}_"))
    return {
        key.removeprefix(f"{name}_"): value
        for key, value in record.items()
        if key.startswith(f"{name}_")
        and not (longer and key.startswith(longer))
        and key.removeprefix(f"{name}_") not in ("score", *METRICS)
    }


def is_points(kind: str) -> bool:
    """Whether it counts points, as MME does, and is no share of 1."""
    return kind.endswith(POINTS)


def kind_name(kind: str) -> str:
    """`yes no` of `kind_yes_no`, `perception` of `perception_points`."""
    return kind.removeprefix("kind_").removesuffix(POINTS).replace("_", " ")


def kind_number(kind: str, value: float) -> str:
    """In per cent or in points."""
    return format_number(value if is_points(kind) else 100 * value, ".1f")


def unit_of(kinds: Sequence[str]) -> str:
    """What the numbers of a set's kinds are in."""
    return "points" if kinds and all(map(is_points, kinds)) else "%"


def set_notes(names: Sequence[str]) -> list[str]:
    """How to read the scores of sets whose scores are no plain accuracies."""
    notes = [f"{name}: {HEADLINES[name]}." for name in names if name in HEADLINES]
    if SHUFFLED in names:
        notes.append(
            f"{SHUFFLED}: the same questions about other images; who looks at images loses there."
        )
    return notes


# Routing told apart by what a token is: a patch of an image, text of the prompt, of the answer.

PARTS = ("image", "prompt", "answer")
"""In the order they are shown."""


class PartRouting(NamedTuple):
    tokens: int
    mean_k: float
    """Experts per token; NaN without tokens."""
    load: tuple[int, ...]
    """Tokens that each living expert served."""


def by_part(lines: Iterable[Record]) -> dict[str, PartRouting]:
    """Of routing records of one layer at one step, summed; empty where parts were not recorded."""
    found = [line["parts"] for line in lines if "parts" in line]
    return {part: _summed([parts[part] for parts in found]) for part in PARTS} if found else {}


def k_by_part(lines: Iterable[Record]) -> dict[str, float]:
    """Mean k alone."""
    return {part: routing.mean_k for part, routing in by_part(lines).items()}


def _summed(parts: Iterable[Record]) -> PartRouting:
    records = list(parts)
    tokens = sum(record["tokens"] for record in records)
    load = tuple(np.sum([record["load"] for record in records], axis=0).tolist())
    return PartRouting(tokens, sum(load) / tokens if tokens else math.nan, load)
