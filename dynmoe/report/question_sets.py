"""Results on sets of questions, by kind of question. A result's keys are `<set>_<what>`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynmoe.report.tables import format_number
from dynmoe.report.words import HEADLINES, METRICS

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
