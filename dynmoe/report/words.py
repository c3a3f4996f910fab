"""Names that reports use: of measures, of places they are measured on, of kinds of questions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dynmoe.records import Record
from dynmoe.report.tables import SHARE, Scale, format_number
from dynmoe.selection import LESS_IS_BETTER

# The single measures of a task, in tables.
METRICS = {
    "accuracy": "accuracy",
    "f1": "F1",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "bits_per_byte": "bits per byte",
    "perplexity": "perplexity",
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
    """The reported measure."""
    scale: Scale = SHARE
    """Of the reported measure."""
    place: str = "evaluation set"
    """Place that the measure is reported on."""
    part: str = "evaluation set"
    """Any part of the data that is evaluated, reported or not."""
    token: str = "token"
    """A token of the reported place."""
    sample: str = "text of the training set's mean length"
    """Unit that FLOPs are counted for."""
    example: str = "example"
    """Unit of the mean length."""
    mark: str = "reported"
    """Mark of a reported place beside others."""
    split: str = ""
    """The part of a place that is reported, within sentences."""
    positions: str = "the first; a position counts the texts that reach it"
    """Order of the token positions, from 0."""

    @property
    def noun(self) -> str:
        """The measure in short, within sentences."""
        return self.measure if self.measure in NOUNS else "score"

    @property
    def nouns(self) -> str:
        return NOUNS.get(self.measure, "scores")

    @property
    def best(self) -> str:
        """The best number of several."""
        return "lowest" if self.scale.less_is_better else "highest"

    @property
    def column(self) -> str:
        """The heading of a column of numbers."""
        return f"{self.measure}, {self.scale.name}"

    def of(self, measure: str, key: str) -> Words:
        """The words for another measure, whose name in records is `key`."""
        scale = scale_of(key, measure)
        if key == "loss" != self.measure:  # of a sample, not of a token
            scale = scale._replace(name="nats", unit=" nats")
        return self._replace(measure=measure, scale=scale)


NOUNS = {"accuracy": "accuracies", "loss": "losses"}
"""Measures that sentences call by their names, and their plurals."""


# By what the data hold; `run.json` says it.
WORDS = {
    "image": Words(
        "accuracy",
        place="test environment",
        part="environment",
        token="test token",
        sample="sample",
        mark="test",
        split=" on the test environment's in split",
        positions="class token; then patches, row by row",
    ),
    "text": Words("accuracy"),
    "text-stream": Words(
        "loss",
        sample="block of the training set's mean length",
        example="block",
        positions="the first of a block",
    ),
    "vision-language": Words(
        "accuracy",
        sample="conversation about one image of the training set's mean length",
        example="conversation, its image included",
    ),
}


def metrics_of(scores: Mapping[str, float]) -> list[str]:
    """The metrics whose mean is the score on a set; none if the score is a single one."""
    found = [key for key in METRICS if key in scores]
    return found if len(found) > 1 else []


def layer_name(module: str) -> str:
    """Short name of an MoE layer: the last parts of its module's name, `layer.10.intermediate` of
    `model.bert.encoder.layer.10.intermediate`."""
    return ".".join(module.split(".")[-3:])


def block_name(module: str) -> str:
    """Short name of the block of an MoE layer, `blocks.2` of `blocks.2.mlp`, and of
    `blocks.2.mlp.fc1`, which some methods divide."""
    found = re.match(r".*\.\d+(?=\.|$)", module)
    return layer_name(found[0] if found else module)


def capital(text: str) -> str:
    """With a capital first letter; the others stay."""
    return text[:1].upper() + text[1:]


SHUFFLED = "shuffled"
"""The name of the set with the reported set's questions about the images of others."""

POINTS = "_points"


def kinds_of(scores: Mapping[str, float]) -> dict[str, float]:
    """Further measures of a set of questions: accuracies of kinds of questions in [0, 1], MME's
    points."""
    return {key: value for key, value in scores.items() if key not in ("score", "loss", *METRICS)}


def is_points(kind: str) -> bool:
    """Whether a measure counts points, as MME does, and is no share of 1."""
    return kind.endswith(POINTS)


def kind_name(kind: str) -> str:
    """`yes no` of `kind_yes_no`, `perception` of `perception_points`."""
    return kind.removeprefix("kind_").removesuffix(POINTS).replace("_", " ")


LOSSES = {
    "loss": Scale("nats per token", " nats per token", "nats", 1, 4, True),
    "bits_per_byte": Scale("bits per byte", " bits per byte", "bits", 1, 4, True),
    "perplexity": Scale("perplexity", "", "perplexity", 1, 2, True),
}
"""The measures of `selection.LESS_IS_BETTER`."""
assert tuple(LOSSES) == LESS_IS_BETTER


def scale_of(key: str, measure: str = "accuracy") -> Scale:
    """The scale of a measure by its name in records, and in words.

    Correlations, which may be below 0, are no shares: they stand there times 100.
    """
    if key in LOSSES:
        return LOSSES[key]
    if is_points(key):
        return Scale("points", "", "points", 1)
    return SHARE if "accuracy" in measure else Scale("x 100", "")


def measure_number(measure: str, value: float, digits: int = 1) -> str:
    """Text of a measure: in per cent with so many digits; points and losses as they are."""
    scale = scale_of(measure)
    digits = scale.digits if scale.less_is_better else digits
    return format_number(scale.factor * value, f".{digits}f")


def panels_of(measure: str) -> dict[str, tuple[str, float]]:
    """The panels of a figure of evaluations: the reported measure and the mean loss, once where
    they are the same; label and factor of each by its key."""
    scale = scale_of(measure)
    unit = "" if is_points(measure) else f", {scale.name}"
    loss = {"loss": ("mean loss (negative log-likelihood)", 1.0)}
    if measure == "loss":
        return loss
    return {"score": (f"{measure.replace('_', ' ')}{unit}", scale.factor), **loss}


def unit_of(kinds: Sequence[str]) -> str:
    """The unit of a set's kinds."""
    return "points" if kinds and all(map(is_points, kinds)) else "%"


def set_notes(names: Sequence[str]) -> list[str]:
    """How to read the scores of sets whose scores are no plain accuracies."""
    notes = [f"{name}: {HEADLINES[name]}." for name in names if name in HEADLINES]
    if SHUFFLED in names:
        notes.append(
            f"{SHUFFLED}: the same questions about other images; a model that uses the image "
            "scores lower here."
        )
    return notes


PARTS = ("image", "prompt", "answer")
"""Kinds of tokens: a patch of an image, text of the prompt, of the answer; in the order in
which tables show them."""


class PartRouting(NamedTuple):
    tokens: int
    mean_k: float
    """Experts per token; NaN without tokens."""
    load: tuple[int, ...]
    """Tokens that each living expert served."""


def by_part(lines: Iterable[Record]) -> dict[str, PartRouting]:
    """Sums over routing records of one layer at one step; empty where parts were not recorded."""
    recorded = [line["parts"] for line in lines if "parts" in line]
    found = {}
    for part in PARTS if recorded else ():
        tokens = sum(parts[part]["tokens"] for parts in recorded)
        load = tuple(np.sum([parts[part]["load"] for parts in recorded], axis=0).tolist())
        found[part] = PartRouting(tokens, sum(load) / tokens if tokens else math.nan, load)
    return found


def k_by_part(lines: Iterable[Record]) -> dict[str, float]:
    """Mean k alone."""
    return {part: routing.mean_k for part, routing in by_part(lines).items()}
