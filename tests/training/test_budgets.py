"""``dynmoe-eval mode=budget``: what is refused, and a trained run at other budgets."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from hydra import compose
from omegaconf import OmegaConf
from PIL import Image
from tiny_runs import Run

from dynmoe.config.compose import search_path
from dynmoe.errors import ConfigError
from dynmoe.records import Record, RunFolder
from dynmoe.training import evaluate
from dynmoe.training.budgets import budget


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on top-2, as far as it is read before data and weights are."""
    folder = tmp_path_factory.mktemp("run")
    with search_path():
        cfg = compose("config", ["task=vit_domainbed", "moe=topk"])
    del cfg.logger
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "selected.ckpt").touch()
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["budget.rule=ratio"], "budget.rule=ratio: .*expected with mode=budget"),
        (["mode=budget", "budget.rle=ratio"], "budget.rle=ratio: unknown argument.*budget.rule="),
        (
            ["mode=budget", "budget.rule=ration"],
            "budget.rule: expected one of .*'ration",
        ),
        (["mode=budget", "budget.targets=[9]"], "budget.targets: .*up to 8.*, found 9"),
        (["mode=budget", "budget.targets=0"], "budget.targets: expected more than 0"),
        (["mode=budget", "budget.targets=[]"], "budget.targets: expected numbers.*found none"),
        (["mode=budget", "budget.targets=[true]"], "budget.targets: expected numbers.*True"),
        (["mode=budget", "budget.targets=[.nan]"], "budget.targets: expected numbers.*nan"),
        (["mode=budget", "budget.values=[0.1]"], "budget.values: .*Add budget.rule="),
        (
            ["mode=budget", "budget.rule=ratio", "budget.values=0.1", "budget.targets=[1]"],
            "budget.values: found beside budget.targets",
        ),
        (
            ["mode=budget", "budget.rule=ratio", "budget.values=[1]"],
            "budget.values: expected 0 or more, below 1, found 1",
        ),
        (
            ["mode=budget", "budget.rule=top_k", "budget.targets=[1.5]"],
            "budget.targets: budget.rule=top_k takes whole numbers",
        ),
    ],
)
def test_a_wrong_budget_is_named(saved: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate.parse([f"run={saved}", *words])


def test_a_rule_that_does_not_fit_is_refused_before_weights_are_read(saved: Path) -> None:
    words = [f"run={saved}", "mode=budget", "budget.rule=threshold"]
    with pytest.raises(ConfigError, match="TopKRouter, expected one of entropy, ratio"):
        budget(*evaluate.parse(words)[1:])


def test_runs_without_a_budget_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "run"))
    for moe, message in (("dense", "has no MoE layer"), ("softmoe", "SoftSlots cannot weigh")):
        with search_path():
            cfg = compose("config", ["task=vit_domainbed", f"moe={moe}"])
        del cfg.logger
        OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
        with pytest.raises(ConfigError, match=message):
            budget(*evaluate.parse([f"run={folder}", "mode=budget"])[1:])


def evaluated(folder: RunFolder, *words: str) -> dict[tuple[str, float | None], Record]:
    given = [f"run={folder.path}", "mode=budget", "checkpoint=last", *words]
    budget(*evaluate.parse(given)[1:])
    return {(each["rule"], each["target_k"]): each for each in folder.read("budget")}


@pytest.fixture
def few_images(tmp_path: Path) -> Path:
    image = Image.fromarray(np.arange(28 * 28, dtype=np.uint8).reshape(28, 28))
    for env in ("a", "b"):
        for label in ("x", "y"):
            folder = tmp_path / "images" / env / label
            folder.mkdir(parents=True)
            for i in range(10):
                image.rotate(i * 9 + 90 * (label == "y")).save(folder / f"{i}.png")
    return tmp_path / "images"


def test_a_trained_run_at_other_budgets(
    run: Run, few_images: Path, capsys: pytest.CaptureFixture[str], no_pictures: None
) -> None:
    data = ("data=image_folder", f"data.root={few_images}", "backbone=vit_digits")
    folder = run(*data, "task.steps=1", moe="topk")
    found = evaluated(folder, "budget.targets=[1,1.5,2,3]", "data.workers=0")
    own, last = found["own", None], folder.read("results")[-1]
    assert own["scores"] == last["scores"] and own["mean_k"] == 2
    assert set(own["layers"].values()) == {2.0}
    for rule in ("entropy", "ratio", "quantile"):
        for target in (1.0, 1.5):
            assert found[rule, target]["mean_k"] == pytest.approx(target, rel=0.02)
    assert found["quantile", 3.0]["mean_k"] == pytest.approx(3, rel=0.02)
    assert all(k == pytest.approx(1.5, rel=0.05) for k in found["quantile", 1.5]["layers"].values())
    assert not {("ratio", 3.0), ("entropy", 3.0), ("top_k", 3.0), ("top_k", 1.5)} & set(found)
    same = found["top_k", 2.0]
    assert same["scores"] == own["scores"]
    one = {rule: found[rule, 1.0] for rule in ("top_k", "ratio", "entropy", "quantile")}
    for each in one.values():  # the best expert alone, whatever the rule
        assert each["mean_k"] == 1
        assert each["loss"] == pytest.approx(one["top_k"]["loss"], rel=1e-6)
    assert math.isfinite(own["loss"]) and one["top_k"]["loss"] != own["loss"]
    said = capsys.readouterr().out
    assert "ratio: mean k 3 is out of reach, at most 2.00" in said and "as trained" in said
    assert (folder.path / "figures" / "budget.png").stat().st_size > 0
    again = evaluated(folder, "budget.rule=ratio", "budget.values=[0]", "data.workers=0")
    assert list(again) == [("own", None), ("ratio", None)]
    assert again["ratio", None]["scores"] == own["scores"]
