"""The commands of README for data of one's own, on the smallest files of their layouts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from dynmoe import cli
from dynmoe.config.compose import preflight

assert cli  # registers the resolvers of conf/

README = Path(__file__).parents[2] / "README.md"


def own_data_commands() -> list[list[str]]:
    section = README.read_text(encoding="utf-8").partition("## Your own data")[2]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return [shlex.split(line, comments=True)[1:] for line in block[1].splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("photo/cat", "photo/dog", "sketch/cat", "sketch/dog", "SST-2", "images"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("SST-2/train.tsv", "SST-2/dev.tsv"):
        (tmp_path / name).write_text("sentence\tlabel\ngood\t1\nbad\t0\n")
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"question": "what?", "answer": "red"}\n')
    return tmp_path


@pytest.mark.parametrize("command", own_data_commands(), ids=lambda words: words[0])
def test_a_command_for_own_data_is_not_refused(command: list[str], folder: Path) -> None:
    found = preflight([word.replace("DIR", str(folder)) for word in command])
    assert found.problems == []


def test_they_are_one_of_each_family() -> None:
    assert [words[0] for words in own_data_commands()] == [
        "task=vit_domainbed",
        "task=glue",
        "task=vl",
    ]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("dynmoe.conf", version_base="1.3"):
        return compose("config", ["task=vl", "data=vqa", "data.root=.", *overrides])


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_a_model_from_scratch_is_trained_whole_on_any_data(stage: str) -> None:
    cfg = composed("backbone=vl_tiny", f"stage={stage}")
    assert set(cfg.task.module.trains) == {"vision", "projector", "language_model"}
    assert cfg.task.optimizer.lr == 1e-3


def test_a_pretrained_model_keeps_the_recipe_of_its_stage() -> None:
    assert composed("stage=align").task.module.trains == ["projector"]


def test_half_of_a_model_from_scratch_is_still_refused(folder: Path) -> None:
    command = ["task=vl", "data=vqa", f"data.root={folder}", "backbone=vl_tiny"]
    (problem,) = preflight([*command, "backbone.vision.pretrained=true"]).problems
    assert "stage align: task.module.trains: backbone.pretrained=false" in problem
