"""Runs by their configuration: their names, the stage before them, and the resolvers of conf/.

The name of a run is readable, safe for any file system, and a function of its configuration alone.
DomainBed names a run by a hash of its sorted arguments (domainbed/command_launchers.py, sweep.py).
A hash of the resolved configuration goes one step further: a default spelled out gives the same
folder, an edited YAML file gives another one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from dynmoe.config import models, options, places
from dynmoe.config.environments import test_indices
from dynmoe.config.options import device_count
from dynmoe.config.shared import Keep, Swept, anew, copied, derived, is_shared, once, unnoticed

# Dotted keys that do not change the result of a run.
NOT_IN_IDENTITY = (
    *("hydra", "logger", "mode", "name", "overwrite", "paths", "plan", "sweep"),
    # Other keys copy those in use.
    *("protocol.datasets", "protocol.defaults", "protocol.scratch", "protocol.stages"),
    *("runtime.malloc", "runtime.progress_every", "moe.recompute", "moe.backend"),
    *("task.save_every", "task.async_save", "task.on_nonfinite", "task.routing_every"),
    "backbone.grad_checkpointing",  # the same numbers, computed twice
    "data.question_sets",  # more of them are answered by dynmoe-eval
    *(
        "data.cache",
        "data.content.cache",
        "data.cache_gb",
        "data.checks",
        "data.eval_batch_size",
        "data.examples",
    ),
    *("data.verify", "data.workers", "trainer.enable_model_summary"),
    *("trainer.enable_progress_bar", "trainer.log_every_n_steps"),
)

# Keys that came after runs without them were kept: null is the same run as no such key.
NULL_AS_ABSENT = ("data.eval_images",)

LONGEST, SHORT = 80, 16  # characters of all differences in a folder's name, and of one value

# `${a.b}`, another key; `${recipe:lr}` computes something.
COPY = re.compile(r"\$\{[\w.]+\}")
FROM_RECIPE = re.compile(r"\$\{recipe:(\w+)\}")
FROM_MODEL = re.compile(r"\$\{own_experts:(\d+)\}")


def sha8(text: str) -> str:
    """First 8 hexadecimal digits of the SHA-256 of `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_name(cfg: DictConfig) -> str:
    """`<data>_<moe>[_<differences>][_env<test envs>]_seed<seed>_<hash>`, such as
    `pacs_topk_num_experts4-top_k1_env0_seed0_1f3a90bc`. The hash keeps apart what is cut off."""
    parts = *once(cfg, "setting", lambda: [*_setting(cfg)]), f"seed{cfg.seed}", config_hash(cfg)
    return re.sub(r"[^a-z0-9_.-]+", "-", "_".join(parts).lower())


def _setting(cfg: DictConfig) -> Iterator[str]:
    """The parts of a name that runs with other seeds have too."""
    yield str(cfg.data.name)
    yield str(cfg.moe.name)
    if differences := "-".join(_differences(cfg))[:LONGEST]:
        yield differences
    if "test_envs" in cfg.data:
        yield f"env{'-'.join(map(str, test_indices(cfg)))}"


def _differences(cfg: DictConfig) -> Iterator[str]:
    """Settings of mixture and task that are not those of their files and of the protocol."""
    for seed in ("trial_seed", "hparams_seed"):
        if cfg[seed] != 0:
            yield f"{seed}{cfg[seed]}"
    has_mixing = cfg.get("mixing") is not None
    if has_mixing:
        yield f"mixing{cfg.mixing.rule}"
    for node in ("moe", "data", *(["mixing"] if has_mixing else []), "task"):
        yield from once(cfg, ("differences", node), partial(_own, cfg, node))


def _own(cfg: DictConfig, node: str) -> list[str]:
    """Settings of one node that are not those of its file."""
    found = []
    for key, written in once(cfg, ("file", node), lambda: [*_leaves(_file(cfg, node), f"{node}.")]):
        value = OmegaConf.select(cfg, key)
        if key in NOT_IN_IDENTITY or value is None or value == _meant(cfg, written, value):
            continue
        text = str(value).rpartition(".")[2] if key.endswith("._target_") else str(value)
        found.append(f"{key.rpartition('.')[2]}{text.strip('[]').replace(' ', '')[:SHORT]}")
    return found


def _file(cfg: DictConfig, node: str) -> Any:
    if node == "data":
        return {"batch_size": RECIPE["data.batch_size"]}
    if node == "task":
        return options.own("task", cfg.task.name).get("task", {})
    return options.own(node, cfg.mixing.rule if node == "mixing" else cfg.moe.name)


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    plain: Any = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
    for key, value in plain.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _meant(cfg: DictConfig, written: Any, otherwise: Any) -> Any:
    """The value that a file asks for: itself, a copy of another key, or the protocol's;
    `otherwise` where it is computed."""
    if not isinstance(written, str):
        return written
    if COPY.fullmatch(written):
        return OmegaConf.select(cfg, written[2:-1])
    if asked := FROM_MODEL.fullmatch(written):
        return own_experts(int(asked[1]), _root_=cfg)
    if asked := FROM_RECIPE.fullmatch(written):
        with suppress(KeyError):
            return recipe(asked[1], _root_=cfg)
    return otherwise if "${" in written else written


def config_hash(cfg: DictConfig) -> str:
    """Hash of everything that can change the result of a run."""
    return sha8(json.dumps(_identity(cfg), sort_keys=True, default=str))


def flat(cfg: DictConfig) -> dict[str, Any]:
    """Everything that can change the result of a run, as dotted keys and resolved values.

    A key that copies another one, `data.trial_seed: ${trial_seed}`, is left out: two runs that
    differ in one setting differ in one key here.
    """
    return dict(_flat(_identity(cfg), "", once(cfg, "copies", lambda: {*_copies(cfg, "")})))


def _flat(node: dict[str, Any], prefix: str, copies: set[str]) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        dotted = f"{prefix}{key}"
        if dotted in copies:
            continue
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{dotted}.", copies)
        else:
            yield dotted, value


def _copies(cfg: DictConfig, prefix: str) -> Iterator[str]:
    """The keys that copy another one; none of them below a node that is an interpolation."""
    for name in cfg:
        node, dotted = cfg._get_node(name), f"{prefix}{name!s}"
        if isinstance(node, Swept):  # a value
            continue
        if isinstance(node, DictConfig) and not node._is_interpolation():
            yield from _copies(node, f"{dotted}.") if not node._is_none() else ()
        elif isinstance(written := node._value(), str) and COPY.fullmatch(written):  # type: ignore[union-attr]
            yield dotted


def _identity(cfg: DictConfig) -> dict[str, Any]:
    """Everything that can change the result of a run, as nested keys."""
    return once(cfg, "identity", lambda: _all_relevant(cfg))


def _all_relevant(cfg: DictConfig) -> dict[str, Any]:
    found = _relevant(cfg, "", once)
    if "test_envs" in found.get("data", {}):
        # An environment's name or its index: one run.
        envs = once(cfg, "test_envs", lambda: test_indices(cfg))
        found = {**found, "data": {**found["data"], "test_envs": envs}}
    return found


def _relevant(cfg: DictConfig, prefix: str, keep: Keep) -> dict[str, Any]:
    # Node by node, so that an interpolation below a key that is left out is never resolved.
    found: dict[str, Any] = {}
    for name in cfg:  # of a source of mixing: a number, perhaps
        dotted = f"{prefix}{name!s}"
        if dotted not in NOT_IN_IDENTITY:
            value = keep(cfg, ("identity", dotted), partial(_value, cfg, name, dotted, keep))
            if not (value is None and dotted in NULL_AS_ABSENT):
                found[str(name)] = value
    return found


def _value(cfg: DictConfig, name: Any, dotted: str, keep: Keep) -> Any:
    value = cfg[name]
    if isinstance(value, DictConfig):
        # Which node an interpolation leads to may be another one in each job.
        keep = anew if OmegaConf.is_interpolation(cfg, name) else keep
        value = _relevant(value, f"{dotted}.", keep)
    elif OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    return places.identity(dotted, value)


# Stages: a stage of training starts from the run of the stage before it, which follows from the
# configuration: it is the run of the same command with `stage=<before>`, without MoE layers and
# with the recipe of that stage. Runs that differ only in these start from the same run.

# Keys that the protocol sets for each stage (conf/protocol/llava.yaml). A value on the command line
# belongs to the stage of the command; `protocol.stages.<stage>` sets it for any stage.
RECIPE = {
    "task.epochs": "${recipe:epochs}",
    "task.eval_every": "${recipe:eval_every}",
    "task.optimizer.lr": "${recipe:lr}",
    "task.optimizer.weight_decay": "${recipe:weight_decay}",
    "task.scheduler.warmup": "${recipe:warmup}",
    "task.module.trains": "${recipe:trains}",
    "data.batch_size": "${recipe:batch_size}",
}


def previous(cfg: DictConfig) -> DictConfig | None:
    """The configuration of the earlier run: `cfg` with other stage, recipe, MoE layers and folder.

    None for a first stage, or where a run folder is given.
    """
    found: DictConfig | None = derived(cfg, "previous", lambda: _previous(cfg))
    return found


def _previous(cfg: DictConfig) -> DictConfig | None:
    stage = cfg.get("stage")
    if stage is None or stage.after is None or not OmegaConf.is_interpolation(stage, "start"):
        return None
    earlier = copied(cfg, without="hydra", moe=options.own("moe", "dense"))
    with open_dict(earlier):
        earlier.stage = options.own("stage", stage.after).stage
        earlier.name = "${task.name}"
        if "mixing" in earlier:
            del earlier["mixing"]  # of the stage that asks for it
        for key, value in RECIPE.items():
            node, _, leaf = key.rpartition(".")
            if leaf in (OmegaConf.select(earlier, node) or ()):  # there may be no scheduler
                OmegaConf.update(earlier, key, value)
    return earlier


def previous_run(cfg: DictConfig) -> str | None:
    """`<name>/<run>` of the run before, below `paths.outputs`."""
    earlier = previous(cfg)
    return None if earlier is None else f"{earlier.name}/{run_name(earlier)}"


def run_folder(cfg: DictConfig) -> Path:
    """The folder of an earlier stage, whose configuration Hydra did not compose."""
    return Path(cfg.paths.outputs) / str(cfg.name) / run_name(cfg)


def is_distributed(cfg: DictConfig) -> bool:
    return device_count(cfg) != 1 or cfg.trainer.get("num_nodes", 1) != 1


def start_folder(cfg: DictConfig) -> Path | None:
    """The run folder that a run starts from."""
    if cfg.get("stage") is None or cfg.stage.start is None:
        return None
    given = Path(cfg.stage.start).expanduser()
    derived = Path(cfg.paths.outputs) / given
    return given if given.is_dir() and not derived.is_dir() else derived


# OmegaConf resolvers used in conf/: `${recipe:key}`, `${own_experts:default}`, `${run_name:}` and
# `${previous_run:}`.

# Hyper-parameters in use here that DomainBed draws at random for hparams_seed > 0
# (domainbed/hparams_registry.py).
SAMPLED = ("lr", "batch_size", "weight_decay")


_names: dict[tuple[Any, int], tuple[DictConfig, Any]] | None = None
_are_text = False


@contextmanager
def names_once() -> Iterator[None]:
    """Inside, nothing changes that a name depends on: names, which many keys contain, are computed
    once."""
    global _names
    before, _names = _names, {} if _names is None else _names
    try:
        yield
    finally:
        _names = before


@contextmanager
def names_are_text(are_text: bool = True) -> Iterator[None]:
    """Inside, only the types of values matter: jobs that share a configuration may read the name
    of another one, except where a name is made of it."""
    global _are_text
    before, _are_text = _are_text, are_text
    try:
        yield
    finally:
        _are_text = before


def _kept(function: Callable[[DictConfig], Any], cfg: DictConfig) -> Any:
    if is_shared(cfg):
        with unnoticed() if _are_text else nullcontext(), names_are_text(False):
            return once(cfg, function, lambda: function(cfg))
    if _names is None:
        return function(cfg)
    if (function, id(cfg)) not in _names:
        _names[function, id(cfg)] = cfg, function(cfg)  # with cfg, so that its id stays its own
    return _names[function, id(cfg)][1]


def register() -> None:
    """Make the resolvers known to OmegaConf; safe to call again."""
    OmegaConf.register_new_resolver("recipe", recipe, replace=True)
    OmegaConf.register_new_resolver("own_experts", own_experts, replace=True)
    OmegaConf.register_new_resolver(
        "previous_run", lambda *, _root_: _kept(previous_run, _root_), replace=True
    )
    OmegaConf.register_new_resolver(
        "run_name", lambda *, _root_: _kept(run_name, _root_), replace=True
    )


def own_experts(default: int, *, _root_: DictConfig) -> int:
    """The experts in a block of a model that is a mixture already, of others the default."""
    return models.own_experts(_root_) or default


def recipe(key: str, *, _root_: DictConfig) -> Any:
    """The protocol's value of `key` for the data set and stage: drawn, its own, that of a model
    without any pretrained weights, or the default.

    Raises KeyError where the protocol has no such key.
    """
    dataset = _root_.data.name
    if _root_.hparams_seed > 0 and key in SAMPLED:
        from dynmoe.seeding import sample_hparams

        return sample_hparams(dataset, _root_.hparams_seed, _root_.trial_seed)[key]
    recipes = _root_.protocol
    if _root_.get("stage") is not None:
        recipes = recipes.stages[_root_.stage.name]
    own = recipes.datasets.get(dataset) or {}
    if key in own:
        return own[key]
    scratch = recipes.get("scratch") or {}
    if key in scratch and _is_from_scratch(_root_.backbone):
        return scratch[key]
    defaults = recipes.defaults
    if key not in defaults:
        known = ", ".join(sorted(defaults))
        raise KeyError(f"protocol {_root_.protocol.name} has no '{key}'; it has {known}")
    return defaults[key]


def _is_from_scratch(backbone: DictConfig) -> bool:
    nodes = [backbone, *([backbone.vision] if "vision" in backbone else [])]
    return all(node.get("pretrained") is False for node in nodes)
