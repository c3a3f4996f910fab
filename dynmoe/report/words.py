"""What reports call things: a run is measured by accuracy on environments, or by a task's own
measure on evaluation sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

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
