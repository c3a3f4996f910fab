"""The jobs of one sweep: each a configuration, and the folder its run lives in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynmoe.records import RunFolder, State


@dataclass(frozen=True)
class Job:
    overrides: tuple[str, ...]
    """As Hydra launches it."""
    label: str
    """The overrides that tell it from the other jobs."""
    setting: str
    """Those of its setting alone, without seeds and test environments."""
    folder: RunFolder
    config: Mapping[str, Any]
    """What can change its result (dynmoe/config/identity.py, `flat`)."""
    steps: int
    """-1: those of some epochs, which the run counts once it has read its data."""
    eval_every: int | None
    """None: an epoch."""

    @property
    def name(self) -> str:
        return self.folder.path.name

    @property
    def state(self) -> State:
        return self.folder.state


def labels(jobs: Sequence[tuple[str, ...]]) -> list[str]:
    """Of each job the overrides that not all jobs share."""
    shared = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    return [" ".join(text.lstrip("+") for text in job if text not in shared) for job in jobs]
