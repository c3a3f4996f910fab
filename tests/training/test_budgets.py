"""``dynmoe-eval mode=budget``: what is refused, and a trained run at other budgets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hydra import compose
from omegaconf import OmegaConf
from tiny_runs import Trained, forty_images

from dynmoe.config.budgets import RULES
from dynmoe.config.compose import search_path
from dynmoe.errors import ConfigError
from dynmoe.layers import posthoc
from dynmoe.layers.posthoc import Cuts
from dynmoe.records import Record, RunFolder
from dynmoe.report.budgets import OWN, budget_table, draw_budgets, subject_of
from dynmoe.report.evaluations import newest, title_of
from dynmoe.training import evaluate
from dynmoe.training.budgets import PASSES, budget, reached


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
            ["mode=budget", "budget.rule=top_k", "budget.values=[1,2.5]"],
            r"budget.values: .*whole.*\[2.5\]",
        ),
        (
            ["mode=budget", "budget.rule=top_k", "budget.values=[a]"],
            "budget.values: expected numbers.*a",
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


def test_the_check_knows_all_rules() -> None:
    assert tuple(RULES) == posthoc.RULES


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


class Falling(Cuts):
    """Cuts that are moved by what the mean lacks: ``share`` of the way."""

    share = 0.5

    def moved_to(self, target_k: float) -> Falling:
        start = self.at["layer"]
        return Falling(self.rule, {"layer": start + self.share * (4 - target_k - start)})


def test_cuts_are_moved_until_the_mean_is_there() -> None:
    tried = []

    def evaluated(cuts: Cuts) -> Record:
        tried.append(cuts.at["layer"])
        return {"mean_k": 4 - cuts.at["layer"]}

    record, cuts = reached(evaluated, Falling("ratio", {"layer": 2.2}), 2.0)
    assert tried == pytest.approx([2.1, 2.05, 2.025, 2.0125])  # the last is within 1 % of 2
    assert record == {"mean_k": pytest.approx(1.9875), "target_k": 2.0}
    assert cuts.at["layer"] == tried[-1]
    tried.clear()
    record, _ = reached(evaluated, Falling("ratio", {"layer": 0.0}), 1.0)
    assert len(tried) == PASSES and record["mean_k"] == 4 - tried[-1]


def line(rule: str, mean_k: float, cut: float | None = None) -> Record:
    cuts = None if cut is None else {"a": cut, "b": 2 * cut}
    layers = {"a": mean_k - 0.5, "b": mean_k + 0.5}
    numbers = {"mean_k": mean_k, "score": mean_k / 10, "loss": 3 - mean_k}
    about = {"step": 8, "checkpoint": "last.ckpt", "data_hash": "1f", "rule": rule}
    return about | {"target_k": cut and 1.5, "cuts": cuts, "layers": layers} | numbers


def test_table_and_figure() -> None:
    records = [line(OWN, 2.0), line("ratio", 1.5, 0.25), line("ratio", 1.2, 0.5)]
    records = [{**each, "measure": "accuracy"} for each in records]
    table = budget_table(records, "a run")
    assert table.rows[0] == ("as trained", "-", "-", "2.00", "1.50 to 2.50", "20.00", "1.0000")
    assert table.rows[1][:5] == ("ratio", "1.5", "0.25 to 0.5", "1.50", "1.00 to 2.00")
    assert "without their labels" in table.note
    stream = budget_table([{**each, "measure": "loss"} for each in records], "a run")
    assert "labels" not in stream.note and "by mean k alone" in stream.note
    scores, losses = draw_budgets(records, "a run").axes
    own, ratio = scores.lines
    assert (
        np.asarray(own.get_xydata()).tolist() == [[2.0, 20.0]] and own.get_label() == "as trained"
    )
    assert np.asarray(ratio.get_xydata()).tolist() == [[1.2, 12.0], [1.5, 15.0]]
    assert np.asarray(losses.lines[1].get_ydata()).tolist() == [1.8, 1.5]


def test_evaluations_of_several_weights() -> None:
    """A cut that was found for a target anew takes the place of the one before."""
    first = [{**line(OWN, 2.0), "measure": "accuracy"}]
    first += [{**line("ratio", 1.5, cut), "measure": "accuracy"} for cut in (0.25, 0.26)]
    others = [{**each, "checkpoint": "selected.ckpt", "step": 4} for each in first]
    found = newest([*others, *first, others[0]], subject_of)
    assert found == [others[0], others[2], first[0], first[2]]
    names = [row[0] for row in budget_table(found, title_of("a run", found)).rows]
    assert names[1:3] == ["selected.ckpt, step 4: ratio", "last.ckpt, step 8: as trained"]
    (scores, _) = draw_budgets(found, "a run").axes
    assert [line.get_marker() for line in scores.lines] == ["*", "P", "o", "s"]
    values = [{**first[1], "target_k": None, "cuts": {"a": cut}} for cut in (0.25, 0.5)]
    assert newest(values, subject_of) == values


def test_mean_k_is_of_the_reported_places(tmp_path: Path) -> None:
    """A score on one environment, and how many experts its tokens have there."""
    folder = RunFolder(tmp_path)
    reported = {"sets": ["b/in"], "measure": "accuracy"}
    facts = {"reported": reported, "env_names": ["a", "b"], "test_envs": [1]}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    scores = {name: {"accuracy": 0.5, "loss": 1.0} for name in ("a/in", "b/in")}
    loads = {"train": 90, "a": 40, "b": 15}
    routing = [{"source": s, "layer": "0", "load": [n], "tokens": 10} for s, n in loads.items()]
    task = SimpleNamespace(
        env_names=["a", "b"], scores=lambda: scores, routing_records=lambda: routing
    )
    found = evaluate.judged(task, evaluate.reported_by(folder))
    assert found["mean_k"] == 1.5 and found["layers"] == {"0": 1.5}
    assert evaluate.judged(task, {"measure": "accuracy"})["mean_k"] == 2.75


def evaluated(folder: RunFolder, *words: str) -> dict[tuple[str, float | None], Record]:
    given = [f"run={folder.path}", "mode=budget", "checkpoint=last", "data.workers=0", *words]
    budget(*evaluate.parse(given)[1:])
    return {(each["rule"], each["target_k"]): each for each in folder.read("budget")}


@pytest.fixture(scope="module")
def top_2(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run on 40 images."""
    return trained(*forty_images(tmp_path_factory.mktemp("images")), moe="topk")


