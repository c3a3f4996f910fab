"""How fast trained models answer: the `generation.json` of `dynmoe-bench generate --runs`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dynmoe.comparison.timings import Range, read_measured

FILE = "generation.json"


@dataclass(frozen=True)
class Generation:
    """One setting. All of a table answered the same questions with equally many new tokens."""

    run: str
    """The name of the run's folder."""
    problem: str
    """`dataset, protocol, selection`"""
    setting: str
    """Its name when it was measured; that of a report's settings is found by `run`."""
    batch: int
    """Questions answered at once."""
    new_tokens: int
    """Of each answer."""
    prompt_ms: float
    """Of a batch of questions up to the first new token."""
    prompt_quartiles_ms: Range
    token_ms: float
    """Of each further token of a batch's answers."""
    tokens_per_s: float
    """New tokens of all answers, of the whole time."""
    tokens_per_s_quartiles: Range
    reference: str
    """The setting that `ratio` is over: the dense one if there is one."""
    ratio: float
    """Speed over the reference's in the same rounds, the median."""
    ratio_quartiles: Range
    mean_k: Mapping[str, float]
    """Experts per token of prompt, image and answer, the mean over MoE layers; empty if dense."""
    peak_bytes: int
    """Beyond the weights."""
    rounds: int
    contaminated: int
    """Rounds during which other processes were busy."""


@dataclass(frozen=True)
class Generations:
    rows: tuple[Generation, ...] = ()
    conditions: str = ""
    """Machine, settings and workload."""
    command: str = ""
    """The one that measured."""


def generation_rows(folder: Path) -> Generations:
    """What was measured of the runs in `folder`, a sweep or one of its runs; else no rows.

    Rows are in the order of the settings, the reference of each problem first.

    Raises:
        RecordError: a damaged `generation.json`.
    """
    names = [field.name for field in fields(Generation)]
    for place in (folder, folder.parent):
        if (place / FILE).exists():
            content = read_measured(place / FILE, set(names), "generate")
            is_run = place != folder
            rows = tuple(
                Generation(**{name: _value(row[name]) for name in names})
                for row in content["rows"]
                if not is_run or row["run"] == folder.name
            )
            return Generations(rows, _conditions(content), content["command"])
    return Generations()


def _conditions(content: Mapping[str, Any]) -> str:
    parts = (content[part] for part in ("machine", "settings", "workload"))
    return ", ".join(f"{key} {value}" for facts in parts for key, value in facts.items())


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
