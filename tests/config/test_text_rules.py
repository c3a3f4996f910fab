"""What a run on texts is refused for, before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynmoe.config import rules
from dynmoe.config.compose import preflight

TASK = "task=glue"


def problems(*overrides: str) -> list[str]:
    return preflight([TASK, *overrides]).problems


def test_right_commands(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    assert problems() == []
    assert problems("moe=dynmoe", "schedule=glue_paper", "protocol=glue_heldout") == []
    local = ("data=rte", "data.source=tsv", f"data.root={tmp_path}", f"backbone.path={tmp_path}")
    assert problems(*local, "task.steps=5", "task.eval_every=2") == []


CASES = {
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
    ("task.steps=0",): "task.steps: expected 1 or more, found 0",
    ("moe=dense", "schedule=glue_code"): "schedule: moe=dense does not adapt its experts.",
    ("data=rotated_digits",): "data: task.module works on text, this data on image. Choose data=c",
    ("backbone=vit_small",): "backbone: task.module works on text, this backbone on image. Choose",
}


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_wrong_commands(overrides: tuple[str, ...]) -> None:
    found = problems(*overrides)
    assert any(text.startswith(CASES[overrides]) for text in found), found


def test_a_protocol_of_texts_is_not_for_images() -> None:
    found = preflight(["task=vit_domainbed", "protocol=glue"]).problems
    expected = "protocol: task.module works on image, protocol=glue does not. Choose"
    assert any(text.startswith(expected) for text in found)
    assert not any("Interpolation" in text for text in found)


def test_steps_without_epochs_are_not_endless() -> None:
    (text,) = preflight(["task=vit_domainbed", "task.steps=-1"]).problems
    assert text.startswith("task.steps: -1 takes the length from task.epochs")


def test_patience_is_for_texts() -> None:
    (text,) = preflight(["task=vit_domainbed", "+task.patience=2"]).problems
    assert text == "task.patience: only text runs stop early. Leave it out"


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "find_spec", lambda name: None)
    (text,) = problems()
    assert text == 'task: needs transformers and datasets: pip install "dynmoe[language]"'
