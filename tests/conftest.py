"""The same on every machine, a busy one too: threads, and the examples of hypothesis.

Equal compositions are made once in a process: they take most of the time of a refused command.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.utils import JobRuntime
from hypothesis import settings
from omegaconf import DictConfig, base

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny: one thread is faster than several

settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(scope="session", autouse=True)
def equal_commands_are_composed_once() -> Iterator[None]:
    compose, known = ConfigLoaderImpl.load_configuration, dict[str, bytes]()

    def kept(loader: ConfigLoaderImpl, *given: Any, **named: Any) -> DictConfig:
        places = [str(each.path) for each in loader.get_search_path().get_path()]
        folders = (Path(each[7:]) for each in places if each.startswith("file://"))
        files = [(file, file.read_bytes()) for each in folders for file in each.rglob("*.yaml")]
        key = repr((given, named, places, files, JobRuntime.instance().get("name")))
        if "hydra.searchpath" in key:
            return compose(loader, *given, **named)
        if key not in known:
            known[key] = pickle.dumps(compose(loader, *given, **named))
        cfg: DictConfig = pickle.loads(known[key])
        cfg.hydra.runtime.cwd = os.getcwd()
        return cfg

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigLoaderImpl, "load_configuration", kept)
        patch.setattr(base, "parse", cache(base.parse))  # of interpolations
        yield
