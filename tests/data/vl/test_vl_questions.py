"""Prompts are kept short and given whole; training data are read when they are asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from chat_tokenizers import encode_prompt, whole_words
from PIL import Image

from dynmoe.data.vl.batches import AskedQuestions
from dynmoe.data.vl.chat import IMAGE
from dynmoe.data.vl.content import llava, vqa
from dynmoe.errors import DataError
from dynmoe.questions.base import Question
from dynmoe.questions.exact import ExactMatch

TOKENIZER = whole_words("what is it red left")
PATCHES = 5
SET = ExactMatch(
    "quiz",
    [
        Question("0", "what is", ("light",)),
        Question("1", "it", ()),
        Question("2", "what <image> is <image>", ("dark", "light")),
    ],
    ["red", "left", "red"],
    lambda key: Image.new("RGB", (2, 2)),
)


def asked() -> AskedQuestions:
    made = AskedQuestions(PATCHES)
    made.add({"quiz": SET}, TOKENIZER, "simple")
    return made


def test_prompts_have_all_places_of_their_images() -> None:
    prompts = asked().prompts["quiz"]
    assert len(prompts) == 3
    for question, ids in zip(SET.questions, prompts, strict=True):
        images = len(question.images)
        whole = encode_prompt(question.text, images, TOKENIZER, "simple", PATCHES)
        assert ids.dtype == np.int32 and ids.tolist() == whole.tolist()
        assert (ids == IMAGE).sum() == images * PATCHES
    # [BOS], the words, [ANSWER], and the images
    assert asked().lengths["quiz"].tolist() == [4 + 5, 3, 4 + 10] == [*map(len, prompts)]
    assert asked().mean_tokens == 26 / 3


def test_answers_are_taken_by_row(tmp_path: Path) -> None:
    answers = {2: "left", 0: "red", 1: "left"}
    assert asked().score("quiz", answers)["score"] == 2 / 3
    (file,) = asked().write("quiz", tmp_path, answers)
    assert ['"text": "left"' in line for line in file.read_text().splitlines()] == [
        False,
        True,
        True,
    ]


def test_conversations_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    content = llava("align", str(tmp_path), {"align": ["captions.json"]})
    assert content.train is not None
    with pytest.raises(DataError, match=f"no file {tmp_path / 'captions.json'}"):
        content.train()
    (tmp_path / "test.jsonl").write_text('{"question": "is it red", "answer": "yes"}')
    content = vqa(str(tmp_path), "train.jsonl", "test.jsonl", ".", "")
    assert content.sets["test"].questions[0].text == "is it red"
    assert content.train is not None and content.baseline is not None
    for read in (content.train, content.baseline):
        with pytest.raises(DataError, match=r"train\.jsonl"):
            read()
