"""Equal choices of groups are read from conf/ once: that is most of the time of a check."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from omegaconf import DictConfig

from dynmoe.config import compose


@pytest.fixture(scope="session", autouse=True)
def equal_groups_are_read_once() -> Iterator[None]:
    read, known = compose.compose, {}

    def cached(name: str, overrides: list[str], return_hydra_config: bool) -> DictConfig:
        key = tuple(overrides)
        if key not in known:
            known[key] = read(name, overrides, return_hydra_config=return_hydra_config)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compose, "compose", cached)
        yield
