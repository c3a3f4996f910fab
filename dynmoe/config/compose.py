"""The pre-flight of a command line: all its problems, sweeps included, in well under a second."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dynmoe.config import options, runs
from dynmoe.config.check import ELSEWHERE, MEANING, WRITTEN, problems
from dynmoe.config.models import causal_model
from dynmoe.config.options import read
from dynmoe.config.searches import draws, empty_range, hint, search_problems
from dynmoe.config.shared import Shared
from dynmoe.config.sweeps import SWEEPER, Axes, each_value, read_sweep, sweeper_problems
from dynmoe.config.targets import did_you_mean

# Extras of pyproject.toml that bring launchers and sweepers.
EXTRAS = ("joblib", "optuna")

LAUNCHERS = ("ray", "submitit_local", "submitit_slurm")  # files of conf/hydra/launcher


class MissingGroup(Exception):
    """A group without a default, `args[0]`, was given no option."""


@dataclass
class Verdict:
    """`problems` that keep a command from running, the text Hydra reads `instead` of another, and
    the `composer` that has checked it.

    Every value becomes `++key=value`: each job has its key, but Hydra also composes a sweep once
    without the swept groups, and there the key need not exist.
    """

    problems: list[str]
    instead: dict[str, str] = field(default_factory=dict)
    composer: Composer | None = None


def preflight(
    texts: Sequence[str], *, multirun: bool = False, config_dir: str | None = None
) -> Verdict:
    """Check the command with the overrides `texts`.

    In a sweep the first value of every swept key is checked, and each other value in its place.
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
            found += _problems_for_every_option(group, composer, known, multirun) if known else []
        except UnicodeDecodeError as error:
            files = [file for folder in composer.folders for file in folder.rglob("*.yaml")]
            wrong = [str(file) for file in files if not _is_utf8(file)]
            found.append(f"{', '.join(wrong)}: is not UTF-8 text ({error.reason})")
        except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
            found.append(_missing_plugin(str(error)) or " ".join(str(error).split()))
        instead = {
            str(override.input_line): f"++{override.input_line}"
            for override in known
            if override.type == OverrideType.CHANGE  # neither a + nor a ~
            if not (override.is_hydra_override() or composer.options(override))
        }
    return Verdict(list(dict.fromkeys(found)), instead, composer)


def _is_utf8(file: Path) -> bool:
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _missing_plugin(message: str) -> str:
    """The problem of an unknown launcher or sweeper; empty if the error is about something else."""
    text = " ".join(message.split())
    asked = re.search(r"Could not find '(hydra/(?:launcher|sweeper))/(([a-z]+)\w*)'(.*)", text)
    if asked is None:
        return ""
    group, name, family, rest = asked.groups()
    if family in EXTRAS:
        return f'{group}={name}: not installed. It comes with pip install -e ".[{family}]"'
    listed = re.search(r"Available options in '[^']*': (.*?) Config search path", rest)
    known = listed[1].split() if listed else []
    return f"{group}: no option '{name}'.{did_you_mean(name, known)} Options: {', '.join(known)}"


def own_launchers() -> None:
    """Let conf/hydra/launcher hold where hydra-submitit-launcher or hydra-ray-launcher are, too:
    Hydra checks a file against what they register by its name."""
    Plugins.instance()  # which registers them
    registered: Any = ConfigStore.instance().repo.get("hydra", {})
    for name in LAUNCHERS:
        registered.get("launcher", {}).pop(f"{name}.yaml", None)


@contextmanager
def search_path() -> Iterator[None]:
    """Hydra on our configuration files, outside of hydra.main."""
    runs.register()
    own_launchers()
    with initialize_config_module("dynmoe.conf", version_base="1.3"):
        options.read_files_once(options.loader())
        yield


