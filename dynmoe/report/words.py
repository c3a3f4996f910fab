"""What reports call things: a run is measured by accuracy on environments, or by a task's own
measure on evaluation sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dynmoe.metrics.selection import SELECTING_SET

# The single measures of a task, in the words of tables; results have them as `<set>_<measure>`.
METRICS = {
    "accuracy": "accuracy",
    "f1": "F1",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
}


class Words(NamedTuple):
    measure: str
    """What is reported."""
    place: str
    """What it is reported on."""
    part: str
    """Any part of the data that is evaluated, reported or not."""
    examples: str

    @property
    def is_share(self) -> bool:
        """Whether the measure is a share, and not a correlation, which may be below 0."""
        return "accuracy" in self.measure

    @property
    def column(self) -> str:
        """The heading of a column: every measure is shown times 100."""
        return f"{self.measure}, %" if self.is_share else f"{self.measure} x 100"

    @property
    def unit(self) -> str:
        """What follows a number times 100 within a sentence."""
        return " %" if self.is_share else ""


def words_of(facts: Mapping[str, Any]) -> Words:
    """Of a run; `facts` are those of its `run.json`."""
    if facts["selection"] in SELECTING_SET:
        measure = facts.get("measure", "accuracy")
        return Words(measure, "evaluation set", "evaluation set", "examples")
    return Words("accuracy", "test environment", "environment", "images")
