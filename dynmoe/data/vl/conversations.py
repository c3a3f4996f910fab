"""Conversations about images: what a vision-language model is trained on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from dynmoe.errors import DataError
from dynmoe.questions.files import SHOWN, load_image

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


# Images below a folder: loading one, and finding early which of many are missing.


@dataclass(frozen=True)
class ImageFolder:
    """Images whose keys are paths relative to `root`; None where a source has no images."""

    root: Path | None

    def load(self, key: str) -> PIL.Image.Image:
        """The image, RGB.

        Raises:
            DataError: no such file, or not an image.
        """
        return load_image(self._path(key))

    def check(self, keys: Iterable[str], where: str) -> None:
        """Nothing, if every key of the file `where` is there; each folder is listed once.

        Raises:
            DataError: shows the first missing images, and says how many they are.
        """
        listings: dict[Path, set[str]] = {}
        missing: dict[str, None] = {}  # an ordered set
        for key in keys:
            path = self._path(key)
            if path.parent not in listings:
                listings[path.parent] = _listing(path.parent)
            if path.name not in listings[path.parent]:
                missing[key] = None
        if missing:
            names = ", ".join(list(missing)[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
            number = "1 image is" if len(missing) == 1 else f"{len(missing):,} images are"
            raise DataError(
                f"{where}: {number} not in {self.root}: {names}. "
                "Give the folder from which these paths start, and fetch what it lacks."
            )

    def _path(self, key: str) -> Path:
        if self.root is None:
            raise DataError(f"image {key}: no image folder given. Give the one that holds it.")
        return self.root / key


def _listing(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def image_keys(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """An entry's `image`: a path or a list of paths; (), if it is missing, null or "".

    Raises:
        DataError: it is something else; `where` names the entry.
    """
    image = entry.get("image") or []
    images = [image] if isinstance(image, str) else image
    if not isinstance(images, list) or not all(isinstance(key, str) for key in images):
        raise DataError(f"{where}: expected image to be a path or a list of them, found {image!r}.")
    return tuple(images)
