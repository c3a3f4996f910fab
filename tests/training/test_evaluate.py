"""dynmoe-eval refuses what it cannot evaluate."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose
from omegaconf import OmegaConf

from dynmoe.config.compose import search_path
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected a folder with a config.yaml, found none"),
        ("a: [", "not the configuration of a run: while parsing"),
        ("3", "not the configuration of a run"),
        ("[1]", "not the configuration of a run"),
        ("name: ${nope}", "not the configuration of a run: Interpolation key 'nope'"),
        ("moe: {init: copy}", "it lacks backbone, data, trainer"),
        ("\xe9: 1", "not the configuration of a run: 'utf-8' codec"),
    ],
)
def test_a_folder_that_is_no_run(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message):
        parse([f"run={tmp_path}"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, as far as `parse` reads it."""
    folder = tmp_path_factory.mktemp("run")
    with search_path():
        cfg = compose("config", ["task=vit_domainbed", "data=pacs", "data.root=."])
    del cfg.logger
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "selected.ckpt").touch()
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.workers=abc"], "data.workers: expected an integer or 'auto', found 'abc'"),
        (["data.workers=-1"], "data.workers: expected 0 or more"),
        (["data.eval_batch_size=0"], "data.eval_batch_size: expected 1 or more"),
        (["data.max_new_tokens=4"], "data.max_new_tokens: this run on PACS has no such key"),
        (["data.root=[1"], r"data.root=\[1: "),
        (["mode", "=", "answer"], "no spaces around the '='. Write mode=answer"),
        (["mode=answr"], "mode=answr: expected one of evaluate, answer, submit"),
        (
            ["checkpoint=best"],
            "no file best. Expected selected, last or FILE",
        ),
        (["/a/path"], "/a/path: expected key=value. A run is given as run=/a/path"),
        (["run="], "run=FOLDER is missing"),
        (["batch=3"], "batch=3: unknown argument, expected run="),
    ],
)
def test_a_wrong_argument_is_named(saved: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse([f"run={saved}", *words])


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