def _sweep_problems(composer: Composer, overrides: Sequence[Override], multirun: bool) -> list[str]:
    for override in overrides:
        if override.key_or_group in ("sweep", "mode") and override.is_sweep_override():
            return [f"{override.key_or_group}: one at a time, start them one after the other"]
    firsts = [single for override in overrides for single in single_values(override, 1)]
    made = composer.compose(firsts)
    cfg = made.cfg
    composer.mode = cfg.hydra.mode
    if not multirun and cfg.hydra.mode != RunMode.MULTIRUN:
        return made.problems(multirun=False) + [
            f"{override.input_line}: several values need a sweep: add -m. "
            f"A list is written {override.key_or_group}=[...]"
            for override in overrides
            if override.is_sweep_override()
        ]
    node, name = cfg.hydra.sweeper, cfg.hydra.runtime.choices.get("sweep")
    ours = node._target_ == SWEEPER
    wrong = list(sweeper_problems(node) if ours else search_problems(node))
    for values in () if wrong else _swept(node):
        wrong += parse([f"{key!s}={value}" for key, value in values.items()])[1]
    if wrong:
        return [f"sweep={name}: {text}" if name else text for text in wrong]
    if ours:
        found, more = list[str](), _grid_problems(composer, node, overrides)
        for text in more:
            found.append(text)
            if ": required, " not in text:  # which would be so with any task
                return _for_another_task(composer, overrides) or [*found, *more]
        return found
    if OmegaConf.select(cfg, "mode") == "plan":
        return ["mode: a search draws its jobs one after another and cannot list them first"]
    given = [f"{key!s}={value}" for values in _swept(node) for key, value in values.items()]
    return _draws_problems(composer, [*parse(given)[0], *overrides])


def _swept(node: DictConfig) -> list[DictConfig]:
    """The parameters and settings of a sweeper's node."""
    settings = [*(node.get("settings") or ()), *(node.get("unless_causal") or ())]
    return [node.get("params") or OmegaConf.create(), *settings]


def _grid_problems(
    composer: Composer, node: DictConfig, overrides: Sequence[Override]
) -> Iterator[str]:
    """Problems of a sweep whose jobs are known."""
    sweep, name = read_sweep(parser(), node, overrides), _choice(overrides, "sweep")
    settings = zip(sweep.settings, sweep.axes, sweep.conditions, strict=True)
    for index, (own, axes, unless_causal) in enumerate(settings):
        # Values that settings share are tried beside the first; the sweeper checks every job.
        once = {key: each if key in own or not index else each[:1] for key, each in axes.items()}
        yield from (text for _, text in _tried(composer, once, unless_causal=unless_causal))
    given = {override.key_or_group for override in overrides}
    for key in sorted(given & {key for own in sweep.settings for key in own}):
        yield f"{key}: sweep={name} sets it. Leave it out, or write another sweep"
    if "name" not in given and any(len(axes.get("task", ())) > 1 for axes in sweep.axes):
        yield f"name: a sweep over tasks has to name {MEANING['name']}"
    for override in overrides:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            yield f"{override.input_line}: only a search draws from an interval: sweep=optuna"


def _for_another_task(composer: Composer, overrides: Sequence[Override]) -> list[str]:
    """Say for which task a sweep is that has problems with the chosen one, whatever else is set."""
    sweep, task = _choice(overrides, "sweep"), _choice(overrides, "task")
    if not (isinstance(sweep, str) and isinstance(task, str)):
        return []

    def fits(name: str) -> bool:
        alone, _ = parse([f"sweep={sweep}", f"task={name}"])
        node = composer.compose(alone).cfg.hydra.sweeper
        return not any(_grid_problems(composer, node, alone))

    if fits(task):
        return []
    others = [name for name in options.options("task", composer.search) if name != task]
    fitting = [name for name in others if fits(name)]
    meant = " or ".join(f"task={name}" for name in fitting)
    return [f"sweep={sweep} is for {meant}, found task={task}"] if fitting else []


