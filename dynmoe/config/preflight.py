"""The pre-flight of a command line: all its problems, sweeps included, in well under a second."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hydra import initialize_config_module
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dynmoe.config import options, resolvers
from dynmoe.config.check import MEANING
from dynmoe.config.compose import Composer, MissingGroup, parse, parser, single_values
from dynmoe.config.jobs import SWEEPER, Axes, problems_of, read_sweep
from dynmoe.config.source import did_you_mean

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
    resolvers.register()
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
