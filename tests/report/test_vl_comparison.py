"""Comparison of runs about images: use of the images, kinds of questions, k by part, the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vl_runs import write_vl_run

from dynmoe.records import RecordError
from dynmoe.report import page
from dynmoe.report.claim import examine
from dynmoe.report.claim_figures import draw_curves
from dynmoe.report.claim_tables import claim_table, statements
from dynmoe.report.cost_tables import generation_table, search_table
from dynmoe.report.costs import search_cost
from dynmoe.report.document import Section, Sheet, to_text
from dynmoe.report.routing_figures import (
    draw_k_by_part,
    draw_load_by_environment,
    draw_load_by_part,
    draw_overlap,
)
from dynmoe.report.runs import Collection, read_runs
from dynmoe.report.set_tables import (
    QUESTION_ROWS,
    image_use_sentences,
    image_use_table,
    kind_tables,
    parts_table,
    published_table,
    sets_table,
)
from dynmoe.report.summary import compare
from dynmoe.report.tables import Strong


def write_sweep(folder: Path, seeds: int = 3) -> Path:
    """dense does not look at images, top-2 and DynMoE do; each further seed is a point better."""
    for seed in range(seeds):
        for setting, test, shuffled in (
            ("dense", 0.50, 0.50),
            ("top-2 of 4", 0.56, 0.45),
            ("DynMoE", 0.60, 0.40),
        ):
            more = seed / 100
            # Not quite the same difference in each seed, or there would be no chance in it.
            scores = {"test": test + more, "shuffled": shuffled + more * (seed % 2)}
            write_vl_run(folder, setting, scores, seed)
    return folder


def read(*folders: Path) -> Collection:
    collection = read_runs(list(folders))
    assert not collection.warnings
    return collection


def test_seeds_that_start_from_their_own_second_stage_are_one_setting(tmp_path: Path) -> None:
    collection = read(write_sweep(tmp_path / "vl"))
    assert [run.setting for run in collection.runs] == [
        *["dense"] * 3,
        *["top-2 of 4"] * 3,
        *["DynMoE"] * 3,
    ]


def test_runs_that_start_from_something_else_are_another_setting(tmp_path: Path) -> None:
    write_vl_run(tmp_path, "DynMoE")
    write_vl_run(tmp_path, "DynMoE", config={"stage.start": "/models/moe_llava_phi"})
    assert [run.setting for run in read(tmp_path).runs] == [
        "DynMoE, stage.start=/models/moe_llava_phi",
        "DynMoE, stage.start=vl_instruct/scenes_dense",
    ]


def test_the_claim_is_of_the_last_step_and_nothing_was_validated(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    for seed in range(3):
        write_vl_run(tmp_path, "top-1 of 4", {"test": 0.5 + seed / 50, "shuffled": 0.4}, seed)
    collection = read(tmp_path)
    first, *others = statements(collection)
    assert first == (
        "DynMoE on Scenes, evaluation set test, beats the mean of the grid (+6.5 points; n = 3); "
        "no verdict against its best (+4.0 points): the same difference in every repetition."
    )
    assert not any(
        word in sentence
        for sentence in (first, *others)
        for word in ("validation", "At the end of training", "dev")
    )
    (claim,) = examine(collection, collection.problems[0])
    table = claim_table(collection, claim)
    assert [row[0] for row in table.rows] == [
        "DynMoE",
        "mean of the grid",
        "best of the grid (top-2 of 4)",
        "worst of the grid (top-1 of 4)",
        "dense",
    ]
    assert "validation" not in table.note


def test_what_exchanged_images_cost_is_paired(tmp_path: Path) -> None:
    runs = read(write_sweep(tmp_path)).runs
    table = image_use_table(runs)
    assert table is not None
    assert table.columns[1:4] == ("test", "shuffled", "test minus shuffled, points")
    dense, top, own, same, majority = table.rows
    # test 50, 51, 52; shuffled 50, 51, 50; 4.3027 standard errors of 0.667 are 2.87
    assert dense[:4] == ("dense", "51.0 +/- 0.5", "50.3 +/- 0.3", "+0.7 [−2.2, +3.5]")
    assert top[:2] == ("top-2 of 4", "57.0 +/- 0.5")
    # test 60, 61, 62; shuffled 40, 41, 40; t of 20, 20, 22 is 31
    assert own == (
        *("DynMoE", "61.0 +/- 0.5", "40.3 +/- 0.3"),
        *("+20.7 [+17.8, +23.5]", "0.001", "0.0031", "3"),
    )
    assert isinstance(own[3], Strong) and not isinstance(dense[3], Strong)
    assert same[:2] == ("no image: most frequent answer to the same question", "35.0")
    assert majority[:2] == ("no image: most frequent answer of all", "20.0")


def test_the_use_of_images_in_words(tmp_path: Path) -> None:
    dense, _, own = image_use_sentences(read(write_sweep(tmp_path / "three")).runs)
    assert dense == (
        "dense is not significantly better with the right images (+0.7 [−2.2, +3.5] points, "
        "p = 0.42, by Holm 0.42, n = 3)."
    )
    assert own == (
        "DynMoE is better with the right images than with others: it uses them "
        "(+20.7 [+17.8, +23.5] points, p = 0.001, by Holm 0.0031, n = 3)."
    )
    once = image_use_sentences(read(write_sweep(tmp_path / "one", seeds=1)).runs)
    assert once[-1] == (
        "DynMoE: +20.0 points with the right images, which is no verdict on its use of them: one "
        "repetition proves nothing."
    )


def test_exchanged_images_are_not_mentioned_without_any(tmp_path: Path) -> None:
    write_vl_run(tmp_path, scores={"gqa": 0.6})
    runs = read(tmp_path).runs
    assert image_use_table(runs) is None and image_use_sentences(runs) == []


def test_kinds_of_questions_are_means_over_seeds(tmp_path: Path) -> None:
    (table,) = kind_tables(read(write_sweep(tmp_path)).runs).values()
    assert table.title == "Scores by kind of question on test, %"
    assert table.columns == ("setting", "colour", "yes no")
    assert table.rows[0] == ("dense", "61.0 +/- 0.5", "41.0 +/- 0.5")
    assert table.rows[-1] == ("DynMoE", "71.0 +/- 0.5", "51.0 +/- 0.5")
    assert [type(cell) for cell in table.rows[-1]] == [str, Strong, Strong]


def test_published_sets_stand_in_published_measures(tmp_path: Path) -> None:
    scores = {"gqa": 0.6, "scienceqa": 0.5, "mme": 0.63}
    for seed, more in enumerate((0.0, 2.0)):
        kinds = {"scienceqa": {"img": 0.55, "txt": 0.4}, "mme": {"perception_points": 1260 + more}}
        write_vl_run(tmp_path, "DynMoE", scores, seed, kinds=kinds)
    runs = read(tmp_path).runs
    table = published_table(runs)
    assert table is not None
    assert table.columns == (
        *("setting", "gqa, %", "scienceqa, with images", "mme, points of perception"),
    )
    assert table.rows[0] == ("DynMoE", "60.0 +/- 0.0", "55.0 +/- 0.0", "1261.0 +/- 0.7")
    assert ("MoE-LLaVA StableLM-1.6B, top-2 of 4 (published)", "60.3", "62.6", "1318.2") in (
        table.rows
    )
    assert len(table.rows) == 1 + len(QUESTION_ROWS)
    assert "no yardstick" in table.note
    kinds = kind_tables(runs)
    assert list(kinds) == ["scienceqa", "mme"]
    assert kinds["mme"].title == "Scores by kind of question on mme, points"
    assert kinds["mme"].rows == (("DynMoE", "1261.0 +/- 0.7"),)


def test_nothing_published_of_ones_own_sets(tmp_path: Path) -> None:
    assert published_table(read(write_sweep(tmp_path, seeds=1)).runs) is None


def test_further_sets_are_shown_but_not_exchanged_images_alone(tmp_path: Path) -> None:
    collection = read(write_sweep(tmp_path / "own", seeds=1))
    assert sets_table(collection, collection.problems[0]) is None
    write_vl_run(tmp_path / "more", scores={"gqa": 0.6, "pope": 0.8})
    collection = read(tmp_path / "more")
    table = sets_table(collection, collection.problems[0])
    assert table is not None and table.rows == (("DynMoE", "60.0", "80.0"),)
    assert table.note == (
        "At the last step; no set had a part in it. pope: mean F1 over the splits."
    )


def test_k_by_layer_and_part_is_the_mean_over_seeds(tmp_path: Path) -> None:
    table = parts_table(read(write_sweep(tmp_path, seeds=2)).runs)
    assert table is not None
    assert table.columns == ("setting", "MoE layer", "on", "experts", "image", "prompt", "answer")
    assert table.rows == (  # of the adaptive setting alone; the second seed is 0.1 above the first
        ("DynMoE", "blocks.2.mlp", "test", "5.00", "1.05", "1.55", "2.05"),
        ("DynMoE", "blocks.4.mlp", "test", "5.00", "1.55", "2.05", "2.55"),
        ("DynMoE", "mean of layers", "test", "5.00", "1.30", "1.80", "2.30"),
        ("DynMoE", "blocks.2.mlp", "training", "5.00", "0.80", "1.30", "1.80"),
        ("DynMoE", "blocks.4.mlp", "training", "5.00", "1.30", "1.80", "2.30"),
        ("DynMoE", "mean of layers", "training", "5.00", "1.05", "1.55", "2.05"),
    )


def test_the_picture_of_k_by_part(tmp_path: Path) -> None:
    runs = read(write_sweep(tmp_path, seeds=2)).runs
    picture = draw_k_by_part(runs)
    assert picture is not None and "evaluation set test" in picture.caption
    (axes,) = picture.figure.axes
    means = [line.get_ydata() for line in axes.get_lines() if line.get_marker() in "so^"]
    assert np_lists(means) == [[1.05, 1.55], [1.55, 2.05], [2.05, 2.55]]
    assert draw_k_by_part([run for run in runs if run.kind != "adaptive"]) is None


def np_lists(arrays: list[Any]) -> list[Any]:
    return [pytest.approx(list(array)) for array in arrays]


def test_load_is_told_apart_by_part_not_by_exchanged_images(tmp_path: Path) -> None:
    runs = [run for run in read(write_sweep(tmp_path, seeds=1)).runs if run.kind != "dense"]
    picture = draw_load_by_part(runs)
    assert picture is not None and len(picture.figure.axes) == 4
    rows = picture.figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in rows] == ["image", "prompt", "answer"]
    assert draw_load_by_environment(runs) is None and draw_overlap(runs) is None


def test_one_evaluation_makes_no_curve(tmp_path: Path) -> None:
    write_vl_run(tmp_path / "one")
    write_vl_run(tmp_path / "two", steps=(50, 150))
    assert draw_curves(read(tmp_path / "one").runs) is None
    picture = draw_curves(read(tmp_path / "two").runs)
    assert picture is not None and "A marker is at the last step" in picture.caption


def test_frozen_weights_are_spoken_of(tmp_path: Path) -> None:
    collection = read(write_sweep(tmp_path, seeds=1))
    cost = search_cost(collection, collection.problems[0], "DynMoE", {})
    assert "Frozen weights, of which no gradient" in search_table(collection, cost).note


def measured(folder: Path, run: str, **values: Any) -> dict[str, Any]:
    row = {
        **{"run": run, "problem": "Scenes, llava, last_step", "setting": "x", "batch": 4},
        **{"new_tokens": 8, "prompt_ms": 20.0, "prompt_quartiles_ms": [19.0, 21.0]},
        **{"token_ms": 5.0, "tokens_per_s": 500.0, "tokens_per_s_quartiles": [490.0, 510.0]},
        **{"reference": "dense", "ratio": 0.5, "ratio_quartiles": [0.49, 0.51], "mean_k": {}},
        **{"peak_bytes": 2**30, "rounds": 4, "contaminated": 0},
        **values,
    }
    content = {"command": "dynmoe-bench generate --runs x", "machine": {"cpu": "Example CPU"}}
    content |= {"settings": {}, "workload": {"batch": 4}, "rows": [row]}
    (folder / "generation.json").write_text(json.dumps(content))
    return row


def test_the_speed_of_answers(tmp_path: Path) -> None:
    run = write_vl_run(tmp_path)
    collection = read(tmp_path)
    assert generation_table(collection, collection.problems[0]) is None
    measured(tmp_path, run.path.name, contaminated=3)
    table = generation_table(collection, collection.problems[0])
    assert table is not None and table.columns[3:5] == ("tokens/s", "over dense")
    assert table.rows == (
        ("DynMoE", "20 [19, 21]", "5", "500 [490, 510]*", "0.5 [0.49, 0.51] x", "1"),
    )
    assert "Measured on: cpu Example CPU, batch 4." in table.note and "*: other" in table.note
    text = to_text(page.build(collection))
    assert "How fast every setting answers on Scenes" in text
    assert "\ndynmoe-bench generate --runs x\n" in text


def test_a_damaged_file_of_speeds_is_named(tmp_path: Path) -> None:
    write_vl_run(tmp_path)
    collection = read(tmp_path)
    (tmp_path / "generation.json").write_text("{}")
    with pytest.raises(RecordError, match=r"generation\.json: expected what `dynmoe-bench gen"):
        page.build(collection)


def test_the_page(tmp_path: Path) -> None:
    document = page.build(read(write_sweep(tmp_path, seeds=2)))
    sections = {section.name: section for section in document.sections}
    assert list(sections) == [
        *("claim", "images", "kinds", "cost", "accuracy-by-cost", "experts", "load"),
        *("made", "every-run"),
    ]
    assert names(sections["images"]) == ["images"] and names(sections["kinds"]) == ["kinds"]
    assert names(sections["experts"]) == ["parts"]
    (runs,) = (b.table for b in sections["every-run"].blocks if isinstance(b, Sheet))
    assert runs.columns[-2:] == ("last step", "accuracy, %")
    assert runs.rows[0] == ("dense", "test", "0", "0", "150", "50.00")
    text = to_text(document)
    assert "| stage | moe |" in text
    assert "| started from | vl_instruct/scenes_dense, of the same seed |" in text
    assert "one forward pass of a conversation about one image of the training set's" in text
    assert "Mean over repetitions of the last step" in text
    for word in ("patience", "validation", "evaluation set dev", "environment,", "class token"):
        assert word not in text


def names(section: Section) -> list[str]:
    return [block.name for block in section.blocks if isinstance(block, Sheet)]


def test_two_runs_side_by_side_with_their_kinds(tmp_path: Path) -> None:
    write_vl_run(tmp_path, "dense", {"test": 0.5, "shuffled": 0.5})
    write_vl_run(tmp_path, "DynMoE", {"test": 0.6, "shuffled": 0.4})
    table = compare(*read(tmp_path).runs).tables[1]
    assert table.rows == (
        ("test", "accuracy", "50.0", "60.0", "+10.0"),
        ("test", "colour", "60.0", "70.0", "+10.0"),
        ("test", "yes no", "40.0", "50.0", "+10.0"),
        ("shuffled", "accuracy", "50.0", "40.0", "−10.0"),
        ("shuffled", "colour", "60.0", "50.0", "−10.0"),
        ("shuffled", "yes no", "40.0", "30.0", "−10.0"),
    )
