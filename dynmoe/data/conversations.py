"""Conversations about images: what a vision-language model is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from dynmoe.errors import DataError

if TYPE_CHECKING:
    import PIL.Image

IMAGE_PLACEHOLDER = "<image>"
"""Stands in a user's text for the conversation's next image; in an answer it is mere text."""

Role = Literal["user", "assistant"]


class Message(NamedTuple):
    """What one side says; `IMAGE_PLACEHOLDER` in a user's text is the next image."""

    role: Role
    text: str


@dataclass(frozen=True)
class Conversation:
    """Messages of a user and an assistant in turns: the user begins, the assistant ends.

    `images` are keys for the source's `load_image`, in the order of the placeholders.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[str, ...] = ()


class ConversationSource(Protocol):
    """What every reader returns: conversations as a stream that may be read again.

    `digest`, 16 hexadecimal digits, changes with the content.
    """

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    def __iter__(self) -> Iterator[Conversation]: ...

    def load_image(self, key: str) -> PIL.Image.Image:
        """The image of a key, RGB."""


@dataclass(frozen=True)
class ConversationList:
    """A `ConversationSource` in memory; `load` is its `load_image`."""

    name: str
    digest: str
    conversations: Sequence[Conversation]
    load: Callable[[str], PIL.Image.Image]

    def __iter__(self) -> Iterator[Conversation]:
        return iter(self.conversations)

    def load_image(self, key: str) -> PIL.Image.Image:
        return self.load(key)


def questions_answered(
    id: str, turns: Iterable[tuple[str, str]], images: Sequence[str] = ()
) -> Conversation:
    """A conversation of questions with their answers; all images stand before the first one."""
    messages: list[Message] = []
    front = f"{IMAGE_PLACEHOLDER}\n" * len(images)
    for question, answer in turns:
        messages += [Message("user", front + question), Message("assistant", answer)]
        front = ""
    return Conversation(id, tuple(messages), tuple(images))


def check_conversation(conversation: Conversation, where: str) -> Conversation:
    """The conversation itself, if it keeps the rules; `where` names its file and place there.

    Raises:
        DataError: turns out of order, or not as many placeholders as images.
    """
    problem = _problem(conversation)
    if problem:
        raise DataError(f"{where}, conversation {conversation.id!r}: {problem}.")
    return conversation


def _problem(conversation: Conversation) -> str:
    messages = conversation.messages
    roles = [message.role for message in messages]
    if not roles or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        found = ", ".join(roles) if roles else "no messages"
        return f"expected user and assistant in turns, the assistant last; found {found}"
    placeholders = sum(message.text.count(IMAGE_PLACEHOLDER) for message in messages[::2])
    if placeholders != len(conversation.images):
        return (
            f"expected as many {IMAGE_PLACEHOLDER} as images, "
            f"found {placeholders} and {len(conversation.images)}"
        )
    return ""
