"""Data without conversations: everything but training works."""

from __future__ import annotations

import pytest
from PIL import Image
from rich.console import Console

from dynmoe.data.vision_language import VisionLanguageData
from dynmoe.data.vl_content import Content, questions_only
from dynmoe.errors import DataError
from dynmoe.questions.base import Question
from dynmoe.questions.exact import ExactMatch

IMAGE_TOKENS = 4
TEXTS = ("is it red", "is it")


def data(content: Content) -> VisionLanguageData:
    return VisionLanguageData(
        "Questions",
        lambda: content,
        image_size=8,
        patch_size=4,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        template="simple",
        question_template="simple",
        batch_size=4,
        epochs=1,
        seed=0,
        max_new_tokens=3,
    )


@pytest.fixture
def questions() -> VisionLanguageData:
    asked = [Question(str(i), text, ("key",)) for i, text in enumerate(TEXTS)]
    image = Image.new("RGB", (8, 8))
    sets = {"test": ExactMatch("test", asked, ["yes", "no"], lambda key: image)}
    made = data(Content(None, sets, words=lambda: TEXTS))
    made.setup()
    return made


def test_what_is_known_without_conversations(questions: VisionLanguageData) -> None:
    # [BOS], the image, the words, [ANSWER]
    lengths = [1 + IMAGE_TOKENS + len(text.split()) + 1 for text in TEXTS]
    assert questions.mean_tokens == sum(lengths) / 2
    assert questions.sizes == {"train": 0, "env0": {"in": 2}}
    tokens, answer = questions.sample
    assert tokens["input_ids"].shape == (1, round(sum(lengths) / 2))
    assert answer.shape == (3,)
    assert len(questions.data_hash) == 8
    console = Console(record=True, width=100)
    questions.print_check(console)
    assert "test" in (text := console.export_text()) and "train" not in text
    assert len(list(questions.val_dataloader())) == 1


def test_nothing_can_be_trained(questions: VisionLanguageData) -> None:
    message = (
        r"^data Questions: has no conversations to train on, only questions\. Choose other data"
    )
    with pytest.raises(DataError, match=message):
        questions.train_dataloader()
    with pytest.raises(DataError, match=message):
        _ = questions.steps


def test_questions_have_to_be_named() -> None:
    with pytest.raises(DataError, match=r"^data Questions: no questions to evaluate on"):
        data(Content(None, words=lambda: TEXTS)).setup()
    assert questions_only() == Content(None)
