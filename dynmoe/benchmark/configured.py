"""A configuration of dynmoe-run for a benchmark: the same keys, checked in the same way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra import compose
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from dynmoe.config.check import report
from dynmoe.config.compose import preflight, search_path
from dynmoe.config.options import CONFIG_NAME
from dynmoe.config.targets import class_attribute
from dynmoe.errors import ConfigError, UserError

DATA_DEFAULTS = ["task=vit_domainbed"]
EPOCH_DEFAULTS = ["task=glue", "moe=dense"]
FEW_EXPERTS = ["moe.num_experts=8", "moe.max_experts=${moe.num_experts}"]
STEP_DEFAULTS = {
    "vit_domainbed": [
        "backbone=vit_tiny",
        "backbone.pretrained=false",
        "backbone.image_size=64",
        *FEW_EXPERTS,
    ],
    "glue": ["backbone.pretrained=false", *FEW_EXPERTS],
    "vl": [
        "backbone.pretrained=false",
        "backbone.vision.pretrained=false",
        "moe.num_experts=4",
        "moe.max_experts=${moe.num_experts}",
    ],
}


def step_defaults(given: Sequence[str]) -> list[str]:
    """Those of the task that is given, else of the first."""
    chosen = [value for key, _, value in (text.partition("=") for text in given) if key == "task"]
    task = chosen[0] if chosen else next(iter(STEP_DEFAULTS))
    return [f"task={task}", *STEP_DEFAULTS.get(task, [])]


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


def modality(cfg: DictConfig) -> object:
    """What the task works on: ``image``, ``text``."""
    return class_attribute(cfg.task.module._target_, "modality")


def built(node: DictConfig, **arguments: Any) -> Any:
    """``instantiate``, its errors ``unwrapped``."""
    with unwrapped():
        return instantiate(node, **arguments)


@contextmanager
def unwrapped() -> Iterator[None]:
    """What the user can mend comes without Hydra's wrapping."""
    try:
        yield
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