def _draws_problems(composer: Composer, overrides: Sequence[Override]) -> list[str]:
    """Problems of a search: the first value of every key, and each other that it can draw."""
    last = {override.key_or_group: override for override in overrides}
    values = {key: draws(override) for key, override in last.items()}
    found: list[str] = []
    for key, text in _tried(composer, values):
        key = key or next((each for each in last if text.startswith(f"{each}:")), "")
        more = hint(last[key]) if key in last else ""
        found.append(f"{last[key].input_line}: {text}{more}" if more else text)
    return found


def _choice(overrides: Sequence[Override], group: str) -> Any:
    return next((each.value() for each in overrides if each.key_or_group == group), None)


def _tried(
    composer: Composer, axes: Axes, *, unless_causal: bool = False
) -> Iterator[tuple[str, str]]:
    """Problems of the first value of every key, and of each other value in its place; each with the
    key whose value is not the first. `unless_causal`: a causal model that refuses is none."""
    singles = {key: parse(values)[0] for key, values in axes.items()}
    unknown = [
        text for each in singles.values() for one in each for text in composer.unknown_options(one)
    ]
    yield from (("", text) for text in unknown)
    if unknown:
        return
    firsts = {key: values[0] for key, values in singles.items()}
    jobs = [("", firsts)]
    for key, values in singles.items():
        jobs += [(key, {**firsts, key: other}) for other in values[1:]]
    for key, job in jobs:
        with composer.shared.job(list(job.values())) as made:
            if not (unless_causal and any(causal_model(made.cfg))):
                yield from ((key, text) for text in made.problems(multirun=True))


def _problems_for_every_option(
    group: str, composer: Composer, overrides: Sequence[Override], multirun: bool
) -> list[str]:
    """Problems that remain whichever option of a missing group is chosen."""
    found: list[str] | None = None
    for name in options.options(group, composer.search):
        way = _sweep_problems(composer, [*overrides, *parse([f"{group}={name}"])[0]], multirun)
        found = way if found is None else [text for text in found if text in way]
        if not found:  # the other options, half a second each, can add none
            break
    return found or []


# Composition that does not stop at the first mistake. Hydra refuses the first unknown key and
# accepts any key after a `+`; here groups are composed first and values set one by one.


NO_KEY = "expected key=value or group=option."


def parser() -> OverridesParser:
    """Hydra's parser, which knows the groups."""
    return OverridesParser.create(config_loader=options.loader())


def parse(texts: Sequence[str]) -> tuple[list[Override], list[str]]:
    """The overrides that can be read, and a message for each that cannot."""
    parsed: list[Override] = []
    found: list[str] = []
    reader = parser()
    for text in texts:
        try:
            (override,) = reader.parse_overrides([text])
            wrong = empty_range(override)
        except (OverrideParseException, ValueError):  # of range(), which Python makes
            wrong = _unreadable(text)
        if wrong or not override.key_or_group:
            found.append(f"{text}: {wrong or NO_KEY}")
        else:
            parsed.append(override)
    return parsed, found


def _unreadable(text: str) -> str:
    key, equals, value = text.partition("=")
    if not equals:
        groups = [group for group, names in options.groups().items() if text in names]
        meant = f" Did you mean {' or '.join(f'{each}={text}' for each in groups)}?"
        return NO_KEY + meant * bool(groups)
    quoted = value.replace('"', "")
    return f"cannot be read as key=value. Quote special characters: '{key}=\"{quoted}\"'"


def single_values(override: Override, first: int | None = None) -> list[Override]:
    """The overrides of one key that a sweep goes through, or the `first` of them; none for an
    interval."""
    return parse(each_value(override)[:first])[0] if override.is_sweep_override() else [override]


