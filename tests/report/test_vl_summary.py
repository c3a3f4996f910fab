"""The summary and figures of a run about images: kinds of questions, other images, k by part."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from vl_runs import write_vl_run

from dynmoe.records import RunFolder
from dynmoe.report.document import Picture
from dynmoe.report.figures import figures_of
from dynmoe.report.routing_figures import draw_k_by_part, draw_load_by_part
from dynmoe.report.run import read_run
from dynmoe.report.summary import to_console, to_markdown
from dynmoe.report.words import PARTS, by_part


def shown(folder: RunFolder) -> str:
    return to_markdown(read_run(folder))


def test_scores_with_what_shuffled_means_and_what_comes_without_images(tmp_path: Path) -> None:
    text = shown(write_vl_run(tmp_path))
    assert text.startswith(
        "# DynMoE on Scenes, evaluation set test\n\n"
        "Stage moe, started from vl_instruct/scenes_dense_seed0_0123abc0. "
        "Protocol llava, selection the last step; "
    )
    assert (
        "## Scores at the last step, 150 of 151 (epoch 3.0)\n\n"
        "| evaluation set | accuracy, % | loss |\n"
        "| --- | ---: | ---: |\n"
        "| test (reported) | **60.0** | 2.0000 |\n"
        "| shuffled | 40.0 | 2.0000 |\n\n"
        "shuffled: the same questions about other images; a model that uses the image scores lower "
        "here.\n"
        "most frequent answer to the same question: 35.0 % on test\n"
        "most frequent answer of all: 20.0 %\n"
    ) in text
    assert "- length: 12.5 tokens per conversation, its image included, on average" in text


def test_answers_that_were_cut_off(tmp_path: Path) -> None:
    folder = write_vl_run(tmp_path)
    assert "cut answers" not in shown(folder)
    file = folder.path / "results.jsonl"
    lines = [{**line, "cut_answers": {"test": 3, "shuffled": 0}} for line in folder.read("results")]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "- cut answers: 3 of 500 on test (data.max_new_tokens allows longer ones)" in shown(
        folder
    )


def test_kinds_of_questions(tmp_path: Path) -> None:
    assert (
        "## Scores by kind of question on test, %\n\n"
        "| setting | colour | yes no |\n"
        "| --- | ---: | ---: |\n"
        "| DynMoE | 70.0 | 50.0 |\n"
    ) in shown(write_vl_run(tmp_path))


def test_points_are_no_per_cent_and_every_headline_is_named(tmp_path: Path) -> None:
    kinds = {
        "mme": {"perception_points": 1260.0, "ocr_points": 87.5},
        "pope": {"adversarial_f1": 0.81},
    }
    scores = {"pope": 0.8, "mme": 0.63}
    text = shown(write_vl_run(tmp_path, scores=scores, kinds=kinds, facts={"baseline": None}))
    assert "| evaluation set | mean F1 over the splits, x 100 | loss |" in text
    assert "## Scores by kind of question on pope, %\n\n| setting | adversarial f1 |" in text
    assert "| DynMoE | 81.0 |" in text
    assert (
        "## Scores by kind of question on mme, points\n\n| setting | ocr | perception |\n"
        "| --- | ---: | ---: |\n| DynMoE | 87.5 | 1260.0 |\n"
    ) in text
    assert (
        "pope: mean F1 over the splits.\nmme: points of perception / 2000.\n"  # in the sets' order
    ) in text
    assert "Without images" not in text and "shuffled" not in text


def test_k_by_part_of_every_layer_and_their_mean(tmp_path: Path) -> None:
    text = shown(write_vl_run(tmp_path))
    assert "## Experts that a token activates, by what it is\n\n" in text
    assert "| blocks.2.mlp | test | 5.00 | 1.00 | 1.50 | 2.00 |\n" in text
    assert "| mean of layers | test | 5.00 | 1.25 | 1.75 | 2.25 |\n" in text
    assert "| blocks.4.mlp | training | 5.00 | 1.25 | 1.75 | 2.25 |\n" in text


def test_every_line_of_every_table_fits_into_80_columns(tmp_path: Path) -> None:
    run = read_run(write_vl_run(tmp_path))
    console = Console(width=80, record=True, file=StringIO())
    console.print(to_console(run))
    text = console.export_text()
    (row,) = (line for line in text.splitlines() if "mean of layers" in line and "test" in line)
    assert row.split()[-4:] == ["5.00", "1.25", "1.75", "2.25"]
    (heads,) = (line for line in text.splitlines() if "experts" in line and "prompt" in line)
    assert heads.split() == ["setting", "MoE", "layer", "on", "experts", *PARTS]


def test_a_dense_run_has_no_parts_and_captions_answer_nothing_yet(tmp_path: Path) -> None:
    facts = {"stage": "align"}
    text = shown(write_vl_run(tmp_path, "dense", facts=facts, config={"stage.start": None}))
    assert "# dense on Scenes, evaluation set test\n\nStage align. Protocol llava, " in text
    assert "This stage trains on captions alone; answers come with the next one." in text
    assert "by what it is" not in text


def test_figures_of_parts_and_examples(tmp_path: Path) -> None:
    own = {"k_by_part", "load_by_part", "examples"}
    assert own < figures_of(read_run(write_vl_run(tmp_path))).keys()
    assert not own & figures_of(read_run(write_vl_run(tmp_path, "dense"))).keys()


def test_a_fixed_k_is_the_same_for_all_tokens(tmp_path: Path) -> None:
    folder = write_vl_run(tmp_path, "top-2 of 4")
    figures = figures_of(read_run(folder))
    assert "k_by_part" not in figures and "load_by_part" in figures
    assert "by what it is" not in shown(folder)


def pictured(picture: Picture | None) -> Figure:
    assert picture is not None
    return picture.figure


def test_the_figure_of_k_has_every_part_and_the_experts_there_are(tmp_path: Path) -> None:
    (tested,) = pictured(draw_k_by_part([read_run(write_vl_run(tmp_path))])).axes
    means = [line for line in tested.get_lines() if line.get_marker() in "so^"]
    assert [list(line.get_ydata()) for line in means] == [[1.0, 1.5], [1.5, 2.0], [2.0, 2.5]]
    # Of 2 experts at the start, one more at each of three updates.
    assert list(tested.get_lines()[-1].get_ydata()) == [5, 5]


def test_the_figure_of_load_has_shares_of_each_part(tmp_path: Path) -> None:
    figure = pictured(draw_load_by_part([read_run(write_vl_run(tmp_path))]))
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
