"""The check of a composed configuration: all problems at once, before torch is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from dynmoe.config.annotations import mismatches, shown, takes_objects
from dynmoe.config.options import written
from dynmoe.config.ranges import outside
from dynmoe.config.rules import (
    RULES,
    RUN_RULES,
    SWEEP_RULES,
    Rule,
    protocol_fits,
    same_modality,
)
from dynmoe.config.runs import names_are_text, names_once, previous
from dynmoe.config.schema import schema
from dynmoe.config.shared import Keep, anew, once
from dynmoe.config.targets import Parameter, Signature, TargetError, did_you_mean, signature
from dynmoe.config.task_rules import is_language_model, stage_is_chosen
from dynmoe.errors import ConfigError

# Keys of hydra.utils.instantiate, which are no parameters of the target: type, and in words.
INSTANTIATE = {
    "_target_": ("str", "a dotted path such as torch.optim.Adam"),
    "_partial_": ("bool", "true or false"),
    "_recursive_": ("bool", "true or false"),
    "_convert_": ("Literal['none', 'partial', 'object', 'all']", "none, partial, object or all"),
    "_args_": ("list", "a list"),
}

# Nodes that are functions of what a run knows only later, and nodes that are made as they stand.
MADE_LATER = ("data.content", "data.environments", "moe.router", "task.optimizer", "task.scheduler")
MADE_AT_ONCE = ("backbone", "backbone.vision", "data", "moe.adaptation", "task.module", "trainer")

# Nodes that nothing else is passed to, and that therefore need each parameter without a default.
COMPLETE = re.compile(
    r"backbone\.vision|data(\.content|\.environments)?|moe\.adaptation|(logger|trainer)\..+"
)

# Keys that a run reads itself, beside passing them on.
READ = {
    "backbone": ("model", "options", "pretrained"),
    "backbone.vision": ("image_size", "model", "patch_size", "path", "pretrained"),
    "data": ("batch_size", "name"),
    "task.optimizer": ("lr", "weight_decay"),
    "trainer": (
        *("accelerator", "accumulate_grad_batches", "devices", "enable_progress_bar", "max_epochs"),
        *("max_steps", "num_sanity_val_steps", "precision", "strategy", "use_distributed_sampler"),
    ),
}

# Groups that leave no key in the configuration.
GROUPS = ("experiment", "schedule", "sweep")

# Options and keys that users look for and that live elsewhere.
ELSEWHERE = {
    "data=ax": " AX is a test set of MNLI's models: train with data=mnli, then dynmoe-eval "
    "run=FOLDER mode=submit.",
    "data.benchmarks": " Did you mean 'question_sets'?",
    "data.seed": " Did you mean 'seed'?",
    "data.steps": " Did you mean 'task.steps'?",
    "data.epochs": " Did you mean 'task.epochs'?",
    "data.eval_every": " Did you mean 'task.eval_every'?",
    **{
        f"moe.adaptation.{key}": " It is of DynMoE's windows (schedule=...): leave it out, and set "
        "moe.adaptation.until, warmup and window."
        for key in ("start", "length", "period")
    },
    "data.accumulate": " Did you mean 'trainer.accumulate_grad_batches'?",
}

# How a value is written that is easily written otherwise.
WRITTEN = {"data.question_sets": "'data.question_sets={gqa: /folder}', with the quotes"}

# Meaning of the values that have no default.
MEANING = {
    "data.root": "the folder of the data set, e.g. data.root=/data/PACS",
    "mixing.reference": "a run folder with probes, or 'mixing.reference={source: loss}'",
    "mixing.weights": "the weight of each source, e.g. 'mixing.weights={rte: 1, cola: 2}'",
    "name": "the folder of the runs, e.g. name=my_runs",
    "task": "what to learn, e.g. task=vit_domainbed or task=glue",
}


def check(cfg: DictConfig, *, multirun: bool = False) -> None:
    """Raise a ConfigError that lists every problem of `cfg`."""
    found = problems(cfg, multirun=multirun)
    if found:
        raise ConfigError(report(found))


def report(found: list[str]) -> str:
    count = f"{len(found)} problem{'s' if len(found) > 1 else ''} in the configuration"
    return "\n  ".join([count, *found])


def problems(cfg: DictConfig, *, multirun: bool = False) -> list[str]:
    """Reasons why `cfg` cannot run, one message each, by the rules of a sweep or of one run.

    The runs of earlier stages, which a run starts if need be, are checked with it.
    """
    with _hydra_config_of(cfg), names_once():
        found = _own_problems(cfg, multirun)
        earlier = None if found else previous(cfg)
        while earlier is not None and not found:
            name = earlier.stage.name
            found = [f"stage {name}: {text}" for text in _own_problems(earlier, multirun)]
            earlier = previous(earlier)
    return found


def value_problems(cfg: DictConfig, keys: Iterable[str]) -> list[str]:
    """Problems of the values at `keys` alone, their types and ranges."""
    found: list[str] = []
    for key in keys:
        above, _, name = key.rpartition(".")
        parent = OmegaConf.select(cfg, above)
        known = _known_keys(parent, above, found)
        value = OmegaConf.select(cfg, key)
        plain = OmegaConf.to_container(value) if isinstance(value, ListConfig) else value
        found += _value_problems(key, plain, known.parameters.get(name) if known else None)
    return found


def _said(cfg: DictConfig, rules: Iterable[Rule]) -> dict[Rule, list[str]]:
    """The messages of each rule."""
    return {rule: once(cfg, rule, partial(_messages, rule, cfg)) for rule in rules}


def _messages(rule: Rule, cfg: DictConfig) -> list[str]:
    return list(rule(cfg))


def _own_problems(cfg: DictConfig, multirun: bool) -> list[str]:
    with names_are_text():
        direct, indirect = _walk(cfg, "", once)
    rules = (*RULES, *(SWEEP_RULES if multirun else RUN_RULES))
    said = once(cfg, ("rules", multirun), lambda: _said(cfg, rules))
    # Image data copy keys that text backbones and protocols lack: rules name the cause.
    fits = (same_modality, is_language_model, protocol_fits, stage_is_chosen)
    if any(said[rule] for rule in fits):
        direct = [text for text in direct if "Interpolation key" not in text]
    direct = direct + [text for each in said.values() for text in each]
    # A wrong value shows again in everything computed from it; this is reported only where nothing
    # else explains it.
    first = {text.partition(": ")[2]: text for text in reversed(indirect)}
    return list(dict.fromkeys(direct or reversed(list(first.values()))))


# Names of sources may look like numbers (15, of rotated digits), and Hydra has no quotes for keys.
BY_SOURCE = ("mixing.weights", "mixing.reference")

Found = tuple[list[str], list[str]]
"""Problems, and problems of values that come from an interpolation."""


def _walk(cfg: DictConfig, path: str, keep: Keep) -> Found:
    """Problems of one node and those below it."""
    return keep(cfg, ("walk", path), lambda: _walked(cfg, path, keep))


def _walked(cfg: DictConfig, path: str, keep: Keep) -> Found:
    direct = list(keep(cfg, ("node", path), lambda: _node_problems(cfg, path)))
    indirect: list[str] = []
    for key in cfg:
        found = keep(cfg, ("key", path, key), partial(_walk_key, cfg, path, key, keep))
        direct += found[0]
        indirect += found[1]
    return direct, indirect


def _node_problems(cfg: DictConfig, path: str) -> list[str]:
    found: list[str] = []
    known = _known_keys(cfg, path, found)
    if known is not None:
        found += _key_problems(cfg, path, known)
    if _has(cfg, "_target_"):
        found += _instantiate_problems(cfg, path)
    elif path in {*MADE_LATER, *MADE_AT_ONCE} - {"moe.adaptation"} or _is_logger(path):
        found.append(f"{path}._target_: missing: the class or function that makes it")
    return found


def _walk_key(cfg: DictConfig, path: str, key: Any, keep: Keep) -> Found:
    """Problems of one value, and of all below it where it is a node."""
    direct: list[str] = []
    indirect: list[str] = []
    dotted = f"{path}.{key!s}" if path else str(key)
    if dotted == "hydra" or key in INSTANTIATE:
        return direct, indirect
    if not isinstance(key, str) and not (path in BY_SOURCE and type(key) is int):
        return [f"{dotted}: expected text as a key, found {shown(key)}"], indirect
    try:
        value = cfg[key]
        is_list = isinstance(value, ListConfig)
        plain = OmegaConf.to_container(value, resolve=True) if is_list else value
    except MissingMandatoryValue:
        meaning = MEANING.get(dotted, f"no default: give {dotted}=VALUE")
        direct.append(f"{dotted}: required, {meaning}")
    except InterpolationToMissingValueError:
        pass  # reported at the key that is missing
    except InterpolationKeyError as error:
        is_here = str(error).partition("'")[2].partition("'")[0] in str(written(cfg, str(key)))
        (direct if is_here else indirect).append(f"{dotted}: {_first_line(error)}")
    except OmegaConfBaseException as error:
        indirect.append(f"{dotted}: {_first_line(error)}")
    else:
        known = _known_keys(cfg, path, [])
        parameter = known.parameters.get(str(key)) if known is not None else None
        refers = OmegaConf.is_interpolation(cfg, key)
        (indirect if refers else direct).extend(_value_problems(dotted, plain, parameter))
        # Which node an interpolation leads to may be another one in each job.
        keep = anew if refers else keep
        nodes = {dotted: value} if isinstance(value, DictConfig) else {}
        if is_list:
            nodes = {
                f"{dotted}[{number}]": each
                for number, each in enumerate(value)
                if isinstance(each, DictConfig)
            }
        for place, node in nodes.items():
            below = _walk(node, place, anew if is_list else keep)
            direct += below[0]
            indirect += below[1]
    return direct, indirect


def _value_problems(key: str, value: Any, parameter: Parameter | None) -> list[str]:
    """A value of the wrong type, or the numbers in it that are out of their range."""
    is_node = isinstance(value, DictConfig)
    is_object = is_node and _has(value, "_target_")
    is_made = _is_logger(key) or (key in MADE_AT_ONCE and not (value is None and parameter))
    if is_made and not is_node:
        return [f"{key}: expected an object with a _target_, found {shown(value)}"]
    wrong: list[str] = []
    if parameter is None and not is_node and schema(key) is not None:
        wrong = [f"{key}: expected a mapping, found {shown(value)}"]
    elif parameter is not None and not (value is None and parameter.nullable):
        types = parameter.annotation, parameter.module
        wrong = [] if is_object and takes_objects(*types) else mismatches(key, value, *types)
    if wrong:
        return [f"{text}. Write {WRITTEN[key]}" for text in wrong] if key in WRITTEN else wrong
    return [
        f"{place}: {text}" for place, each in _leaves(key, value) if (text := outside(place, each))
    ]


def _has(cfg: DictConfig, key: str) -> bool:
    """`key in cfg`, for which OmegaConf raises and catches an error where there is no such key."""
    return {key} <= cfg.keys() and key in cfg


def _is_logger(key: str) -> bool:
    return key.startswith("logger.") and key.count(".") == 1


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Plain values, those in lists with their index; nodes are walked by themselves."""
    if isinstance(value, list):
        for index, each in enumerate(value):
            yield from _leaves(f"{key}.{index}", each)
    elif not isinstance(value, Mapping):
        yield key, value


