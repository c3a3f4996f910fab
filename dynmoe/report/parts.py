"""Routing told apart by what a token is: a patch of an image, text of the prompt, of the answer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from dynmoe.records import Record

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
