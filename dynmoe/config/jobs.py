"""What a sweep runs: settings x parameters, as the overrides of its jobs.

A sweep over (experts, top-k), a dense model and DynMoE is no product of values: `moe.top_k` exists
for some mixtures alone. So `hydra.sweeper.settings` lists what belongs together, and
`hydra.sweeper.params`, with what the command line sweeps, multiplies each of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

Axes = dict[str, list[str]]
"""Of every key the overrides it takes in turn: {"seed": ["seed=0", "seed=1"]}."""


def job_axes(parser: OverridesParser, sweeper: DictConfig, given: Sequence[Override]) -> list[Axes]:
    """The axes of each setting. The command line, `given`, wins over `params`, a setting over both.

    An interval, which only a search can draw from, is no axis.
    """
    node = OmegaConf.to_container(sweeper, resolve=True)
    assert isinstance(node, dict)
    shared = _read(parser, node.get("params") or {}) | _axes(given)
    settings = [_read(parser, setting) for setting in node.get("settings") or [{}]]
    return [
        {key: each for key, each in (own | shared | own).items() if each}  # own keys stand first
        for own in settings
    ]


def jobs(axes: Sequence[Axes]) -> list[list[str]]:
    """The overrides of every job; equal jobs count once.

    All settings of the first seed come first, so that an unfinished sweep can be compared.
    """
    common = [key for key in axes[0] if all(each.get(key) == axes[0][key] for each in axes)]
    every = [
        dict(zip(each, job, strict=True))
        for each in axes
        for job in itertools.product(*each.values())
    ]
    every.sort(key=lambda job: [axes[0][key].index(job[key]) for key in common])
    return [list(job) for job in dict.fromkeys(tuple(job.values()) for job in every)]


def _read(parser: OverridesParser, values: Mapping[str, Any]) -> Axes:
    return _axes(parser.parse_overrides([f"{key}={value}" for key, value in values.items()]))


def _axes(overrides: Sequence[Override]) -> Axes:
    return {override.key_or_group: _each(override) for override in overrides}


def _each(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        return []
    key = override.get_key_element()
    return [f"{key}={value}" for value in override.sweep_string_iterator()]
