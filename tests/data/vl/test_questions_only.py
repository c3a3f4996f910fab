"""Data without conversations: everything but training works."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chat_tokenizers import whole_words
from PIL import Image
from rich.console import Console

from dynmoe.data.base import StepPlan
from dynmoe.data.vl.content import Content, questions_only
from dynmoe.data.vl.module import VisionLanguageData
from dynmoe.data.vl.scenes import scene_questions
from dynmoe.errors import DataError
from dynmoe.questions.base import Question
from dynmoe.questions.exact import ExactMatch

IMAGE_TOKENS = 4
TEXTS = ("is it red", "is it")
SETS = {
    "test": ExactMatch(
        "test",
        [Question(str(i), text, ("key",)) for i, text in enumerate(TEXTS)],
        ["yes", "no"],
        lambda key: Image.new("RGB", (8, 8)),
    )
}


def data(content: Content, template: str = "simple", **settings: Any) -> VisionLanguageData:
    made = VisionLanguageData(
        name="Questions",
        content=lambda: content,
        image_size=8,
        patch_size=4,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        template="simple",
        question_template=template,
        batch_size=4,
        **{"max_new_tokens": 3, **settings},
    )
    made.connect(StepPlan(seed=0, epochs=1))
    return made


@pytest.fixture
def questions() -> VisionLanguageData:
    made = data(Content(None, SETS, words=lambda: TEXTS))
    made.setup()
    return made


def test_what_is_known_without_conversations(questions: VisionLanguageData) -> None:
    # [BOS], the image, the words, [ANSWER]
    lengths = [1 + IMAGE_TOKENS + len(text.split()) + 1 for text in TEXTS]
    assert questions.mean_tokens == sum(lengths) / 2
    assert questions.sizes == {"train": 0, next(iter(SETS)): 2}
    tokens, answer = questions.sample
    assert tokens["input_ids"].shape == (1, round(sum(lengths) / 2))
    assert answer.shape == (3,)
    assert len(questions.data_hash) == 8
    console = Console(record=True, width=100)
    questions.print_check(console)
    assert "test" in (text := console.export_text()) and "train" not in text
    assert len(list(questions.val_dataloader())) == 1


def test_each_set_has_its_length_of_answers() -> None:
    scenes = scene_questions(0, 2, 24)
    derived = {"shuffled": scenes.with_other_images(), "one": scenes.spread(1)}
    sets = {**SETS, "scenes": scenes, **derived}
    made = data(Content(None, sets, words=lambda: TEXTS), max_new_tokens=None)
    made.setup()
    expected = {"test": 128, "scenes": 6, "shuffled": 6, "one": 6}
    assert made.answer_tokens == made.task_arguments["max_new_tokens"] == expected
    made.max_new_tokens = 3
    assert made.answer_tokens == dict.fromkeys(expected, 3)


def test_an_evaluation_reads_no_conversations() -> None:
    def read() -> Any:
        raise DataError("read")

    made = data(Content(read, SETS, words=lambda: TEXTS, baseline=read))
    made.setup("validate")
    assert made.env_names == ["test"] and len(list(made.val_dataloader())) == 1
    with pytest.raises(DataError, match=r"^read$"):
        made.setup()


def test_every_device_needs_a_question(questions: VisionLanguageData) -> None:
    def loader(devices: int) -> Any:
        root_device = torch.device("cpu")
        questions.trainer = SimpleNamespace(  # type: ignore[assignment]
            world_size=devices, global_rank=0, strategy=SimpleNamespace(root_device=root_device)
        )
        return questions.val_dataloader()

    assert len(loader(2)) == 1
    with pytest.raises(DataError) as error:
        loader(3)
    assert str(error.value) == (
        "test: expected a question for each of the 3 devices or more, found 2. Evaluate on fewer "
        "devices (trainer.devices=2), or leave the set out."
    )


def test_nothing_can_be_trained(questions: VisionLanguageData) -> None:
    message = (
        r"^data Questions: has no conversations to train on, only questions\. Choose other data"
    )
    with pytest.raises(DataError, match=message):
        questions.train_dataloader()
    with pytest.raises(DataError, match=message):
        _ = questions.steps


def test_questions_have_to_be_named() -> None:
    message = r"^data Questions: no questions to evaluate on, which stage align needs too"
    with pytest.raises(DataError, match=message):
        data(Content(None, words=lambda: TEXTS)).setup()
    assert questions_only() == Content(None)


def test_answers_end_where_the_template_ends_them(tmp_path: Path) -> None:
    """And not at the tokenizer's own end token, which is another one here."""
    tokenizer = whole_words(*TEXTS, ends=("<|endoftext|>",))
    tokenizer.save_pretrained(tmp_path)
    made = data(Content(None, SETS), "qwen", tokenizer_path=str(tmp_path))
    made.setup()
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert made.backbone_arguments["eos_token_id"] == end != tokenizer.eos_token_id
