"""dynmoe-eval refuses what it cannot evaluate."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dynmoe.errors import ConfigError
from dynmoe.training.evaluate import parse


def test_a_run_of_another_version_is_refused(tmp_path: Path) -> None:
    cfg = {
        "data": {"_target_": "dynmoe.data.module.DomainData"},
        "moe": {"init": "auto"},
        "trainer": {"devices": 1, "strategy": "auto"},
        "backbone": {"pretrained": False},
    }
    OmegaConf.save(OmegaConf.create(cfg), tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="another version of dynmoe wrote this run"):
        parse([f"run={tmp_path}"])
