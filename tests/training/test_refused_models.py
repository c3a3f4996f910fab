"""Values that only a library can refuse: the node is named, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose
from omegaconf import DictConfig

from dynmoe import job
from dynmoe.backbones import build_vit
from dynmoe.config.compose import search_path
from dynmoe.errors import ConfigError, DataError, reason_of
from dynmoe.training import build
from dynmoe.training.instantiation import make


@pytest.fixture(scope="module", autouse=True)
def hydra_finds_our_files() -> Iterator[None]:
    with search_path():
        yield


def config(*overrides: str) -> DictConfig:
    return compose("config", list(overrides))


@pytest.mark.parametrize(
    ("overrides", "node"),
    [
        (["+task.optimizer.foreach=true"], "task.optimizer"),
        (
            ["task.optimizer._target_=torch.optim.SGD", "+task.optimizer.nesterov=true"],
            "task.optim",
        ),
        (["task=glue", "task.scheduler.name=liner"], "task.scheduler"),
    ],
)
def test_an_optimizer_is_tried_first(overrides: list[str], node: str) -> None:
    cfg = config("task=vit_domainbed", *overrides)
    with pytest.raises(ConfigError, match=f"^{node}.* does not take these values: "):
        build.build_optimizer(cfg)


def test_the_node_that_a_target_refuses_is_named() -> None:
    cfg = config("task=vit_domainbed", "++data.environments._partial_=true", "~data.trial_seed")
    with pytest.raises(ConfigError, match=r"^data: dynmoe\.data\S* does not take .*trial_seed"):
        make(cfg.data, "data")


def test_an_assertion_without_text_shows_its_line() -> None:
    def check() -> None:
        raise AssertionError

    with pytest.raises(AssertionError) as raised:
        check()
    assert reason_of(raised.value) == "raise AssertionError"
    assert reason_of(AssertionError("width % heads")) == "width % heads"
    assert reason_of(KeyError("geluu")) == "there is no 'geluu'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "vit_smal_patch16_224"}, "vit_small_patch16_224"),
        ({"model": "resnet18"}, "a Vision Transformer with blocks is needed"),
        (
            {"model": "vit_tiny_patch16_224", "options": {"embed_dim": 64, "num_heads": 5}},
            r"backbone\.options=.*num_heads",
        ),
    ],
)
def test_a_vit_that_cannot_be_built(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_vit(num_classes=2, image_size=32, **arguments)  # type: ignore[arg-type]


def test_a_later_stage_is_built_before_an_earlier_one_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*arguments: object) -> bool:
        raise AssertionError("an earlier stage was trained")

    monkeypatch.setattr(job, "train", train)
    cfg = config("task=vl", f"paths.outputs={tmp_path}", "backbone.options.num_attention_heads=3")
    with pytest.raises(ConfigError, match="backbone"):
        job.complete_stage_before(cfg, tmp_path / "run")


def test_a_refused_earlier_stage_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(cfg: DictConfig) -> None:
        raise DataError("no such data")

    monkeypatch.setattr(job, "check_model", lambda cfg: None)
    monkeypatch.setattr(build, "build_data", refuse)
    with pytest.raises(DataError):
        job.complete_stage_before(config("task=vl", f"paths.outputs={tmp_path}"), tmp_path / "run")
    assert {each.name for each in tmp_path.glob("*/*")} == {".locks"}


def test_the_model_in_a_line() -> None:
    cfg = config("task=vit_domainbed")
    data = build.build_data(cfg)
    model = build.shell(cfg, data, {"num_classes": 10, "in_chans": 1})
    assert {each.device.type for each in model.parameters()} == {"meta"}
    line = build.description(cfg, model)
    assert line.startswith("model: vit_tiny_patch16_224 (patch_size 7, ")
    assert "from scratch; 2 MoE layers of 6 experts, up to 12; " in line
    plain = config("task=vit_domainbed", "moe=dense")
    dense = build.shell(plain, data, {"num_classes": 10, "in_chans": 1})
    assert "no MoE layers" in build.description(plain, dense)
