"""The problems of GLUE: columns, classes, metrics, sizes and the names of submission files.

Source: Wang et al., "GLUE", ICLR 2019; columns, label order and sizes as in the hub's nyu-mll/glue.
MNLI has a second dev set of other genres ("mismatched"); the diagnostic set "ax" is a test set of
MNLI's model. `glosses` is not part of GLUE: it comes with the package (text/sources.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LABELLED = ("train", "dev", "mismatched")
TESTS = ("test", "test_mismatched", "ax")
"""Sets without labels, for the GLUE server."""

MEASURES = {
    ("accuracy",): "accuracy",
    ("matthews",): "Matthews correlation",
    ("accuracy", "f1"): "mean of accuracy and F1",
    ("pearson", "spearman"): "mean of Pearson and Spearman",
}


@dataclass(frozen=True)
class GlueTask:
    """One problem.

    `columns` are the hub's: one text or two. `labels` are class names in label order, empty for a
    regression. `sizes` counts the rows of every set as published. `text_labels`: the files that
    the GLUE server expects hold class names, not numbers. `undecided`: labels that mean that the
    annotators did not agree, as MultiNLI's own files have them.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    sizes: Mapping[str, int]
    metrics: tuple[str, ...] = ("accuracy",)
    text_labels: bool = False
    undecided: tuple[str, ...] = ()

    @property
    def regression(self) -> bool:
        return not self.labels

    @property
    def submission(self) -> dict[str, str]:
        """The file that the GLUE server expects for each test set."""
        test = "MNLI-m" if self.name == "mnli" else self.title
        files = {"test": f"{test}.tsv", "test_mismatched": "MNLI-mm.tsv", "ax": "AX.tsv"}
        return {name: file for name, file in files.items() if name in self.sizes}

    @property
    def measure(self) -> str:
        """Name of the score, which is the mean of the metrics."""
        return MEASURES[self.metrics]


def _sizes(train: int, dev: int, test: int) -> dict[str, int]:
    return {"train": train, "dev": dev, "test": test}


SENTENCES = ("sentence1", "sentence2")
TWO_WAY = ("entailment", "not_entailment")
TOPICS = (
    *("act", "animal", "artifact", "body", "communication"),
    *("food", "location", "person", "plant", "substance"),
)

TASKS = {
    task.name: task
    for task in (
        GlueTask(
            name="cola",
            title="CoLA",
            columns=("sentence",),
            labels=("unacceptable", "acceptable"),
            sizes=_sizes(8551, 1043, 1063),
            metrics=("matthews",),
        ),
        GlueTask(
            name="sst2",
            title="SST-2",
            columns=("sentence",),
            labels=("negative", "positive"),
            sizes=_sizes(67349, 872, 1821),
        ),
        GlueTask(
            name="mrpc",
            title="MRPC",
            columns=SENTENCES,
            labels=("not_equivalent", "equivalent"),
            sizes=_sizes(3668, 408, 1725),
            metrics=("accuracy", "f1"),
        ),
        GlueTask(
            name="qqp",
            title="QQP",
            columns=("question1", "question2"),
            labels=("not_duplicate", "duplicate"),
            sizes=_sizes(363846, 40430, 390965),
            metrics=("accuracy", "f1"),
        ),
        GlueTask(
            name="stsb",
            title="STS-B",
            columns=SENTENCES,
            labels=(),
            sizes=_sizes(5749, 1500, 1379),
            metrics=("pearson", "spearman"),
        ),
        GlueTask(
            name="mnli",
            title="MNLI",
            columns=("premise", "hypothesis"),
            labels=("entailment", "neutral", "contradiction"),
            sizes={
                "train": 392702,
                "dev": 9815,
                "mismatched": 9832,
                "test": 9796,
                "test_mismatched": 9847,
                "ax": 1104,
            },
            text_labels=True,
            undecided=("-", "-1"),
        ),
        GlueTask(
            name="qnli",
            title="QNLI",
            columns=("question", "sentence"),
            labels=TWO_WAY,
            sizes=_sizes(104743, 5463, 5463),
            text_labels=True,
        ),
        GlueTask(
            name="rte",
            title="RTE",
            columns=SENTENCES,
            labels=TWO_WAY,
            sizes=_sizes(2490, 277, 3000),
            text_labels=True,
        ),
        GlueTask(
            name="wnli",
            title="WNLI",
            columns=SENTENCES,
            labels=("not_entailment", "entailment"),
            sizes=_sizes(635, 71, 146),
        ),
        GlueTask(
            name="glosses",
            title="Glosses",
            columns=("text",),
            labels=TOPICS,
            sizes={"train": 4000, "dev": 800},
        ),
    )
}
