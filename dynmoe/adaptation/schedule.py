"""When routing is recorded and experts are updated, in optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Windows of ``length`` steps that begin at ``start`` and then every ``period``; the update
    follows a window's last step. ``unit="epoch"`` gives all three as fractions of an epoch: the
    paper's language runs record from 1/3 to 2/3 of every epoch (start 1/3, length 1/3, period 1).

    Raises:
        ValueError: a window that is empty, or longer than the period.
    """

    start: float
    length: float
    period: float
    unit: Literal["step", "epoch"] = "step"

    def __post_init__(self) -> None:
        if not (self.start >= 0 and 0 < self.length <= self.period):
            raise ValueError(
                f"expected start >= 0 and 0 < length <= period, found start={self.start}, "
                f"length={self.length}, period={self.period}"
            )

    def in_steps(self, steps_per_epoch: int) -> Schedule:
        """The same schedule in whole optimizer steps, at least one step long.

        The period of an epoch schedule is rounded to whole steps once, so windows never drift
        apart from each other.
        """
        if self.unit == "step":
            return self
        length = max(1, round(self.length * steps_per_epoch))
        return Schedule(
            start=round(self.start * steps_per_epoch),
            length=length,
            period=max(length, round(self.period * steps_per_epoch)),
        )

    def records(self, step: int) -> bool:
        """Whether 0-based optimizer step ``step`` lies in a window."""
        return step >= self.start and (step - self.start) % self.period < self.length

    def updates_after(self, step: int) -> bool:
        """Whether ``step`` is the last one of a window."""
        return step >= self.start and (step - self.start) % self.period == self.length - 1
