"""Lines of a run's evaluations after training, ``budget.jsonl`` and ``quantize.jsonl``.

Every evaluation adds its lines to those of before. Tables and figures show all of them, of equal
evaluations the newest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from dynmoe.records import Record


def newest(records: Sequence[Record], about: Callable[[Record], Any]) -> list[Record]:
    """Return the last of the lines about the same, in the order of their first ones; weights by
    weights. ``about``: beside the weights."""
    found: dict[str, Record] = {}
    weights: list[str] = []
    for record in records:
        found[json.dumps([weights_of(record), about(record)], sort_keys=True)] = record
        weights.append(weights_of(record))
    return sorted(found.values(), key=lambda each: weights.index(weights_of(each)))


def weights_of(record: Record) -> str:
    """Say which weights a line is about."""
    return f"{record['checkpoint']}, step {record['step']}"


def are_several(records: Sequence[Record]) -> bool:
    """Whether the lines are about several weights."""
    return len({weights_of(each) for each in records}) > 1


def title_of(name: str, records: Sequence[Record]) -> str:
    """The run's name; with the weights, if all lines are about the same."""
    return name if are_several(records) else f"{name}, {weights_of(records[0])}"


def labels(records: Sequence[Record], words: Callable[[Record], str]) -> list[str]:
    """The words for each line; behind its weights, if there are several."""
    several = are_several(records)
    return [(f"{weights_of(each)}: " if several else "") + words(each) for each in records]
