"""Equal choices of groups are read from conf/ once in a process.

That is most of the time of a refused command. Hydra sets the values of each command itself.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository, IConfigRepository
from hydra._internal.defaults_list import DefaultsList
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, base

CHOSEN: dict[str, DefaultsList] = {}
READ: dict[str, bytes] = {}
"""What was read so far, for processes that go on from here."""


def contents(repo: IConfigRepository) -> str:
    """Where Hydra looks for files, and what a test's own files say now."""
    sources = repo.get_sources()
    # NOTE: Hydra loads the classes of its sources anew: isinstance tells nothing.
    folders = (Path(each.path) for each in sources if each.scheme() == "file")
    files = [(file, file.read_bytes()) for each in folders for file in each.rglob("*.yaml")]
    return repr(([each.full_path() for each in sources], files))


@contextmanager
def read_once() -> Iterator[None]:
    select, read = (
        config_loader_impl.create_defaults_list,
        ConfigLoaderImpl._compose_config_from_defaults_list,
    )

    def selected(
        repo: IConfigRepository, overrides_list: Sequence[Override], **how: Any
    ) -> DefaultsList:
        groups, values = list[Override](), list[Override]()
        for each in overrides_list:
            if not each.is_sweep_override():  # Hydra leaves them to the jobs
                is_group = repo.group_exists(each.key_or_group)
                (groups if is_group and not isinstance(each.value(), dict) else values).append(each)
        key = repr((contents(repo), [each.input_line for each in groups], how))
        if key not in CHOSEN:
            CHOSEN[key] = select(repo=repo, overrides_list=groups, **how)
        return replace(CHOSEN[key], config_overrides=values)

    def composed(loader: ConfigLoaderImpl, defaults: Any, repo: IConfigRepository) -> DictConfig:
        key = repr((contents(repo), defaults))
        if key not in READ:
            READ[key] = pickle.dumps(read(loader, defaults=defaults, repo=repo))
        cfg: DictConfig = pickle.loads(READ[key])
        return cfg

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_loader_impl, "create_defaults_list", selected)
        patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", composed)
        patch.setattr(base, "parse", cache(base.parse))  # of interpolations
        # Every composition copies the sources first, and then changes their list at most.
        share = lambda repo, _: copy.copy(repo)  # noqa: E731
        patch.setattr(ConfigRepository, "__deepcopy__", share, raising=False)
        yield