def _instantiate_problems(cfg: DictConfig, path: str) -> Iterator[str]:
    """Keys of hydra.utils.instantiate: their types, and whether the node is made at once."""
    for key, (annotation, words) in INSTANTIATE.items():
        there = _has(cfg, key)
        value = cfg[key] if there else None
        if there and mismatches(key, value, annotation, __name__):
            yield f"{path}.{key}: expected {words}, found {shown(value)}"
        elif key == "_partial_" and path in MADE_LATER and value is not True:
            yield f"{path}._partial_: expected true: the run makes it later, found {shown(value)}"
        elif key == "_partial_" and path in MADE_AT_ONCE and value is True:
            yield f"{path}._partial_: expected false: it is made at once, found true"


def _known_keys(cfg: DictConfig, path: str, direct: list[str]) -> Signature | None:
    """Keys that the node may have, by its target or its schema; None where any key may stand."""
    if not _has(cfg, "_target_"):
        return schema(path)
    try:
        return signature(str(cfg["_target_"]))
    except TargetError as error:
        direct.append(f"{path}._target_: {error}")
    except OmegaConfBaseException as error:
        direct.append(f"{path}._target_: {_first_line(error)}")
    return None


def _key_problems(cfg: DictConfig, path: str, known: Signature) -> Iterator[str]:
    dot = f"{path}." if path else ""
    if not known.open:
        words = {*known.parameters, *(() if path else GROUPS)}
        for key in map(str, cfg):
            if not path and key in GROUPS:
                yield f"{key}: the file of this group has to begin with '# @package _global_'"
            elif key not in known.parameters.keys() | INSTANTIATE.keys() | {"hydra"}:
                hint = ELSEWHERE.get(f"{dot}{key}") or did_you_mean(key, words)
                hint = hint or _elsewhere(f"{dot}{key}", cfg)
                yield f"{dot}{key}: unknown key.{hint}"
    is_object = _has(cfg, "_target_")
    needed = dict.fromkeys(READ.get(path, ()) if is_object else ())
    is_partial = path not in MADE_LATER and is_object and cfg.get("_partial_") is True
    gets_more = is_partial or _has(cfg, "_args_")
    if not is_object or (COMPLETE.fullmatch(path) and not gets_more):
        needed |= {key: None for key, each in known.parameters.items() if not each.has_default}
    for key in needed:
        if key not in set(map(str, cfg)):
            owner = str(cfg["_target_"]).rpartition(".")[2] if is_object else path or "run"
            yield f"{dot}{key}: missing. Every {owner} configuration has this key"


