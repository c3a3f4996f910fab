"""The runs below a folder, read from their records, and what makes two of them comparable.

Runs of one problem (data set, protocol, selection rule) are comparable. Within it, a *setting* is
the configuration without seeds and test environments: the runs of one setting differ in chance
alone, and only they are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dynmoe.metrics.selection import selected
from dynmoe.report.records import Record, RunFolder

Kind = Literal["dense", "fixed", "adaptive"]

# What distinguishes repetitions of one setting.
REPETITION = ("seed", "trial_seed", "data.test_envs")


class Problem(NamedTuple):
    """What a table is about; all its cells share it."""

    dataset: str
    protocol: str
    selection: str


@dataclass(frozen=True)
class Outcome:
    """What is reported of a run: the model at the step that the selection rule chose."""

    step: int
    accuracy: float
    """On the test environment's in split, in [0, 1]."""
    validation: float
    """Mean out-split accuracy of the training environments, in [0, 1]."""
    is_selected: bool
    """False where the rule cannot decide within one run; then `step` is the last one."""


@dataclass(frozen=True)
class Run:
    """One finished run."""

    folder: RunFolder
    facts: Record
    """`run.json`."""
    results: list[Record]
    setting: str = ""
    """Its setting's name, unique within the problem; `read_runs` gives it."""

    @property
    def config(self) -> dict[str, Any]:
        """Dotted keys and values of all that can change the result."""
        return self.facts["config"]

    @property
    def problem(self) -> Problem:
        return Problem(*(self.facts[key] for key in Problem._fields))

    @property
    def environment(self) -> str:
        """The test environment's name; several are joined by `+`."""
        return "+".join(self.facts["env_names"][index] for index in self.facts["test_envs"])

    @property
    def repetition(self) -> tuple[int, int]:
        """(seed, trial seed): runs of different settings with equal ones are matched."""
        return self.facts["seed"], self.facts["trial_seed"]

    @property
    def kind(self) -> Kind:
        """`adaptive`: training adds and removes experts; `fixed`: a mixture that stays as it is."""
        if self.facts["config"].get("moe.router", "") is None:
            return "dense"
        fixed = self.facts["config"].get("moe.adaptation", "") is None
        return "fixed" if fixed else "adaptive"

    @cached_property
    def outcome(self) -> Outcome:
        facts = self.facts
        chosen = selected(self.results, facts["selection"], facts["test_envs"])
        record = self.results[-1] if chosen is None else chosen
        tests = facts["test_envs"]
        others = [index for index in range(len(facts["env_names"])) if index not in tests]
        return Outcome(
            record["step"],
            accuracy=_mean(record[f"env{index}_in_acc"] for index in tests),
            validation=_mean(record[f"env{index}_out_acc"] for index in others),
            is_selected=chosen is not None,
        )

    @cached_property
    def routing(self) -> list[Record]:
        return self.folder.read("routing")

    @cached_property
    def events(self) -> list[Record]:
        return self.folder.read("events")


@dataclass(frozen=True)
class Absent:
    """A run that a sweep asks for and that has no result yet."""

    name: str
    """Of its folder."""
    overrides: str
    state: str
    """missing, stopped, running or failed"""
    why: str
    """The first line of what it failed with; empty otherwise."""


@dataclass(frozen=True)
class Collection:
    """All that the given folders hold."""

    folders: list[Path]
    runs: list[Run]
    absent: list[Absent]
    warnings: list[str]


def read_runs(folders: Sequence[Path]) -> Collection:
    """Finished runs in the folders, which are sweeps, or runs themselves.

    Raises:
        RecordError: a folder that holds no run, or a damaged record.
    """
    raise NotImplementedError


def short_name(run: Run) -> str:
    """What the mixture is called: `dense`, `top-2 of 8`, `GMoE top-1 of 6`, `DynMoE`."""
    config = run.config
    if run.kind == "dense":
        return "dense"
    if run.kind == "adaptive":
        return str(config["moe.algorithm"])
    own = "" if config["moe.algorithm"] == "TopK" else f"{config['moe.algorithm']} "
    return f"{own}top-{config['moe.top_k']} of {config['moe.num_experts']}"


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else math.nan