@dataclass
class Composition:
    """A configuration, what could not be set in it, and the keys that were not there before."""

    cfg: DictConfig
    apart: str = ""
    """The key of a node that nothing else follows from; empty if that is not known."""
    found: list[str] = field(default_factory=list)
    added: list[Override] = field(default_factory=list)

    def problems(self, *, multirun: bool) -> list[str]:
        found = self.found + problems(self.cfg, multirun=multirun)
        for override in self.added:  # Hydra adds them only after a +
            parts = override.key_or_group.split(".")
            paths = tuple(".".join(parts[: n + 1]) + ":" for n in range(len(parts)))
            if not any(text.startswith(paths) for text in found):
                found.append(
                    f"{override.key_or_group}: not in this configuration. "
                    f"To add it write +{override.input_line}"
                )
        return found

    def set(self, override: Override) -> None:
        """Set or delete one value; an error that Hydra would stop at becomes a message."""
        key, value = override.key_or_group, override.value()
        above, _, name = key.rpartition(".")
        parent: Any = None
        with suppress(OmegaConfBaseException):
            parent = OmegaConf.select(self.cfg, above) if above else self.cfg
        there = name in _keys(parent)
        if override.is_delete() and value is not None and value != "":
            self.found.append(f"~{key}: takes no value. Write ~{key}")
        elif override.is_delete() and there and read(self.cfg, key, object) is None:
            self.found.append(
                f"~{key}: it is null already. Leave it out"
            )  # Hydra would not find it
        elif override.is_delete() and there:
            with open_dict(parent):
                del parent[name]
        elif override.is_delete():
            near = did_you_mean(name, _keys(parent))
            self.found.append(f"~{key}: there is no such key to delete.{near}")
        else:
            if override.is_add() and there and not isinstance(value, list | dict):
                self.found.append(f"+{key}: the key is there already. Leave out the +")
            if not (there or override.is_add() or override.is_force_add()):
                self.added.append(override)
            if isinstance(value, list) and there and isinstance(parent._get_node(name), DictConfig):
                example = WRITTEN.get(key, f"'{key}={{NAME: VALUE}}', with the quotes")
                self.found.append(f"{key}: expected a mapping, found a list. Write {example}")
                return
            try:
                OmegaConf.update(self.cfg, key, value, merge=True, force_add=True)
            except (OmegaConfBaseException, IndexError, ValueError) as error:  # a list's index
                self.found.append(f"{key}: cannot be set: {str(error).splitlines()[0]}")


_checked: list[Composer] = []  # of the command that is about to start, one at most


def hand_on(composer: Composer | None) -> None:
    """Let the sweep of this command have what its pre-flight has composed and checked."""
    _checked[:] = [] if composer is None else [composer]


def checked() -> Composer | None:
    """That of the command's pre-flight, once; None for a configuration of another tree."""
    return _checked.pop() if _checked else None


