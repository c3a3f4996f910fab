"""Proves which conversations are refused, and how questions with answers become one."""

from __future__ import annotations

import pytest

from dynmoe.data.vl.conversations import (
    Conversation,
    Message,
    check_conversation,
    questions_answered,
)
from dynmoe.errors import DataError


def said(*texts: str, images: tuple[str, ...] = ()) -> Conversation:
    """`texts` begin with u: or a:, for user and assistant."""
    roles = {"u": "user", "a": "assistant"}
    return Conversation("7", tuple(Message(roles[t[0]], t[2:]) for t in texts), images)


@pytest.mark.parametrize(
    "conversation",
    [
        said("u:hello", "a:"),
        said("u:<image> or <image> ?", "a:one", "u:<image>", "a:two", images=("x", "y", "z")),
        said("u:what tag shows an image ?", "a:<image>"),
    ],
)
def test_accepted(conversation: Conversation) -> None:
    assert check_conversation(conversation, "file") is conversation


@pytest.mark.parametrize(
    ("conversation", "problem"),
    [
        (said(), "expected alternating user and assistant, the assistant last; found no messages"),
        (
            said("u:q"),
            "expected alternating user and assistant, the assistant last; found user",
        ),
        (
            said("a:a", "u:q"),
            "expected alternating user and assistant, the assistant last; found assistant, user",
        ),
        (
            said("u:<image>", "a:a", images=("x", "y")),
            "expected as many <image> as images, found 1 and 2",
        ),
        (said("u:<image>", "a:a"), "expected as many <image> as images, found 1 and 0"),
    ],
)
def test_refused(conversation: Conversation, problem: str) -> None:
    with pytest.raises(DataError) as error:
        check_conversation(conversation, "file.json, entry 3")
    assert str(error.value) == f"file.json, entry 3, conversation '7': {problem}."


def test_all_images_stand_before_the_first_question() -> None:
    found = questions_answered("7", [("q", "a"), ("r", "b")], ["x", "y"])
    assert found == said("u:<image>\n<image>\nq", "a:a", "u:r", "a:b", images=("x", "y"))
    assert questions_answered("7", [("q", "a")]) == said("u:q", "a:a")
