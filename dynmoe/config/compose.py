"""Compose what a command line asks for without stopping at its first mistake.

Hydra refuses the first unknown key it meets and accepts any key behind a `+`. Here the groups are
composed first and the values set afterwards, one by one, so that every mistake is found.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from dynmoe.config import options
from dynmoe.config.check import problems
from dynmoe.config.source import did_you_mean

# What is had in another way than by an option of its name.
ELSEWHERE = {
    "data=ax": " AX is a test set of MNLI's models: train with data=mnli, then dynmoe-eval "
    "run=FOLDER mode=submit."
}


class MissingGroup(Exception):
    """A group without a default, `args[0]`, was given no option."""


def parser() -> OverridesParser:
    """Hydra's; it knows the groups."""
    return OverridesParser.create(config_loader=options.loader())


def parse(texts: Sequence[str]) -> tuple[list[Override], list[str]]:
    """The overrides that can be read, and a message for each that cannot."""
    parsed: list[Override] = []
    found: list[str] = []
    for text in texts:
        try:
            parsed += parser().parse_overrides([text])
        except OverrideParseException:
            found.append(
                f"{text}: cannot be read as key=value. Quote special characters: 'k=\"v\"'"
            )
    return parsed, found


def single_values(override: Override) -> list[Override]:
    """The overrides that a sweep goes through; none for an interval, whose values are drawn."""
    if not override.is_sweep_override():
        return [override]
    if not override.is_discrete_sweep():
        return []
    key = override.get_key_element()
    return parse([f"{key}={value}" for value in override.sweep_string_iterator()])[0]


@dataclass
class Composition:
    """A configuration, what could not be set in it, and the keys that were not there before."""

    cfg: DictConfig
    found: list[str]
    added: list[Override]


class Composer:
    """Composes overrides; equal choices of groups are read from files once."""

    def __init__(self, overrides: Sequence[Override], config_dir: str | None) -> None:
        self.search = _search_override(overrides, config_dir)
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def options(self, override: Override) -> list[str]:
        """Options of the group that `override` chooses from; empty where it sets a value."""
        if override.is_hydra_override() or "." in override.key_or_group:
            return []
        return options.options(override.key_or_group, self.search)

    def is_plain_value(self, override: Override) -> bool:
        """Whether `override` is key=value, neither a group, nor Hydra's, nor behind a + or ~."""
        plain = override.type == OverrideType.CHANGE and not override.is_hydra_override()
        return plain and not self.options(override)

    def unknown_options(self, override: Override) -> list[str]:
        """A message for each option that its group does not have."""
        names = self.options(override)
        if not names or override.is_delete():
            return []
        chosen: list[str] = []
        for single in single_values(override):
            value = single.value()
            if value is None:
                group = override.key_or_group
                return [f"{group}: null is no option; ~{group} leaves the group out"]
            chosen += map(str, value if isinstance(value, list) else [value] if value else [])
        group = override.key_or_group
        return [
            f"{group}: no option '{name}'."
            f"{ELSEWHERE.get(f'{group}={name}') or did_you_mean(name, names)} "
            f"Options: {', '.join(names)}"
            for name in dict.fromkeys(chosen)
            if name not in names
        ]

    def problems(self, overrides: Sequence[Override], *, multirun: bool) -> list[str]:
        """What is wrong with single-valued `overrides` and the configuration they make."""
        made = self.compose(overrides)
        found = made.found + problems(made.cfg, multirun=multirun)
        return found + list(_unexpected(made.added, found))

    def compose(self, overrides: Sequence[Override]) -> Composition:
        """Raises MissingGroup, or HydraException where the groups do not go together."""
        groups: list[str] = []
        values: list[Override] = []
        for override in overrides:
            if override.key_or_group == "hydra.searchpath":
                continue
            if override.is_hydra_override() or self.options(override):
                groups.append(str(override.input_line))
            else:
                values.append(override)
        made = Composition(copy.deepcopy(self._groups((*self.search, *groups))), [], [])
        for override in values:
            _set(made, override)
        return made

    def _groups(self, lines: tuple[str, ...]) -> DictConfig:
        if lines not in self._composed:
            try:
                cfg = compose(options.CONFIG_NAME, list(lines), return_hydra_config=True)
            except HydraException as error:
                missing = re.match(r"You must specify '([^']+)'", str(error))
                if missing:
                    raise MissingGroup(missing[1]) from error
                raise
            self._composed[lines] = cfg
        return self._composed[lines]


def _search_override(overrides: Sequence[Override], config_dir: str | None) -> list[str]:
    """--config-dir and the command line's hydra.searchpath as one override."""
    folders = [f"file://{Path(config_dir).absolute()}"] if config_dir else []
    for override in overrides:
        value = override.value()
        if override.key_or_group == "hydra.searchpath" and isinstance(value, list):
            folders += map(str, value)
    quoted = ",".join(f"'{folder}'" for folder in folders)
    return [f"hydra.searchpath=[{quoted}]"] if folders else []


def _set(made: Composition, override: Override) -> None:
    """Set or delete one value; what Hydra would refuse becomes a message."""
    key, value, cfg = override.key_or_group, override.value(), made.cfg
    parent, name = _parent(cfg, key)
    there = name in _keys(parent)
    if override.is_delete():
        if not there:
            near = did_you_mean(name, _keys(parent))
            made.found.append(f"~{key}: there is no such key to delete.{near}")
            return
        with open_dict(parent):
            del parent[name]
        return
    if override.is_add() and there and not isinstance(value, list | dict):
        made.found.append(f"+{key}: the key is there already. Leave out the +")
    if not there and not override.is_add() and not override.is_force_add():
        made.added.append(override)
    try:
        OmegaConf.update(cfg, key, value, merge=True, force_add=True)
    except (OmegaConfBaseException, IndexError, ValueError) as error:  # of a list's index
        made.found.append(f"{key}: cannot be set: {str(error).splitlines()[0]}")


def _parent(cfg: DictConfig, key: str) -> tuple[Any, str]:
    """The node that holds `key`, None where there is none, and the last part of `key`."""
    above, _, name = key.rpartition(".")
    try:
        return (OmegaConf.select(cfg, above) if above else cfg), name
    except OmegaConfBaseException:
        return None, name


def _keys(node: Any) -> list[str]:
    """Keys of a mapping, those of missing values included, or indices of a list."""
    if isinstance(node, DictConfig):
        return [str(key) for key in node]
    return [str(index) for index in range(len(node))] if isinstance(node, ListConfig) else []


def _unexpected(added: Sequence[Override], found: Sequence[str]) -> Iterator[str]:
    """Keys that Hydra adds only behind a +, unless something is already said about them."""
    for override in added:
        key = override.key_or_group
        parts = key.split(".")
        paths = tuple(".".join(parts[: n + 1]) + ":" for n in range(len(parts)))
        if not any(text.startswith(paths) for text in found):
            yield f"{key}: not in this configuration. To add it write +{override.input_line}"
