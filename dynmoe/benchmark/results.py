"""The JSON file of a run: its rows and their conditions; and the comparison with an older file."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from dynmoe.benchmark.rows import Row
from dynmoe.errors import ConfigError
from dynmoe.runtime import machine

Facts = dict[str, Any]
R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class Conditions:
    """What a time depends on besides the code."""

    machine: Facts
    settings: Facts
    """What ``dynmoe.runtime.settle`` put in force."""
    workload: Facts
    """What all rows have in common."""

    def __str__(self) -> str:
        return ", ".join(
            f"{key} {value}" for facts in vars(self).values() for key, value in facts.items()
        )


def machine_facts(device: torch.device, dtype: str) -> Facts:
    """Processor and PyTorch, as they are now."""
    on_cuda = device.type == "cuda"
    return {
        **machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_cuda else "cpu",
        "dtype": dtype,
    }


def write(
    path: Path, command: Sequence[str], date: str, conditions: Conditions, rows: Sequence[Any]
) -> None:
    """One object: ``command``, ``date``, ``machine``, ``settings``, ``workload``, ``rows``."""
    content = {
        "command": shlex.join(command),
        "date": date,
        **dataclasses.asdict(conditions),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def read(path: Path, kind: type[R]) -> tuple[Conditions, list[R]]:
    """The conditions and the rows of a file that ``write`` wrote.

    Raises:
        ConfigError: it is not there, or something else.
    """
    if not path.is_file():
        raise ConfigError(f"--baseline {path}: there is no such file; --json writes one")
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        facts = [dict(content[field.name]) for field in dataclasses.fields(Conditions)]
        return Conditions(*facts), [kind(**row) for row in content["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--baseline {path}: expected a file that this version and command of dynmoe-bench"
            f" wrote ({type(error).__name__}: {error}); measure the baseline again"
        ) from None


def check_equal(old: Facts, new: Facts) -> None:
    """Refuse a baseline that was measured under other conditions.

    Raises:
        ConfigError: naming every fact that differs.
    """
    found = differences(old, new)
    if found:
        raise ConfigError(
            f"--baseline: measured under other conditions: {', '.join(found)}; expected equal"
            " ones. Measure the baseline again here, or give the same options"
        )


def differences(old: Facts, new: Facts) -> list[str]:
    """``key (old value, now new value)`` of every fact that differs."""
    return [
        f"{key} ({old.get(key)}, now {new.get(key)})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


class Change(NamedTuple):
    """One row beside the baseline's."""

    row: Row
    old: float
    new: float
    within_noise: bool
    """The quartile ranges overlap."""


def compare(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """The rows that both runs have."""
    before = {row.key: row.compared for row in old}
    changes = []
    for row in new:
        if row.key in before:
            (a, (a_low, a_high), _), (b, (b_low, b_high), _) = before[row.key], row.compared
            changes.append(Change(row, a, b, a_low <= b_high and b_low <= a_high))
    return changes
