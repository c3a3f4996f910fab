"""The picture of answered questions: what is written, which colours, how an image is shown."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from vl_runs import example, picture

from dynmoe.report.drawing import COLOURS
from dynmoe.report.example_figures import MOST_EXAMPLES, MOST_LINES, draw_examples, is_right

FIRST, LAST = "blocks.2.mlp", "blocks.4.mlp"


def drawn(*examples: dict[str, Any], fit: str = "pad", **slots: list[int]) -> Figure:
    figure = draw_examples(examples, slots, fit)
    assert figure is not None
    return figure


def texts(figure: Figure, panel: int = 0) -> list[str]:
    """Those of a panel; the first one is that of the words."""
    return [text.get_text() for text in figure.axes[panel].texts]


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("Red.", "red", True),
        (" red ", "Red", True),
        ("green", "red", False),
        ("red", None, None),
    ],
)
def test_right_and_wrong(answer: str, right: str | None, expected: bool | None) -> None:
    assert is_right(example(answer=answer, right=right)) is expected


def test_question_answer_and_words_with_the_experts_of_both_layers() -> None:
    assert texts(drawn(example())) == [
        *("what colour is it ?", "✓ red", FIRST, LAST),
        *("·", "0", "1", "(image)"),
        *("what", "0", "–", "colour", "0", "0", "red", "0,1", "0"),
    ]
    wrong = texts(drawn(example(answer="green")))
    assert wrong[1] == "✗ green   (right: red)".replace("   ", " ")
    assert texts(drawn(example(right=None)))[1] == "red"


def test_the_answer_is_bold_and_nothing_else() -> None:
    words = drawn(example()).axes[0].texts[2:]
    assert [text.get_text() for text in words if text.get_weight() == "bold"] == ["red"]


def test_experts_are_called_by_their_slots() -> None:
    assert texts(drawn(example(), **{FIRST: [2, 5]}))[4:7] == ["·", "2", "1"]


def test_patches_stand_where_they_are_with_their_experts() -> None:
    figure = drawn(example())
    plain, first, last = figure.axes[1:]
    assert (first.get_title(), last.get_title()) == (FIRST, LAST)
    assert not plain.texts
    assert [(t.get_position(), t.get_text()) for t in first.texts] == [
        *(((0, 0), "0,1"), ((1, 0), "0,1")),
        *(((0, 1), "0,1"), ((1, 1), "1")),
    ]
    grey, shades = first.get_images()
    assert grey.get_extent() == shades.get_extent() == [-0.5, 1.5, 1.5, -0.5]
    values = shades.get_array()
    assert (values[0, 0] == values[0, 1]).all() and (values[0, 0] != values[1, 1]).any()


def test_the_legend_names_the_sets_that_were_used() -> None:
    assert labels(drawn(example())) == ["0", "1", "0,1"]


def test_only_the_most_frequent_sets_have_their_own_colours() -> None:
    many = [f"{number:04b}" for number in range(1, 13)]  # 12 sets, for one word each
    rare = example(
        tokens=[None] * 4 + ["word"] * 12,
        answer_from=15,
        experts={FIRST: ["1000"] * 4 + many},
    )
    names = labels(drawn(rare))
    assert len(names) == len(COLOURS) + 1
    assert "0" in names and names[-1] == "others"


def test_all_words_count_as_much_as_all_patches() -> None:
    patches = [f"{1 << place:09b}" for place in range(9)]  # nine sets, each a ninth of an image
    common = example(
        tokens=[None] * 9 + ["word"] * 2,
        image_tokens=9,
        answer_from=10,
        experts={FIRST: [*patches, "110000000", "101000000"]},
    )
    names = labels(drawn(common))
    assert {"0,1", "0,2"} < set(names) and names[-1] == "others"


def test_a_question_without_an_image_has_words_alone() -> None:
    alone = example(
        image=None,
        tokens=["what", "red"],
        answer_from=1,
        experts={FIRST: ["10", "01"], LAST: ["10", "01"]},
    )
    figure = drawn(alone)
    assert len(figure.axes) == 1
    assert texts(figure)[4:] == ["what", "0", "0", "red", "1", "1"]


def test_only_the_end_of_a_long_prompt_is_shown() -> None:
    words = [f"word{number}" for number in range(200)]
    figure = drawn(
        example(
            image=None,
            tokens=words,
            answer_from=199,
            experts={FIRST: ["1"] * 200, LAST: ["1"] * 200},
        )
    )
    found = texts(figure)
    assert found.count(FIRST) == MOST_LINES
    assert found[-3] == "word199" and "word0" not in found


def test_tokens_of_all_kinds_can_be_read() -> None:
    odd = example(
        image=None,
        tokens=[" the", "\n", "incomprehensibilities"],
        answer_from=2,
        experts={FIRST: ["1"] * 3},
    )
    found = texts(drawn(odd))
    assert [found[place] for place in (3, 5, 7)] == ["the", "↵", "incomprehensi…"]


@pytest.mark.parametrize(
    ("fit", "size"), [("pad", (40, 40)), ("stretch", (40, 40)), ("crop", (20, 20))]
)
def test_an_image_is_shown_as_the_model_sees_it(fit: str, size: tuple[int, int]) -> None:
    shown = drawn(example(image=picture(40, 20)), fit=fit).axes[1].get_images()[0].get_array()
    assert shown.shape[:2] == size
    corner = np.asarray(shown[0, 0]).tolist()
    assert corner == ([128, 128, 128] if fit == "pad" else [255, 0, 0])


def test_a_fine_grid_has_colours_alone() -> None:
    fine = example(
        tokens=[None] * 81 + ["a"],
        image_tokens=81,
        answer_from=81,
        experts={FIRST: ["1"] * 82},
    )
    assert texts(drawn(fine), panel=2) == []


def test_a_few_examples_of_a_model_with_experts() -> None:
    assert draw_examples([example(experts={})], {}) is None
    assert draw_examples([], {}) is None
    figure = drawn(*[example()] * (MOST_EXAMPLES + 2))
    assert len(figure.axes) == 4 * MOST_EXAMPLES
