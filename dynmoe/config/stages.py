"""Runs that follow one another: a stage of training starts from the run of the stage before it.

The earlier run follows from the configuration: it is the run of the same command with
`stage=<before>`, without its MoE layers and the recipe of its own stage. Runs that differ only in
these start from the same run.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from dynmoe.config import options
from dynmoe.config.identity import run_name
from dynmoe.config.options import device_count

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
    stage = cfg.get("stage")
    if stage is None or stage.after is None or not OmegaConf.is_interpolation(stage, "start"):
        return None
    earlier = copy.deepcopy(cfg)
    with open_dict(earlier):
        earlier.stage = options.own("stage", stage.after).stage
        earlier.moe = options.own("moe", "dense")
        earlier.name = "${task.name}"
        for key, value in RECIPE.items():
            node, _, leaf = key.rpartition(".")
            if leaf in (OmegaConf.select(earlier, node) or ()):  # there may be no scheduler
                OmegaConf.update(earlier, key, value)
    return earlier


def previous_run(*, _root_: DictConfig) -> str | None:
    """`<name>/<run>` of the run before, below `paths.outputs`."""
    earlier = previous(_root_)
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


# OmegaConf resolvers used in conf/: `${recipe:key}`, `${run_name:}` and `${previous_run:}`.

# Hyper-parameters in use here that DomainBed draws at random for hparams_seed > 0
# (domainbed/hparams_registry.py).
SAMPLED = ("lr", "batch_size", "weight_decay")


def register() -> None:
    """Make the resolvers known to OmegaConf; safe to call again."""
    OmegaConf.register_new_resolver("recipe", recipe, replace=True)
    OmegaConf.register_new_resolver("previous_run", previous_run, replace=True)
    OmegaConf.register_new_resolver("run_name", lambda *, _root_: run_name(_root_), replace=True)


def recipe(key: str, *, _root_: DictConfig) -> Any:
    """The protocol's value of `key` for the data set and stage: drawn, its own, or the default.

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
    defaults = recipes.defaults
    if key not in defaults:
        known = ", ".join(sorted(defaults))
        raise KeyError(f"protocol {_root_.protocol.name} has no '{key}'; it has {known}")
    return defaults[key]
