"""When experts come and go, and which: a schedule and a pure decision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

Unit = Literal["step", "epoch"]
GrowthUnit = Literal["share", "step"]


@dataclass(frozen=True)
class Schedule:
    """When routing is recorded and experts are updated, in optimizer steps.

    Windows of ``length`` steps begin at ``start`` and then every ``period``; the update follows a
    window's last step. ``unit="epoch"`` gives all three as fractions of an epoch: the
    paper's language runs record from 1/3 to 2/3 of every epoch (start 1/3, length 1/3, period 1).

    Raises:
        ValueError: a window that is empty, longer than the period, or of a part of a step; another
            unit.
    """

    start: float
    length: float
    period: float
    unit: Unit = "step"

    def __post_init__(self) -> None:
        one_of("unit", self.unit, get_args(Unit))
        found = f"found start={self.start}, length={self.length}, period={self.period}"
        numbers = (self.start, self.length, self.period)
        if not (self.start >= 0 and 0 < self.length <= self.period < math.inf):
            raise ValueError(f"expected start >= 0 and 0 < length <= period, {found}")
        # NOTE: a window of 2.5 steps would have no last step, and no update would ever follow it.
        if self.unit == "step" and any(number % 1 for number in numbers):
            raise ValueError(
                f"expected whole steps, {found}. Parts of an epoch are given with unit='epoch'"
            )

    @property
    def first_update(self) -> float:
        """Optimizer steps that are done when experts first change; epochs with that unit."""
        return self.start + self.length

    def never_updates(self, steps: float) -> str | None:
        """Say why a schedule in steps changes no expert in a training of ``steps`` steps."""
        if self.first_update <= steps:
            return None
        return (
            f"The experts never change: the first update is after {self.first_update:.0f} "
            f"optimizer steps (start {self.start:.0f}, length {self.length:.0f}), the training "
            f"has {steps:.0f}. Give a smaller start or length, or train longer"
        )

    def in_steps(self, steps_per_epoch: int) -> Schedule:
        """Return the same schedule in whole optimizer steps, at least one step long.

        The period of an epoch schedule is rounded to whole steps once, so that all windows are
        equally far apart.
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
        """Tell whether 0-based optimizer step ``step`` lies in a window."""
        return step >= self.start and (step - self.start) % self.period < self.length

    def updates_after(self, step: int) -> bool:
        """Tell whether ``step`` is the last one of a window."""
        return step >= self.start and (step - self.start) % self.period == self.length - 1


FEWEST_WARMUP, FEWEST_WINDOW = 30, 60
"""Gradient norms of a warm-up and a window that are given as shares; of MASS's language code."""


@dataclass(frozen=True)
class GrowthSchedule:
    """How long experts may be split, and by how many gradient norms their drift is judged (MASS).

    Experts are split in the first ``until`` steps. An expert is judged by its last ``window``
    norms, each compared with those before it from the ``warmup``-th on. ``unit="share"`` gives all
    three as shares of the training; then warm-up and window have at least 30 and 60 steps.

    Raises:
        ValueError: a share that is none, a part of a step, fewer than 2 norms; another unit.
    """

    until: float
    warmup: float
    window: float
    unit: GrowthUnit = "share"

    def __post_init__(self) -> None:
        one_of("unit", self.unit, get_args(GrowthUnit))
        found = f"found until={self.until}, warmup={self.warmup}, window={self.window}"
        numbers = (self.until, self.warmup, self.window)
        if self.unit == "share":
            if not all(0 < number <= 1 for number in numbers):
                raise ValueError(
                    f"expected shares of the training, above 0 and up to 1, {found}. "
                    "Steps are given with unit='step'"
                )
        elif any(number % 1 for number in numbers) or self.until < 1 or min(numbers[1:]) < 2:
            # A standard deviation needs two numbers.
            raise ValueError(
                "expected whole steps, until from 1 and the others from 2 on, "
                f"{found}. Shares of the training are given with unit='share'"
            )

    @property
    def first_split(self) -> float:
        """Optimizer steps, this one included, up to the first in which an expert may be split."""
        return max(self.warmup, self.window)

    def in_steps(self, num_steps: float) -> GrowthSchedule:
        """Return the same schedule in optimizer steps of a training of ``num_steps``.

        Raises:
            ValueError: shares of a training whose length is not known.
        """
        if self.unit == "step":
            return self
        if math.isinf(num_steps):
            raise ValueError(
                "until, warmup and window are shares of a training whose number of steps is not "
                "known. Give them in steps, with unit='step'"
            )
        return GrowthSchedule(
            max(1, int(self.until * num_steps)),
            max(FEWEST_WARMUP, int(self.warmup * num_steps)),
            max(FEWEST_WINDOW, int(self.window * num_steps)),
            "step",
        )

    def never_splits(self, steps: float) -> str | None:
        """Say why a schedule in steps splits no expert in a training of ``steps`` steps."""
        last = min(self.until, steps)
        if self.first_split <= last:
            return None
        return (
            f"No expert is ever split: the first may be in optimizer step {self.first_split:.0f} "
            f"(warmup {self.warmup:.0f}, window {self.window:.0f}), splits end after step "
            f"{last:.0f}. Give a smaller window or warmup with unit=step, a later until, or train "
            "longer"
        )


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuse an argument that is none of ``choices``.

    Raises:
        ValueError: naming them.
    """
    # NOTE: 1 == True, and an unhashable value is no choice either.
    if not any(type(value) is type(each) and value == each for each in choices):
        raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, found {value!r}")


class Decision(NamedTuple):
    """Slots to empty, and the slot that gets a new expert."""

    remove: tuple[int, ...]
    add: int | None


def decide(
    load: Mapping[int, int],
    unserved: int,
    num_slots: int,
    min_experts: int = 1,
    remove_below: float = 0.0,
) -> Decision:
    """Make one update of DynMoE's Algorithm 1 (arXiv 2405.14297) for one layer.

    A pure function of one window's counts.

    ``load`` maps every living slot to the tokens that chose it in the window; ``unserved`` is the
    number of tokens that chose none. Experts without a token go, or with a load below the share
    ``remove_below`` of the mean load (ours), except that ``min_experts`` stay (those with most
    tokens, then lowest slots). One expert is added if any token was unserved and a slot is free, in
    the lowest free slot, those just emptied included. A window without any token decides nothing.
    """
    if sum(load.values()) + unserved == 0:
        return Decision((), None)
    least = remove_below * sum(load.values()) / len(load)
    idle = [slot for slot in sorted(load) if load[slot] == 0 or load[slot] < least]
    must_stay = max(0, min_experts - (len(load) - len(idle)))
    idle.sort(key=lambda slot: -load[slot])  # stable: lowest slots first among equals
    remove = tuple(sorted(idle[must_stay:]))
    free = [slot for slot in range(num_slots) if slot not in load or slot in remove]
    add = free[0] if unserved > 0 and free else None
    return Decision(remove, add)
