"""The run before follows from the configuration: it is the same for all that share it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hydra import compose
from omegaconf import DictConfig, OmegaConf

from dynmoe.config.compose import search_path
from dynmoe.config.runs import (
    is_distributed,
    previous,
    previous_run,
    run_folder,
    run_name,
    start_folder,
)

TASK = "task=vl"


@pytest.fixture(scope="module", autouse=True)
def hydra_finds_our_files() -> Iterator[None]:
    with search_path():
        yield


@cache
def config(*overrides: str) -> DictConfig:
    return compose("config", [TASK, *overrides])


def before(*overrides: str) -> str:
    """The run that a command starts from, as the configuration says it."""
    start: str = config(*overrides).stage.start
    return start


@pytest.fixture(scope="module")
def plain() -> str:
    return before()


def test_stages_follow_one_another(plain: str) -> None:
    last = config()
    instruct = previous(last)
    assert instruct is not None
    align = previous(instruct)
    assert align is not None
    assert previous(align) is None and previous_run(align) is None
    assert [each.stage.name for each in (align, instruct, last)] == ["align", "instruct", "moe"]
    assert [each.moe.name for each in (align, instruct, last)] == ["dense", "dense", "dynmoe_vl"]
    assert [each.name for each in (align, instruct, last)] == ["vl_align", "vl_instruct", "vl"]
    assert align.stage.start is None and align.stage.template == "plain"
    assert instruct.stage.start == previous_run(instruct)
    assert plain == previous_run(last) == f"vl_instruct/{run_name(instruct)}"
    assert run_folder(instruct) == Path("outputs") / plain == start_folder(last)
    assert start_folder(align) is None


SETTINGS = [
    (),
    ("seed=3", "paths.outputs=/tmp/elsewhere", "data.max_length=64"),
    ("backbone.options={hidden_size: 32, num_hidden_layers: 2}", "task.steps=3"),
    ("task.steps=7", "data.content.train_scenes=50", "trainer=gpu"),
    ("task.scheduler=null",),
    ("backbone.template=tokenizer", "backbone.path=/models/x", "backbone.architecture=null"),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
def test_it_is_what_the_same_command_trains_with_that_stage(settings: tuple[str, ...]) -> None:
    """Folder and content."""
    chain = config(*settings)
    for stage in ("instruct", "align"):
        earlier = previous(chain)
        assert earlier is not None
        given = config(*settings, f"stage={stage}")
        assert run_folder(earlier) == Path(given.paths.outputs) / given.name / run_name(given)
        found, expected = (OmegaConf.to_container(each, resolve=True) for each in (earlier, given))
        assert found == expected
        chain = earlier


@pytest.mark.parametrize(
    "overrides",
    [
        ("moe=topk",),
        ("moe=dense",),
        ("moe=dynmoe", "moe.max_experts=9", "moe.aux_weight=0.1"),
        ("moe.layers=second_half",),
        ("moe.adaptation.period=7",),
        ("schedule=paper_steps",),
        ("name=elsewhere", "overwrite=true", "logger=none", "data.workers=2"),
        ("trainer.enable_progress_bar=false", "mode=plan"),
    ],
    ids=" ".join,
)
def test_runs_that_differ_in_their_experts_start_from_one(
    overrides: tuple[str, ...], plain: str
) -> None:
    assert before(*overrides) == plain


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "data.content.train_scenes=100",
        "data.max_length=64",
        "backbone.options.hidden_size=64",
        "backbone.vision.layer=-2",
        "backbone.projector=linear",
        "trainer.precision=bf16-mixed",
        "protocol.stages.instruct.datasets.Scenes.epochs=7",
        "protocol.stages.align.datasets.Scenes.epochs=7",
    ],
)
def test_other_differences_ask_for_another_run_before(override: str, plain: str) -> None:
    assert before(override) != plain


def test_a_recipe_of_this_stage_alone_changes_nothing_before(plain: str) -> None:
    own = "protocol.stages.moe.datasets.Scenes.epochs=7"
    assert before(own) == plain
    assert run_name(config(own)) != run_name(config())


@pytest.mark.parametrize(
    "override", ["task.optimizer.lr=0.1", "task.epochs=7", "data.batch_size=9"]
)
def test_a_recipe_on_the_command_line_is_of_the_stage_it_names(override: str, plain: str) -> None:
    assert before(override) == plain


def test_the_first_stage_of_all_makes_a_difference_to_the_last() -> None:
    """Through the name of what comes between."""
    one, other = config(), config("protocol.stages.align.datasets.Scenes.lr=0.5")
    assert one.task == other.task and run_name(one) != run_name(other)


def test_a_start_of_ones_own(tmp_path: Path) -> None:
    given = config(f"stage.start={tmp_path}")
    assert previous(given) is None and previous_run(given) is None
    assert start_folder(given) == tmp_path
    assert run_name(given) != run_name(config())
    home = start_folder(config("stage.start='~'"))
    assert home is not None and home.is_dir()
    none = config("stage.start=null")
    assert previous(none) is None and start_folder(none) is None
    other = compose("config", ["task=vit_domainbed"])
    assert previous(other) is None and start_folder(other) is None


@pytest.mark.parametrize(
    ("overrides", "distributed"),
    [
        ((), False),
        (("trainer=gpu",), False),
        (("trainer=ddp",), True),
        (("trainer.devices=2",), True),
        (("trainer.devices=auto",), True),
        (("+trainer.num_nodes=2",), True),
    ],
)
def test_several_devices(overrides: tuple[str, ...], distributed: bool) -> None:
    assert is_distributed(config(*overrides)) == distributed
