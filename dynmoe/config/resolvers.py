"""OmegaConf resolvers used in conf/: `${recipe:key}`, `${run_name:}` and `${previous_run:}`."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from dynmoe.config.identity import run_name
from dynmoe.config.stages import previous_run

# What DomainBed draws at random for hparams_seed > 0 (domainbed/hparams_registry.py) and we use.
SAMPLED = ("lr", "batch_size", "weight_decay")


def register() -> None:
    """Make the resolvers known to OmegaConf; safe to call again."""
    OmegaConf.register_new_resolver("recipe", recipe, replace=True)
    OmegaConf.register_new_resolver("previous_run", previous_run, replace=True)
    OmegaConf.register_new_resolver("run_name", lambda *, _root_: run_name(_root_), replace=True)


def recipe(key: str, *, _root_: DictConfig) -> Any:
    """The protocol's value of `key` for the chosen data set: drawn, its own, or the default; of a
    protocol in stages, the chosen stage's.

    Raises KeyError where the protocol has no such key.
    """
    dataset = _root_.data.name
    if _root_.hparams_seed > 0 and key in SAMPLED:
        from dynmoe.data.protocol import sample_hparams

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
