"""The summary and figures of a run about images: kinds of questions, other images, k by part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dynmoe.report.summary import summarize
from vl_runs import write_vl_run

from dynmoe.records import RunFolder
from dynmoe.report.figures import draw_all
from dynmoe.report.part_figures import draw_k_by_part, draw_load_by_part
from dynmoe.report.render import to_markdown
from dynmoe.report.words import by_part, kinds_of

LAYERS = ["blocks.2.mlp", "blocks.4.mlp"]


def shown(folder: RunFolder) -> str:
    return to_markdown(summarize(folder))


def test_scores_with_what_shuffled_means_and_what_comes_without_images(tmp_path: Path) -> None:
    text = shown(write_vl_run(tmp_path))
    assert text.startswith(
        "# DynMoE on Scenes\n\nStage moe, started from vl_instruct/scenes_dense_seed0_0123abc0. "
        "Protocol llava, selection the last step; "
    )
    assert (
        "## Scores at the last step, 150 of 151 (epoch 3.0)\n\n"
        "| evaluation set | accuracy, % |\n"
        "| --- | ---: |\n"
        "| test (reported) | **60.0** |\n"
        "| shuffled | 40.0 |\n\n"
        "shuffled: the same questions about other images; who looks at images loses there.\n"
        "Without images test gives 35.0 % by the most frequent answer to the same question, "
        "20.0 % by the most frequent answer of all.\n"
    ) in text
    assert "- length: 12.5 tokens per conversation, its image included, on average" in text


def test_sets_of_the_same_kinds_share_a_table(tmp_path: Path) -> None:
    assert (
        "## By kind of question, in %\n\n"
        "| kind | test | shuffled |\n"
        "| --- | ---: | ---: |\n"
        "| colour | 70.0 | 50.0 |\n"
        "| yes no | 50.0 | 30.0 |\n"
    ) in shown(write_vl_run(tmp_path))


def test_points_are_no_per_cent_and_every_headline_is_named(tmp_path: Path) -> None:
    results = {
        "mme_perception_points": 1260.0,
        "mme_ocr_points": 87.5,
        "pope_adversarial_f1": 0.81,
    }
    scores = {"pope": 0.8, "mme": 0.63}
    text = shown(write_vl_run(tmp_path, scores=scores, results=results, facts={"baseline": None}))
    assert "| evaluation set | mean F1 over the splits, x 100 |" in text
    assert "## By kind of question, in %\n\n| kind | pope |" in text
    assert "| adversarial f1 | 81.0 |" in text
    assert (
        "## By kind of question, in points\n\n| kind | mme |\n| --- | ---: |\n"
        "| ocr | 87.5 |\n| perception | 1260.0 |\n"
    ) in text
    assert (
        "pope: mean F1 over the splits.\nmme: points of perception / 2000.\n"  # in the sets' order
    ) in text
    assert "Without images" not in text and "shuffled" not in text


def test_k_by_part_of_every_layer_and_their_mean(tmp_path: Path) -> None:
    text = shown(write_vl_run(tmp_path))
    title = "## Mean k by part of the conversation\n\n"
    columns = [
        f"{part}, {where}" for where in ("test", "train") for part in ("image", "prompt", "answer")
    ]
    head = f"| MoE layer | {' | '.join(columns)} |\n"
    assert title + head in text
    assert "| blocks.2.mlp | 1.00 | 1.50 | 2.00 | 0.75 | 1.25 | 1.75 |\n" in text
    assert "| blocks.4.mlp | 1.50 | 2.00 | 2.50 | 1.25 | 1.75 | 2.25 |\n" in text
    assert "| mean | 1.25 | 1.75 | 2.25 | 1.00 | 1.50 | 2.00 |\n" in text


def test_a_dense_run_has_no_parts_and_captions_answer_nothing_yet(tmp_path: Path) -> None:
    facts = {"stage": "align"}
    text = shown(write_vl_run(tmp_path, "dense", facts=facts, config={"stage.start": None}))
    assert "# ERM on Scenes\n\nStage align. Protocol llava, " in text
    assert "This stage trains on captions alone; answers come with the next one." in text
    assert "part of the conversation" not in text


def test_figures_of_parts_and_examples(tmp_path: Path) -> None:
    own = {"k_by_part.png", "load_by_part.png", "examples.png"}
    assert own < {path.name for path in draw_all(write_vl_run(tmp_path))}
    assert not own & {path.name for path in draw_all(write_vl_run(tmp_path, "dense"))}


def test_a_fixed_k_is_the_same_for_all_tokens(tmp_path: Path) -> None:
    folder = write_vl_run(tmp_path, "top-2 of 4")
    assert "k_by_part.png" not in {path.name for path in draw_all(folder)}
    text = shown(folder)
    assert "part of the conversation" not in text and "load_by_part" in text


def lines_of(folder: RunFolder, source: str) -> list[dict[str, Any]]:
    return [line for line in folder.read("routing") if line["source"] == source]


def test_the_figure_of_k_has_training_beside_the_set(tmp_path: Path) -> None:
    folder = write_vl_run(tmp_path)
    figure = draw_k_by_part(LAYERS, lines_of(folder, "train"), lines_of(folder, "env0"), "test")
    training, tested = figure.axes
    assert (training.get_title(), tested.get_title()) == ("in training", "on test")
    curves = {line.get_label(): list(line.get_ydata()) for line in tested.get_lines()}
    assert curves == {
        "image": [1.0, 1.5],
        "prompt": [1.5, 2.0],
        "answer": [2.0, 2.5],
        "living experts": [5, 5],  # of 2 at the start, one more at each of three updates
    }
    assert training.get_lines()[0].get_ydata() == pytest.approx([0.75, 1.25], abs=0.01)


def test_the_figure_of_load_has_shares_of_each_part(tmp_path: Path) -> None:
    folder = write_vl_run(tmp_path)
    figure = draw_load_by_part(LAYERS, lines_of(folder, "env0"), "test")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["image", "prompt", "answer"]
    assert axes.get_images()[0].get_array().tolist() == [[50, 50, 0, 0, 0]] * 3


def test_parts_of_several_records_are_summed() -> None:
    def line(tokens: int, load: list[int]) -> dict[str, Any]:
        part = {"tokens": tokens, "mean_k": sum(load) / max(1, tokens), "load": load}
        none = {"tokens": 0, "mean_k": 0.0, "load": [0, 0]}
        return {"parts": {"image": part, "prompt": part, "answer": none}}

    found = by_part([line(10, [10, 5]), line(30, [0, 15])])
    assert found["image"] == (40, 0.75, (10, 20))
    assert found["answer"].mean_k != found["answer"].mean_k  # NaN: nothing was said
    assert by_part([{"layer": "a"}]) == {}


def test_keys_of_a_set_whose_name_begins_like_another() -> None:
    record = {"vqa_score": 1.0, "vqa_kind_a": 0.5, "vqa_hard_kind_b": 0.25, "vqa_accuracy": 1.0}
    assert kinds_of(record, "vqa", ["vqa", "vqa_hard"]) == {"kind_a": 0.5}
    assert kinds_of(record, "vqa_hard", ["vqa", "vqa_hard"]) == {"kind_b": 0.25}