def test_a_trained_run_at_a_wanted_mean_and_at_given_cuts(top_2: RunFolder) -> None:
    found = evaluated(top_2, "budget.rule=quantile", "budget.targets=2.5")
    own, last = found["own", None], top_2.read("results")[-1]
    assert own["scores"] == last["scores"] and own["step"] == last["step"]
    assert own["mean_k"] == 2 and set(own["layers"].values()) == {2.0}
    assert own["score"] == own["scores"]["a/in"]["accuracy"]
    more = found["quantile", 2.5]
    assert more["mean_k"] == pytest.approx(2.5, rel=0.015) and more["loss"] != own["loss"]
    assert list(more["layers"].values()) == pytest.approx([2.5] * len(own["layers"]), rel=0.05)
    assert (top_2.path / "figures" / "budget.png").stat().st_size > 0
    again = evaluated(top_2, "budget.rule=ratio", "budget.values=[0]")
    assert list(again) == [("own", None), ("quantile", 2.5), ("ratio", None)]
    assert again["ratio", None]["scores"] == own["scores"] and again["quantile", 2.5] == more


@pytest.mark.slow
def test_every_rule_on_a_trained_run(top_2: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(top_2, "budget.targets=[1,1.5,2,3]")
    own = found["own", None]
    for rule in ("entropy", "ratio", "quantile"):
        for target in (1.0, 1.5):
            assert found[rule, target]["mean_k"] == pytest.approx(target, rel=0.02)
    assert found["quantile", 3.0]["mean_k"] == pytest.approx(3, rel=0.02)
    assert not {("ratio", 3.0), ("entropy", 3.0), ("top_k", 3.0), ("top_k", 1.5)} & set(found)
    assert found["top_k", 2.0]["scores"] == own["scores"]
    one = [found[rule, 1.0] for rule in ("top_k", "ratio", "entropy", "quantile")]
    for each in one:  # the best expert alone, whatever the rule
        assert each["mean_k"] == 1 and each["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    assert one[0]["loss"] != own["loss"]
    said = capsys.readouterr().out
    assert "ratio: mean k 3 is out of reach, 1.00 to 2.00" in said and "as trained" in said
