"""A configuration of dynmoe-run for a benchmark: the same keys, checked in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra import compose
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from dynmoe.config.check import report
from dynmoe.config.options import CONFIG_NAME
from dynmoe.config.preflight import preflight, search_path
from dynmoe.errors import ConfigError, UserError

DATA_DEFAULTS = ["task=vit_domainbed"]
STEP_DEFAULTS = [
    "task=vit_domainbed",
    "backbone=vit_tiny",
    "backbone.pretrained=false",
    "backbone.image_size=64",
    "moe.num_experts=8",
    "moe.max_experts=${moe.num_experts}",
]


def configuration(given: Sequence[str], defaults: Sequence[str]) -> DictConfig:
    """The configuration of the overrides ``given``, and of the ``defaults`` for other keys.

    Raises:
        ConfigError: listing every problem of it.
    """
    texts = [text for text in defaults if text.partition("=")[0] not in keys(given)]
    texts += given
    verdict = preflight(texts)
    if verdict.problems:
        raise ConfigError(report(verdict.problems))
    with search_path():
        return compose(CONFIG_NAME, [verdict.instead.get(text, text) for text in texts])


def keys(overrides: Sequence[str]) -> set[str]:
    """What the overrides set."""
    return {text.partition("=")[0].lstrip("+~") for text in overrides}


def built(node: DictConfig, **arguments: Any) -> Any:
    """``instantiate``; what the user can mend comes without Hydra's wrapping."""
    try:
        return instantiate(node, **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
