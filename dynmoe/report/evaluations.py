"""Lines of a run's evaluations after training, ``budget.jsonl`` and ``quantize.jsonl``.

Every evaluation adds its lines to those of before. Tables and figures show all of them, of equal
evaluations the newest.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

from dynmoe.records import Record


def newest(records: Sequence[Record], about: Callable[[Record], Any]) -> list[Record]:
    """Return the last of the lines about the same, in the order of their first ones; weights by
    weights, and data by data. ``about``: beside these."""
    found: dict[str, Record] = {}
    origins: list[list[str]] = []
    for record in records:
        found[json.dumps([_origin(record), about(record)], sort_keys=True)] = record
        origins.append(_origin(record))
    return sorted(found.values(), key=lambda each: origins.index(_origin(each)))


def _origin(record: Record) -> list[str]:
    """The weights that a line is about, and the data: those of another folder may be given."""
    weights = f"{record['checkpoint']}, step {record['step']}"
    return [weights, f"data {record['data_hash']}"]


def title_of(name: str, records: Sequence[Record]) -> str:
    """The run's name; with the weights, if all lines are about the same."""
    weights = {_origin(each)[0] for each in records}
    return f"{name}, {weights.pop()}" if len(weights) == 1 else name


def labels(records: Sequence[Record], words: Callable[[Record], str]) -> list[str]:
    """The words for each line; behind its weights and its data, if there are several."""
    columns = zip(*(_origin(each) for each in records), strict=True)
    several = [len({*column}) > 1 for column in columns]
    return [
        ": ".join([*itertools.compress(_origin(each), several), words(each)]) for each in records
    ]
