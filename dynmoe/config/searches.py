"""The check of a search, `sweep=optuna`: its settings, and the values it can draw.

Optuna's sweeper reads Hydra's sweeps in its own way: the end of a range is drawn too, and
`interval(2,8)` is of floats (hydra-optuna-sweeper 1.3, `create_optuna_distribution_from_override`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig, OmegaConf


def search_problems(sweeper: DictConfig) -> Iterator[str]:
    """Settings of Optuna's sweeper that end a search, or turn it round."""
    node = OmegaConf.to_container(sweeper)
    assert isinstance(node, dict)
    if node.get("direction", "maximize") != "maximize":
        yield "hydra.sweeper.direction: expected maximize: a job returns the score it is judged by"
    for key in ("n_trials", "n_jobs"):
        if isinstance(node.get(key), int) and node[key] < 1:
            yield f"hydra.sweeper.{key}: expected 1 or more, found {node[key]}"
    if node.get("storage") is not None and _major("SQLAlchemy") >= 2:
        yield (
            "hydra.sweeper.storage: the Optuna of this sweeper writes through SQLAlchemy before 2: "
            'pip install "sqlalchemy<2", or leave storage out'
        )


def _major(package: str) -> int:
    try:
        return int(version(package).partition(".")[0])
    except PackageNotFoundError:
        return 0


def empty_range(override: Override) -> str | None:
    """The message for a range or interval that has no value, or has no end."""
    value: Any = override.value()
    if isinstance(value, RangeSweep):
        start, stop, step = value.start or 0, value.stop, value.step
        if not (_finite(start, stop, step) and (stop - start) * step > 0):
            return "has no value: expected range(start,stop,step) that leads from start to stop"
    if isinstance(value, IntervalSweep):
        if not (_finite(value.start, value.end) and value.start < value.end):
            return "has no value: expected interval(low,high) with low below high"
        if "log" in value.tags and value.start <= 0:
            return "expected a low end above 0, as its tag is log"
    return None


def _finite(*numbers: object) -> bool:
    return all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)


def draws(override: Override) -> list[str]:
    """One override for each value of a choice; of a range or interval, those at its ends."""
    key, value = override.get_key_element(), cast(Any, override.value())
    if isinstance(value, RangeSweep) and not value.shuffle:
        steps = math.floor((value.stop - (value.start or 0)) / value.step + 1e-9)
        return [f"{key}={value.start or 0}", f"{key}={(value.start or 0) + steps * value.step}"]
    if isinstance(value, IntervalSweep):
        return [f"{key}={value.start}", f"{key}={value.end}"]
    return each_value(override)


def hint(override: Override) -> str:
    value: Any = override.value()
    if isinstance(value, RangeSweep):
        return " (a search draws the end of a range too)"
    of_floats = isinstance(value, IntervalSweep) and isinstance(value.start, float)
    if of_floats and value.start.is_integer() and value.end.is_integer():
        return f" (of integers: int(interval({value.start:g},{value.end:g})))"
    return ""
