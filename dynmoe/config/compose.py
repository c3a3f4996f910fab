"""The pre-flight of a command line: all its problems, sweeps included, in well under a second."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dynmoe.config import options, stages
from dynmoe.config.check import MEANING, problems
from dynmoe.config.sweeps import SWEEPER, Axes, problems_of, read_sweep
from dynmoe.config.targets import did_you_mean

# Of pyproject.toml, those that bring launchers and sweepers.
EXTRAS = ("joblib", "optuna", "ray", "submitit")


@dataclass
class Verdict:
    """`problems` that keep a command from running, and what Hydra should read `instead` of a text.

    Every value becomes `++key=value`: it was found right where a job uses it, but Hydra composes a
    sweep once without the swept groups as well, and there its key need not exist.
    """

    problems: list[str]
    instead: dict[str, str] = field(default_factory=dict)


def preflight(
    texts: Sequence[str], *, multirun: bool = False, config_dir: str | None = None
) -> Verdict:
    """Judge the command with the overrides `texts`.

    Of a sweep, the first value of every swept key is checked, and each other value in its place.
    """
    if config_dir is not None and not Path(config_dir).is_dir():
        return Verdict([f"--config-dir: no folder '{config_dir}'"])
    with search_path():
        overrides, found = parse(texts)
        composer = Composer(overrides, config_dir)
        known: list[Override] = []
        for override in overrides:
            unknown = composer.unknown_options(override)
            found += unknown
            known += [] if unknown else [override]
        try:
            found += _sweep_problems(composer, known, multirun)
        except MissingGroup as error:
            group = str(error)
            if not any(text.startswith(f"{group}: no option") for text in found):
                names = ", ".join(options.options(group, composer.search))
                found.append(f"{group}: required, {MEANING[group]}. Options: {names}")
            found += _whatever_the(group, composer, known, multirun)
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            found.append(_missing_plugin(str(error)) or " ".join(str(error).split()))
        values = [o for o in known if composer.is_plain_value(o)]
    return Verdict(
        list(dict.fromkeys(found)), {str(o.input_line): f"++{o.input_line}" for o in values}
    )


def _missing_plugin(message: str) -> str:
    """Of a launcher or sweeper that is not there; empty if that is not the matter."""
    text = " ".join(message.split())
    asked = re.search(r"Could not find '(hydra/(?:launcher|sweeper))/(([a-z]+)\w*)'(.*)", text)
    if asked is None:
        return ""
    group, name, family, rest = asked.groups()
    if family in EXTRAS:
        return f'{group}={name}: not installed. It comes with pip install "dynmoe[{family}]"'
    listed = re.search(r"Available options in '[^']*': (.*?) Config search path", rest)
    known = listed[1].split() if listed else []
    return f"{group}: no option '{name}'.{did_you_mean(name, known)} Options: {', '.join(known)}"


@contextmanager
def search_path() -> Iterator[None]:
    """Hydra on our configuration files, outside of hydra.main."""
    stages.register()
    with initialize_config_module("dynmoe.conf", version_base="1.3"):
        yield


def _sweep_problems(composer: Composer, overrides: Sequence[Override], multirun: bool) -> list[str]:
    for override in overrides:
        if override.key_or_group in ("sweep", "mode") and override.is_sweep_override():
            return [f"{override.key_or_group}: one at a time, start them one after the other"]
    firsts = [single for override in overrides for single in single_values(override)[:1]]
    cfg = composer.compose(firsts).cfg
    if not multirun and cfg.hydra.mode != RunMode.MULTIRUN:
        return composer.problems(firsts, multirun=False) + [
            f"{override.input_line}: several values need a sweep: add -m. "
            f"A list is written {override.key_or_group}=[...]"
            for override in overrides
            if override.is_sweep_override()
        ]
    node, name = cfg.hydra.sweeper, cfg.hydra.runtime.choices.get("sweep")
    ours = node._target_ == SWEEPER
    wrong = list(problems_of(node)) if ours else []
    if ours and not wrong:
        for values in (node.params or {}, *node.settings):
            wrong += parse([f"{key}={value}" for key, value in values.items()])[1]
    if wrong:
        return [f"sweep={name}: {text}" if name else text for text in wrong]
    sweep = read_sweep(parser(), node, overrides)
    found: list[str] = []
    for axes in sweep.axes:
        found += _axes_problems(composer, axes)
    given = {override.key_or_group for override in overrides}
    for key in sorted(given & {key for own in sweep.settings for key in own}):
        found.append(f"{key}: sweep={name} sets it. Leave it out, or write a sweep of your own")
    if "name" not in given and any(len(axes.get("task", ())) > 1 for axes in sweep.axes):
        found.append(f"name: a sweep over tasks has to name {MEANING['name']}")
    if ours:
        found += [
            f"{override.input_line}: an interval is drawn from by a search: sweep=optuna"
            for override in overrides
            if override.is_sweep_override() and not override.is_discrete_sweep()
        ]
    elif OmegaConf.select(cfg, "mode") == "plan":
        found.append("mode: a search draws its jobs as it goes, there is no plan of it")
    return found


def _axes_problems(composer: Composer, axes: Axes) -> list[str]:
    """The first value of every key, and each other value in its place."""
    singles = [parse(values)[0] for values in axes.values()]
    unknown = [text for each in singles for one in each for text in composer.unknown_options(one)]
    if unknown:
        return unknown
    firsts = [values[0] for values in singles]
    found = composer.problems(firsts, multirun=True)
    for index, values in enumerate(singles):
        for other in values[1:]:
            job = [*firsts[:index], other, *firsts[index + 1 :]]
            found += composer.problems(job, multirun=True)
    return found


def _whatever_the(
    group: str, composer: Composer, overrides: Sequence[Override], multirun: bool
) -> list[str]:
    """Problems that every choice of a group that was left out would leave."""
    ways = [
        _sweep_problems(composer, [*overrides, *parse([f"{group}={name}"])[0]], multirun)
        for name in options.options(group, composer.search)
    ]
    return [text for text in ways[0] if all(text in way for way in ways)]


# Compose what a command line asks for without stopping at its first mistake.
#
# Hydra refuses the first unknown key it meets and accepts any key behind a `+`. Here the groups are
# composed first and the values set afterwards, one by one, so that every mistake is found.

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
