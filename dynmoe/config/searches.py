"""The check of a search, `sweep=optuna`: its settings, and the values it can draw.

Optuna's sweeper reads Hydra's sweeps in its own way: the end of a range is drawn too, and
`interval(2,8)` is of floats (hydra-optuna-sweeper 1.3, `create_optuna_distribution_from_override`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig, OmegaConf

from dynmoe.config.sweeps import each_value


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
    value = override.value()
    if isinstance(value, RangeSweep):
        start, stop, step = _ends(value)
        if not (_finite(start, stop, step) and (stop - start) * step > 0):
            return "has no value: expected range(start,stop,step) that leads from start to stop"
    if isinstance(value, IntervalSweep):
        low, high = _ends(value)
        if not (_finite(low, high) and low < high):
            return "has no value: expected interval(low,high) with low below high"
        if "log" in value.tags and low <= 0:
            return "expected a low end above 0, as its tag is log"
    return None


def _ends(value: RangeSweep | IntervalSweep) -> list[Any]:
    """start, stop and step of a range; both ends of an interval."""
    if isinstance(value, IntervalSweep):
        return [value.start, value.end]
    return [value.start or 0, value.stop, value.step]


def _finite(*numbers: object) -> bool:
    return all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)


def draws(override: Override) -> list[str]:
    """One override for each value of a choice; of a range or interval, those at its ends."""
    key, value = override.get_key_element(), override.value()
    if isinstance(value, RangeSweep) and not value.shuffle:
        start, stop, step = _ends(value)
        steps = math.floor((stop - start) / step + 1e-9)
        return [f"{key}={start}", f"{key}={start + steps * step}"]
    if isinstance(value, IntervalSweep):
        return [f"{key}={end}" for end in _ends(value)]
    return each_value(override)


def hint(override: Override) -> str:
    value = override.value()
    if isinstance(value, RangeSweep):
        return " (a search draws the end of a range too)"
    if not isinstance(value, IntervalSweep):
        return ""
    low, high = _ends(value)
    of_floats = isinstance(low, float) and low.is_integer() and high.is_integer()
    return f" (of integers: int(interval({low:g},{high:g})))" if of_floats else ""
