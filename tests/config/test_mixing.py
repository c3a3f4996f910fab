"""Commands that mix data: refusals name key and fix; names and stages of runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hydra import compose
from omegaconf import DictConfig

from dynmoe.config.compose import preflight, search_path
from dynmoe.config.runs import previous, run_name

IMAGES = ("task=vit_domainbed",)
MIX = ("task=glue", "data=glue_mix", "data.source=tsv", "data.root=.", "backbone=bert_tiny")


def found(*overrides: str) -> list[str]:
    return preflight(overrides).problems


@pytest.mark.parametrize(
    "command",
    [
        (*IMAGES, "mixing=dynamic"),
        (*IMAGES, "mixing=dynamic", "mixing.layers=[0,-1]", "mixing.metric=cos", "mixing.c=0.1"),
        (*IMAGES, "mixing=uniform", "mixing.every=50", "moe=dense"),
        (*IMAGES, "mixing=proportional", "trainer=fsdp", "trainer.accelerator=cpu"),
        (*IMAGES, "mixing=random", "mixing.weights=[1,2,1,1,1]"),
        (*IMAGES, "mixing=fixed", "mixing.weights={15: 2, 30: 1, 45: 1, 60: 1, 75: 1}"),
        (*IMAGES, "mixing=ref_loss", "mixing.reference={15: 2, 30: 1, 45: 1, 60: 1, 75: 1}"),
        (*IMAGES, "mixing=ref_loss", "mixing.reference=[0.5,1,1,1,1]", "moe=dense"),
        (*MIX, "mixing=dynamic", "data.tasks=[rte,stsb,mnli]"),
        (*MIX,),
        ("task=vl", "mixing=dynamic"),
    ],
)
def test_accepted(command: tuple[str, ...]) -> None:
    assert [text for text in found(*command) if "data.root" not in text] == []


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            (*IMAGES, "mixing=dynamic", "moe=dense"),
            "mixing: dynamic .* moe=dense has none.*uniform",
        ),
        ((*IMAGES, "mixing=dynamic", "moe=softmoe"), "mixing: dynamic .* moe=softmoe .*moe=dynmoe"),
        (("task=glue", "mixing=uniform"), "mixing: uniform needs several.* data=glue_mix"),
        (
            (*IMAGES, "mixing=uniform", "data.test_envs=[0,1,2,3,4]"),
            r"mixing: uniform .* data\.test_envs=\[0, 1, 2, 3, 4\] leaves one. Test on fewer",
        ),
        (("task=vl", "data=easy_vqa", "mixing=uniform"), "mixing: uniform .* data=llava"),
        (
            ("task=vl", "stage=align", "moe=dense", "mixing=uniform"),
            "mixing: uniform .* stage=instruct",
        ),
        ((*IMAGES, "mixing=dynamic", "mixing.every=null"), r"mixing\.every: mixing=dynamic .*100"),
        ((*IMAGES, "mixing=dynamic", "mixing.every=0"), r"mixing\.every: expected 1 or more"),
        ((*IMAGES, "mixing=dynamic", "mixing.c=2"), r"mixing\.c: expected a share"),
        ((*IMAGES, "mixing=dynamic", "mixing.eta=-1"), r"mixing\.eta: expected 0 or more"),
        ((*IMAGES, "mixing=dynamic", "mixing.layers=[]"), r"mixing\.layers: .* \[-1\]"),
        (
            (*IMAGES, "mixing=dynamic", "mixing.layers=[9]"),
            r"mixing\.layers: .*2 MoE layers, from -2 to 1, found \[9\]",
        ),
        (
            (*MIX, "mixing=dynamic", "moe.layers=[1,2]", "mixing.layers=[0,-3]"),
            r"mixing\.layers: .*2 MoE layers",
        ),
        (
            (*MIX, "mixing=dynamic", "moe.layers=all", "mixing.layers=[4]"),
            r"mixing\.layers: .*4 MoE layers",
        ),
        ((*IMAGES, "mixing=dynamic", "mixing.metric=l1"), r"mixing\.metric: expected"),
        ((*IMAGES, "mixing=uniform", "mixing.eta=3"), r"mixing\.eta: mixing=uniform has no use"),
        ((*IMAGES, "mixing=dynamc"), "mixing: .*dynamic"),
        ((*IMAGES, "mixing=fixed"), r"mixing\.weights: required"),
        ((*IMAGES, "mixing=ref_loss"), r"mixing\.reference: required"),
        (
            (*IMAGES, "mixing=ref_loss", "mixing.reference=/nowhere"),
            r"mixing\.reference: expected a run folder with a mixing\.jsonl",
        ),
        (
            (*IMAGES, "mixing=ref_loss", "mixing.reference=[a]"),
            r"mixing\.reference: .* or a run folder",
        ),
        ((*MIX, "mixing=fixed", "mixing.weights=3"), r"mixing\.weights: expected {source"),
        ((*IMAGES, "mixing=fixed", "mixing.weights=null"), r"mixing\.weights: .* found none"),
        ((*IMAGES, "mixing=ref_loss", "mixing.reference=null"), r"mixing\.reference: .* none"),
        ((*MIX, "mixing=fixed", "mixing.weights=[0,0]"), r"mixing\.weights: .* some above 0"),
        ((*MIX, "mixing=fixed", "mixing.weights={rte: a}"), r"mixing\.weights: expected {source"),
        (
            (*IMAGES, "mixing=dynamic", "trainer=fsdp", "trainer.accelerator=cpu"),
            "mixing: probes need whole weights.*trainer=ddp",
        ),
        ((*MIX, "data.tasks=[rte,mrcp]"), r"data\.tasks: no task 'mrcp'.*'mrpc'"),
        ((*MIX, "data.tasks=[rte]"), r"data\.tasks: expected two .*data=rte"),
        ((*MIX, "data.tasks=[rte,rte]"), r"data\.tasks: expected two different"),
        ((*MIX, "data.ood=[hans]", "data.ood_root=."), r"data\.ood: is for one task"),
    ],
)
def test_refused(command: tuple[str, ...], expected: str) -> None:
    (text,) = found(*command)
    assert re.match(expected, text), text


def made(*overrides: str) -> DictConfig:
    with search_path():
        return compose("config", list(overrides))


def test_without_mixing_nothing_is_another_run() -> None:
    assert "mixing" not in made(*IMAGES)
    names = {run_name(made(*IMAGES, *more)) for more in ((), ("mixing=uniform",))}
    assert len(names) == 2
    assert "mixingdynamic-every50" in run_name(made(*IMAGES, "mixing=dynamic", "mixing.every=50"))


def test_earlier_stages_are_shared(tmp_path: Path) -> None:
    """The mixture is that of the stage which asks for it."""
    plain, mixed = (
        previous(made("task=vl", f"paths.outputs={tmp_path}", *more))
        for more in ((), ("mixing=dynamic",))
    )
    assert plain is not None and mixed is not None
    assert run_name(plain) == run_name(mixed)


def test_a_reference_run_is_known_by_its_own_folder(tmp_path: Path) -> None:
    names = []
    for place in ("a", "b"):
        folder = tmp_path / place / "outputs" / "run_seed0_01234567"
        folder.mkdir(parents=True)
        (folder / "mixing.jsonl").write_text(json.dumps({"step": 1}) + "\n")
        cfg = made(*IMAGES, "mixing=ref_loss", f"mixing.reference={folder}")
        names.append(run_name(cfg))
    assert names[0] == names[1]
