"""dynmoe-eval refuses what it cannot evaluate."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose
from omegaconf import OmegaConf

from dynmoe import job
from dynmoe.config.compose import search_path
from dynmoe.errors import ConfigError
from dynmoe.records import RunFolder
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


def test_moved_data_are_named_with_the_key_that_says_where(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "selected.ckpt").touch()
    with search_path():
        cfg = compose(
            "config", ["task=vit_domainbed", "data=image_folder", "data.root=/moved/away"]
        )
    OmegaConf.save(cfg, tmp_path / "config.yaml", resolve=True)
    with pytest.raises(ConfigError, match=r"no folder '/moved/away'.*data\.root=FOLDER"):
        parse([f"run={tmp_path}"])
    found = parse([f"run={tmp_path}", f"data.root={tmp_path}"])[-1]
    assert found.data.root == found.data.environments.root == str(tmp_path)


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    job._check_same_data(folder, "new")  # nothing was recorded
    folder.write_run({"data_hash": "old"})
    folder.append("results", {"step": 0})
    job._check_same_data(folder, "old")
    with pytest.raises(ConfigError, match=r"began on data old, which are now new.*overwrite=true"):
        job._check_same_data(folder, "new")
