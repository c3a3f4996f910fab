"""Refusals of runs on texts and of runs in stages, before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynmoe.config import machine, task_rules
from dynmoe.config.compose import preflight

TASK, TEXTS = "task=vl", "task=glue"


def problems(*overrides: str) -> list[str]:
    return preflight(overrides).problems


def test_right_commands(tmp_path: Path) -> None:
    for stage in ("align", "instruct", "moe"):
        assert problems(TASK, f"stage={stage}") == []
    assert problems(TASK, "moe=topk") == problems(TASK, "moe=dense") == []
    (tmp_path / "config.yaml").touch()
    assert problems(TASK, f"stage.start={tmp_path}") == []
    assert problems(TASK, "stage.start=null") == []


def test_right_commands_on_texts(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    assert problems(TEXTS) == []
    assert problems(TEXTS, "moe=dynmoe", "schedule=glue_paper", "protocol=glue_heldout") == []
    local = ("data=rte", "data.source=tsv", f"data.root={tmp_path}", f"backbone.path={tmp_path}")
    assert problems(TEXTS, *local, "task.steps=5", "task.eval_every=2") == []


SCENES = ("data=scenes", "backbone=vl_tiny")
CASES: dict[tuple[str, ...], str] = {
    (TASK, "~stage"): "stage: this task runs in stages. Choose stage=align, instruct or moe.",
    ("task=glue", "stage=align"): "stage: only task=vl runs in stages, found stage=align. Leave it",
    ("task=vit_domainbed", "stage=moe"): "stage: only task=vl runs in stages, found stage=moe.",
    (TASK, "stage=mo"): "stage: no option 'mo'. Did you mean 'moe'? Options: align, instruct, moe",
    (TASK, "stage=instruct", "moe=dynmoe_vl"): (
        "moe: stage=instruct trains the dense model, found moe=dynmoe_vl. Leave moe out, or choose "
        "stage=moe, which runs the stages before it first."
    ),
    (TASK, "stage=align", "moe=topk"): "moe: stage=align trains the dense model, found moe=topk.",
    (TASK, "stage.start=nowhere"): (
        "stage.start: expected a run folder with a config.yaml, found none in 'nowhere'"
    ),
    (TASK, "stage=instruct", "stage.start=."): "stage.start: expected a run folder with a config",
    (TASK, "task.module.trains=[projecter]"): (
        "task.module.trains: expected some of vision, projector, language_model, moe_layers, "
        "dense_ffns, found 'projecter'"
    ),
    (TASK, "task.module.trains=projector"): "task.module.trains: expected a list, found",
    (TASK, "protocol=glue"): (
        "protocol: task.module works on vision-language, protocol=glue does not. Choose"
    ),
    (TASK, "protocol=domainbed"): (
        "protocol: task.module works on vision-language, protocol=domainbed does not. Choose"
    ),
    ("task=glue", "protocol=llava"): (
        "protocol: task.module works on text, protocol=llava does not. Choose protocol=glue"
    ),
    ("task=vit_domainbed", "protocol=llava"): (
        "protocol: task.module works on image, protocol=llava does not. Choose protocol=domainbed,"
    ),
    (TASK, "task.selection=best_dev"): (
        "task.selection: best_dev is not for a task on vision-language. Choose protocol=llava."
    ),
    ("task=glue", "task.selection=last_step"): (
        "task.selection: last_step is not for a task on text. Choose protocol=glue or"
    ),
    ("task=vit_domainbed", "task.selection=last_step"): (
        "task.selection: last_step is not for a task on image. Choose protocol=domainbed."
    ),
    (TASK, "+task.patience=2"): "task.patience: only text runs stop early. Leave it out",
    (TASK, "backbone=vit_small"): "backbone: task.module works on vision-language, this backbone",
    (TASK, "data=glosses"): "data: task.module works on vision-language, this data on text. Choose",
    ("task=glue", *SCENES): "data: task.module works on text, this data on vision-language.",
    (TASK, "data.fit=squeeze"): "data.fit: expected 'pad' or 'crop' or 'stretch', found 'squeeze'",
    (TASK, "moe.layers=third_half"): "moe.layers: expected 'last_two' or",
    (TASK, "moe.layers=[4]"): "moe.layers: expected block indices below 4 (backbone.options.num_",
    (TASK, "task.epochs=0"): "task.epochs: expected 1 or more, found 0",
    (
        TASK,
        "data.batch_size=64",
        "trainer.accumulate_grad_batches=5",
    ): "data.batch_size: 64 does not divide into",
    # images
    ("task=vit_domainbed", "protocol=glue"): (
        "protocol: task.module works on image, protocol=glue does not. Choose"
    ),
    ("task=vit_domainbed", "task.steps=-1"): "task.steps: -1 takes the length from task.epochs",
    ("task=vit_domainbed", "+task.patience=2"): "task.patience: only text runs stop early. Leave",
}
ON_TEXTS = {
    ("data=rte", "data.source=tsv"): "data.root: data.source=tsv needs the folder of the files",
    ("data=rte", "data.root=."): "data.root: data.source=hub reads no folder. Add data.source=tsv",
    ("data.source=csv",): "data.source: expected 'hub' or 'tsv' or 'parquet' or 'embedded'",
    ("data.ood=[hans]",): "data.ood_root: data.ood=['hans'] needs the folder of their files",
    ("data.ood=[hans]", "data.ood_root=nowhere"): "data.ood_root: no folder 'nowhere'",
    ("data.ood=[dev]", "data.ood_root=."): "data.ood: dev is a set of the task itself.",
    ("data.ood=[mismatched]", "data.ood_root=."): "data.ood: mismatched is a set of the task",
    ("data.ood=[a.b]", "data.ood_root=."): "data.ood: expected a name of letters, digits, _ and -",
    ("data=stsb", "data.linear_baseline=true"): "data.linear_baseline: needs classes",
    ("data=ax",): "data: no option 'ax'. AX is a test set of MNLI's models: train with data=mnli",
    ("moe.layers=[1,4]",): "moe.layers: expected block indices below 4 (backbone.options.num_hidd",
    ("backbone=minilm", "backbone.path=nowhere"): "backbone.path: expected a folder with a config",
    ("hparams_seed=1",): "hparams_seed: draws DomainBed's hyper-parameters. Sweep task.optimizer",
    (
        "protocol=domainbed",
    ): "protocol: task.module works on text, protocol=domainbed does not. Choose",
    ("task.selection=oracle",): "task.selection: oracle is not for a task on text. Choose protocol",
    ("task.selection=heldout",): "protocol.holdout_fraction: 0 leaves no examples to select by.",
    ("task.epochs=0",): "task.epochs: expected 1 or more, found 0",
    ("task.steps=0",): "task.steps: expected 1 or more, or -1",
    ("moe=dense", "schedule=glue_code"): "schedule: moe=dense does not adapt its experts.",
    ("data=rotated_digits",): "data: task.module works on text, this data on image. Choose data=c",
    ("backbone=vit_small",): "backbone: task.module works on text, this backbone on image. Choose",
}
CASES |= {(TEXTS, *key): text for key, text in ON_TEXTS.items()}


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_wrong_commands(overrides: tuple[str, ...]) -> None:
    found = problems(*overrides)
    assert any(text.startswith(CASES[overrides]) for text in found), found
    assert not any("Interpolation" in text for text in found), found


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (machine, task_rules):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert problems(TASK) == ['task: needs transformers: pip install -e ".[language]"']
    both = 'task: needs transformers and datasets: pip install -e ".[language]"'
    assert problems(TEXTS) == [both]


@pytest.mark.parametrize("protocol", ["gmoe", "swad"])
def test_protocols_that_draw_from_other_ranges_have_no_draws_of_domainbed(protocol: str) -> None:
    command = ("task=vit_domainbed", f"protocol={protocol}")
    (found,) = problems(*command, "hparams_seed=1")
    assert found.startswith("hparams_seed: ") and "protocol=domainbed" in found
    assert problems(*command) == []
