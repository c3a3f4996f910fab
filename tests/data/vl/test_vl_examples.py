"""Proves what a batch of conversations, and one of questions, holds at each position."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from functools import partial

import PIL.Image
import pytest
import torch
from chat_tokenizers import encode_prompt, whole_words
from torch.utils.data import DataLoader

from dynmoe.data.text.batches import Key
from dynmoe.data.vl.batches import (
    Conversations,
    ImageTransform,
    Questions,
    collate_conversations,
    collate_questions,
)
from dynmoe.data.vl.conversations import Conversation, Message
from dynmoe.data.vl.store import tokenized
from dynmoe.questions.base import Question
from dynmoe.questions.exact import ExactMatch

TOKENIZER = whole_words("what is it red left")
PAD, BOS, EOS, ANSWER = 0, 2, 3, 4
WHAT, IS, IT, RED, LEFT = TOKENIZER.convert_tokens_to_ids(["what", "is", "it", "red", "left"])
TRANSFORM = ImageTransform(4, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
GREY = {"dark": 51, "light": 204}


def load_image(key: str) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (8, 8), (GREY[key],) * 3)


class Source:
    name = "toys"
    digest = "0" * 16
    load_image = staticmethod(load_image)

    def __iter__(self) -> Iterator[Conversation]:
        for asked, said, images in (
            ("<image> what", "red", ("dark",)),
            ("is it", "left left left", ()),
            ("<image> what <image>", "red", ("light", "dark")),
        ):
            yield Conversation("", (Message("user", asked), Message("assistant", said)), images)


QUESTIONS = ExactMatch(
    "quiz",
    [
        Question("0", "what is", ("light",), "shape"),
        Question("1", "it", (), "color"),
        Question("2", "what", ("dark",), "shape"),
    ],
    ["red", "left", "red"],
    load_image,
)


def conversations() -> Conversations:
    store = tokenized(Source(), TOKENIZER, "simple", 2, 100, None)
    return Conversations({"train": store}, {"train": load_image}, TRANSFORM)


def questions() -> Questions:
    prompts = [
        encode_prompt(each.text, len(each.images), TOKENIZER, "simple", 2)
        for each in QUESTIONS.questions
    ]
    return Questions({"quiz": QUESTIONS}, {"quiz": prompts}, TRANSFORM)


def test_conversations_are_padded_at_the_right() -> None:
    fetched = conversations().__getitems__([Key("train", 1, 1.5), Key("train", 2, 1.5)])
    batch = collate_conversations(PAD, fetched)
    assert batch.tokens["input_ids"].tolist() == [
        [BOS, IS, IT, ANSWER, LEFT, LEFT, LEFT, EOS, PAD],
        [BOS, PAD, PAD, WHAT, PAD, PAD, ANSWER, RED, EOS],
    ]
    assert batch.tokens["attention_mask"].tolist() == [[1] * 8 + [0], [1] * 9]
    assert batch.tokens["image_mask"].tolist() == [
        [False] * 9,
        [False, True, True, False, True, True, False, False, False],
    ]
    assert batch.label.tolist() == [
        [-100, -100, -100, -100, LEFT, LEFT, LEFT, EOS, -100],
        [-100] * 7 + [RED, EOS],
    ]
    assert batch.tokens["images"].shape == (2, 3, 4, 4)
    torch.testing.assert_close(batch.tokens["images"].mean((1, 2, 3)), torch.tensor([0.8, 0.2]))
    assert (batch.source, batch.row.tolist(), batch.weight) == ("train", [1, 2], 1.5)
    tokens, scored_M = batch.inputs
    assert tokens is batch.tokens and scored_M.tolist() == [3, 4, 5, 6, 15, 16]
    ids, label, row = batch.tokens["input_ids"], batch.label, batch.row
    assert ids.dtype == label.dtype == row.dtype == torch.int64
    assert batch.tokens["attention_mask"].dtype == torch.int64


def test_questions_are_padded_at_the_left() -> None:
    fetched = questions().__getitems__([Key("quiz", 1), Key("quiz", 0)])
    batch = collate_questions(PAD, fetched)
    assert batch.tokens["input_ids"].tolist() == [
        [PAD, PAD, PAD, BOS, IT, ANSWER],
        [BOS, PAD, PAD, WHAT, IS, ANSWER],
    ]
    assert batch.tokens["attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1], [1] * 6]
    assert batch.tokens["image_mask"].tolist() == [
        [False] * 6,
        [False, True, True, False, False, False],
    ]
    torch.testing.assert_close(batch.tokens["images"].mean((1, 2, 3)), torch.tensor([0.8]))
    assert batch.label.tolist() == [0, 1]  # color, shape
    assert batch.label.dtype == torch.int64
    assert (batch.source, batch.row.tolist()) == ("quiz", [1, 0])
    assert batch.inputs == (batch.tokens,)


def test_a_batch_without_images_has_none_of_their_size() -> None:
    batch = collate_conversations(PAD, conversations().__getitems__([Key("train", 1)]))
    assert batch.tokens["images"].shape == (0, 3, 4, 4)
    assert batch.tokens["images"].dtype == torch.float32
    asked = collate_questions(PAD, questions().__getitems__([Key("quiz", 1)]))
    assert asked.tokens["images"].shape == (0, 3, 4, 4)


def test_images_come_in_the_order_of_their_positions() -> None:
    keys = [Key("train", 2), Key("train", 1), Key("train", 0)]
    batch = collate_conversations(PAD, conversations().__getitems__(keys))
    means = batch.tokens["images"].mean((1, 2, 3))
    torch.testing.assert_close(means, torch.tensor([0.8, 0.2, 0.2]))
    assert batch.tokens["image_mask"].sum(1).tolist() == [4, 0, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_takes_them(workers: int) -> None:
    keys = [[Key("train", 0), Key("train", 1)], [Key("train", 2)]]
    data = pickle.loads(pickle.dumps(conversations()))
    loader = DataLoader(
        data,
        batch_sampler=keys,
        collate_fn=partial(collate_conversations, PAD),
        num_workers=workers,
    )
    assert [batch.row.tolist() for batch in loader] == [[0, 1], [2]]
