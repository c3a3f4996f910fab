"""The jobs of a sweep: settings x parameters, as overrides.

A sweep over (experts, top-k), a dense model and DynMoE is no product of values: `moe.top_k` exists
for some mixtures only. So `hydra.sweeper.settings` lists what belongs together, and
`hydra.sweeper.params`, with what the command line sweeps, multiplies each of them. Settings of
`hydra.sweeper.unless_causal` are left out where the model is causal and their router is refused for
it. `hydra.sweeper.target_k` is a number, or several, that settings refer to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

# Runs that differ only in these keys repeat one setting.
REPETITION = ("seed", "trial_seed", "hparams_seed", "data.test_envs")

SWEEPER = "hydra_plugins.dynmoe_sweeper.DynMoESweeper"
KEYS = ("_target_", "max_batch_size", "target_k", "params", "settings", "unless_causal")

Axes = dict[str, list[str]]
"""The overrides of each key, one per value: {"seed": ["seed=0", "seed=1"]}."""


@dataclass(frozen=True)
class SweepJob:
    overrides: tuple[str, ...]
    label: str
    """The overrides that not all jobs share."""
    setting: str
    """The overrides that name its setting, without those of all jobs and without repetitions."""
    unless_causal: bool = False
    """Whether it is left out where its router is refused for a causal model."""


@dataclass(frozen=True)
class Sweep:
    settings: list[Axes]
    """The keys of each setting; they win over `shared`."""
    shared: Axes
    """From `params` and, over them, the command line."""
    unless_causal: int = 0
    """Number of settings, the last ones, that causal models may refuse."""

    @property
    def axes(self) -> list[Axes]:
        """All keys of each setting, its own first."""
        return [
            own | {k: v for k, v in self.shared.items() if k not in own} for own in self.settings
        ]

    @property
    def conditions(self) -> list[bool]:
        """Whether causal models may refuse a setting, for each of them."""
        always = len(self.settings) - self.unless_causal
        return [index >= always for index in range(len(self.settings))]

    @property
    def base(self) -> list[str]:
        """The overrides that every job has."""
        return [each[0] for each in self.shared.values() if len(each) == 1]

    @property
    def jobs(self) -> list[SweepJob]:
        """All jobs, equal ones once.

        All settings of the first seed come first, so that an unfinished sweep can be compared.
        """
        several = [key for key, each in self.shared.items() if len(each) > 1]
        found: dict[tuple[str, ...], tuple[list[int], str, bool]] = {}
        for own, axes, may_be_refused in zip(
            self.settings, self.axes, self.conditions, strict=True
        ):
            telling = {*own, *several} - set(REPETITION)
            for values in itertools.product(*axes.values()):
                job = dict(zip(axes, values, strict=True))
                setting = _text(text for key, text in job.items() if key in telling)
                turn = [self.shared[key].index(job[key]) for key in several if key not in own]
                found.setdefault(values, (turn, setting, may_be_refused))
        shared = set.intersection(*map(set, found)) if len(found) > 1 else set()
        return [
            SweepJob(
                job, _text(each for each in job if each not in shared), setting, may_be_refused
            )
            for job, (_, setting, may_be_refused) in sorted(
                found.items(), key=lambda item: item[1][0]
            )
        ]


def _text(overrides: Iterable[str]) -> str:
    return " ".join(override.lstrip("+") for override in overrides)


def read_sweep(parser: OverridesParser, sweeper: DictConfig, given: Sequence[Override]) -> Sweep:
    """The sweep of a sweeper's node without `sweeper_problems`, and of a command line."""
    node = OmegaConf.to_container(sweeper, resolve=True)
    assert isinstance(node, dict)
    always, others = node.get("settings") or [], node.get("unless_causal") or []
    return Sweep(
        [_parsed_axes(parser, setting) for setting in [*always, *others] or [{}]],
        _parsed_axes(parser, node.get("params") or {}) | _axes(given),
        len(others),
    )


def sweeper_problems(sweeper: DictConfig) -> Iterator[str]:
    """Mistakes in the shape of our sweeper's node."""
    node = OmegaConf.to_container(sweeper)
    assert isinstance(node, dict)
    for key in map(str, node):
        if key not in KEYS:
            yield f"hydra.sweeper.{key}: unknown key. Known: {', '.join(KEYS[1:])}"
    size = node.get("max_batch_size")
    if size is not None and not (isinstance(size, int) and size >= 1):
        yield f"hydra.sweeper.max_batch_size: expected null, or 1 or more, found {size}"
    target = node.get("target_k")
    if target is not None and not all(map(_is_positive, str(target).split(","))):
        several = "or several, \"hydra.sweeper.target_k='1,2'\""
        yield f"hydra.sweeper.target_k: expected a number above 0, {several}; found {target}"
    params = node.get("params")
    if params is not None:
        yield from _mapping_problems("hydra.sweeper.params", params)
    for key in ("settings", "unless_causal"):
        place, settings = f"hydra.sweeper.{key}", node.get(key, [])
        if not isinstance(settings, list):
            yield f"{place}: expected a list of {{key: 'value,value'}}, found {settings}"
            continue
        for index, setting in enumerate(settings):
            yield from _mapping_problems(f"{place}[{index}]", setting)


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _mapping_problems(place: str, node: Any) -> Iterator[str]:
    if not isinstance(node, dict):
        yield f"{place}: expected {{key: 'value,value'}}, found {node}"
        return
    for key, value in node.items():
        if isinstance(value, list):
            several = ",".join(map(str, value))
            yield (
                f"{place}.{key}: expected text, found a list. Several values are written "
                f"'{several}', one that is a list '[{several}]'"
            )
        elif value is None:
            yield f"{place}.{key}: expected text, found null. The value null is written 'null'"
        elif isinstance(value, dict):
            yield f"{place}.{key}: expected text, found a mapping. It is written '{{key: value}}'"


def _parsed_axes(parser: OverridesParser, values: Mapping[str, Any]) -> Axes:
    return _axes(parser.parse_overrides([f"{key}={value}" for key, value in values.items()]))


def _axes(overrides: Sequence[Override]) -> Axes:
    axes = {override.key_or_group: each_value(override) for override in overrides}
    return {key: each for key, each in axes.items() if each}


def each_value(override: Override) -> list[str]:
    """One override per value; none for an interval, from which only a search can draw."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        return []
    key = override.get_key_element()
    return [f"{key}={value}" for value in override.sweep_string_iterator()]