class Composer:
    """Composes overrides; equal choices of groups are read from files once."""

    def __init__(
        self,
        overrides: Sequence[Override],
        config_dir: str | None = None,
        config_name: str = options.CONFIG_NAME,
    ) -> None:
        self.config_name = config_name
        folders = [f"file://{Path(config_dir).absolute()}"] if config_dir else []
        for override in overrides:
            value = override.value()
            if override.key_or_group == "hydra.searchpath" and isinstance(value, list):
                folders += map(str, value)
        self.folders = [Path(each.removeprefix("file://")) for each in folders]
        quoted = ",".join(f"'{folder}'" for folder in folders)
        # --config-dir and the command line's hydra.searchpath as one override.
        self.search = [f"hydra.searchpath=[{quoted}]"] if folders else []
        self.mode: RunMode | None = None  # of the command, once it is composed
        self.shared = Shared(
            self.compose,
            lambda made: made.cfg,
            lambda key: bool(self._of_group(key)),
            lambda made: made.apart,
        )
        self._options: dict[str, list[str]] = {}
        self._known: dict[tuple[str, ...], bytes] = {}  # to read is faster than to copy

    def options(self, override: Override) -> list[str]:
        """Options of the group that `override` chooses from; empty where it sets a value."""
        return [] if override.is_hydra_override() else self._of_group(override.key_or_group)

    def _of_group(self, group: str) -> list[str]:
        if "." in group:
            return []
        if group not in self._options:
            self._options[group] = options.options(group, self.search)
        return self._options[group]

    def unknown_options(self, override: Override) -> list[str]:
        """A message for each option that its group does not have."""
        names, group = self.options(override), override.key_or_group
        if not names:
            return []
        if override.is_delete():
            no_name = override.value() and not isinstance(override.value(), str)
            return [f"~{group}: takes no value. Write ~{group}"] if no_name else []
        chosen: list[str] = []
        for single in single_values(override):
            value = single.value()
            if value is None:
                return [f"{group}: null is no option; ~{group} leaves the group out"]
            chosen += map(str, value if isinstance(value, list) else [value])
        return [
            f"{group}: no option '{name}'."
            f"{ELSEWHERE.get(f'{group}={name}') or did_you_mean(name, names)} "
            f"Options: {', '.join(names)}"
            for name in dict.fromkeys(chosen)
            if name not in names
        ]

    def compose(self, overrides: Sequence[Override]) -> Composition:
        """Raises MissingGroup, or HydraException where the groups do not go together."""
        groups: list[Override] = []
        values: list[Override] = []
        found: list[str] = []
        for override in overrides:
            if override.key_or_group == "hydra.searchpath":
                continue
            value, key = override.value(), override.key_or_group
            if override.is_hydra_override() and value == "???":
                found.append(f"{key}: expected a value, found ???")
            elif key.startswith("hydra/") and not isinstance(value, str | list | None):
                found.append(f"{key}: expected the name of an option, found {value}")
            elif override.is_hydra_override() or self.options(override):
                groups.append(override)
            else:
                values.append(override)
        made = Composition(*self._of_groups(groups), found)
        for override in values:
            made.set(override)
        return made

    def _of_groups(self, groups: Sequence[Override]) -> tuple[DictConfig, str]:
        """A composition of choices of groups, and of values of Hydra's own keys, alone.

        Mixtures share one, without any, where they fill the node `moe` and do nothing else.
        """
        lines = [str(each.input_line) for each in groups]
        chosen = [each.value() for each in groups if each.key_or_group == "moe"]
        mixture = chosen[0] if len(chosen) == 1 else None
        if isinstance(mixture, str) and _fills_moe_alone(mixture):
            line, nothing = f"moe={mixture}", f"moe={NOTHING}"
            with suppress(HydraException):  # of a user's file that `${moe}` chooses
                cfg = self._composed([nothing if text == line else text for text in lines])
                choices = cfg.hydra.runtime.choices
                follow = str(OmegaConf.to_container(choices)).count(NOTHING) > 1
                if cfg.get("moe") == {} and not follow:  # else others give it keys too
                    with open_dict(cfg):
                        cfg.moe = options.own("moe", mixture)
                        choices.moe = mixture
                    return cfg, "moe"
        return self._composed(lines), ""

    def _composed(self, lines: Sequence[str]) -> DictConfig:
        """Hydra's composition, one copy after another."""
        asked = (*self.search, *lines)
        if asked not in self._known:
            try:
                cfg = compose(self.config_name, list(asked), return_hydra_config=True)
            except HydraException as error:
                missing = re.match(r"You must specify '([^']+)'", str(error))
                if missing:
                    raise MissingGroup(missing[1]) from error
                raise
            self._known[asked] = pickle.dumps(cfg)
        found: DictConfig = pickle.loads(self._known[asked])
        return found


NOTHING = "_nothing"  # conf/moe/_nothing.yaml


def _fills_moe_alone(name: str) -> bool:
    fills = options.fills_its_node_alone
    return fills("moe", NOTHING) and fills("moe", name)


def _keys(node: Any) -> list[str]:
    """Keys of a mapping, those of missing values included, or indices of a list."""
    if isinstance(node, DictConfig):
        return [str(key) for key in node]
    return [str(index) for index in range(len(node))] if isinstance(node, ListConfig) else []