def _elsewhere(dotted: str, cfg: DictConfig) -> str:
    """Keys of this name at another place: ` Did you mean task.optimizer.lr?` for lr."""
    end = f".{dotted.rpartition('.')[2]}"
    places = _places(cfg._get_root(), "")
    found = [place for place in places if place != dotted and place.endswith(end)]
    return f" Did you mean {' or '.join(found[:3])}?" if found else ""


def _places(node: Any, path: str) -> Iterator[str]:
    """Dotted keys, those nearest to the root first; recipes are what other keys copy."""
    below = []
    for key in map(str, node):
        dotted = f"{path}.{key}" if path else key
        if dotted in ("hydra", "protocol") or key in INSTANTIATE:
            continue
        yield dotted
        child = None if OmegaConf.is_missing(node, key) else node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            below.append((child, dotted))
    for child, dotted in below:
        yield from _places(child, dotted)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()[0]
    return re.sub(r"^\w+ raised while resolving interpolation: ", "", text)


@contextmanager
def _hydra_config_of(cfg: DictConfig) -> Iterator[None]:
    """`${hydra:...}` as in a job: Hydra sets its configuration only when the job starts."""
    if "hydra" not in cfg:
        yield
        return
    before = HydraConfig.instance().cfg
    if OmegaConf.is_missing(cfg.hydra.runtime, "output_dir"):
        with read_write(cfg.hydra.runtime), open_dict(cfg.hydra.runtime):
            cfg.hydra.runtime.output_dir = "."  # any folder: the check only reads it
    # set_config would copy it
    HydraConfig.instance().cfg = cfg  # type: ignore[assignment]
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before
