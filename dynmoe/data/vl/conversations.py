"""Conversations about images, on which a vision-language model is trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dynmoe.errors import DataError
from dynmoe.questions.files import check_images, check_inside, load_image
from dynmoe.questions.values import is_text, other_spellings, picture_keys, shown

if TYPE_CHECKING:
    import PIL.Image

log = logging.getLogger(__name__)

IMAGE_PLACEHOLDER = "<image>"
"""Marks the place of the conversation's next image in a user's text; plain text in an answer."""

IMAGE_KEYS = ("image", "images")

Role = Literal["user", "assistant"]
SourceKind = Literal["captions", "questions"]
"""Captions align the vision tower with the language model; questions instruct it."""


class Message(NamedTuple):
    """The text of one side; `IMAGE_PLACEHOLDER` in a user's text is the next image."""

    role: Role
    text: str


@dataclass(frozen=True)
class Conversation:
    """Alternating messages of a user, who begins, and an assistant, who ends.

    `images` are keys for the source's `load_image`, in the order of the placeholders.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConversationSource:
    """Conversations as a stream that may be read again; every reader returns one."""

    name: str
    digest: str
    """16 hexadecimal digits that change with the content."""
    read: Callable[[], Iterable[Conversation]]
    """Begins a pass: reads or draws the conversations anew, or iterates over a list."""
    load_image: Callable[[str], PIL.Image.Image]
    """From the key of an image to the image, RGB."""
    image_path: Callable[[str], Path] | None = None
    """From the key of an image to its file, where images are files."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Counts of what the files hold and the conversations do not, by what it is."""
    keys: Sequence[str] | None = None
    """The keys of all images, each once, where they are known without a pass."""

    def __iter__(self) -> Iterator[Conversation]:
        return iter(self.read())

    def only(self, wanted: Callable[[Conversation], bool], name: str) -> ConversationSource:
        """The conversations that are `wanted`, under another name."""
        digest = text_digest(f"{self.digest}\n{name}")
        read = partial(_only, self.read, wanted)
        return replace(self, name=name, read=read, digest=digest, keys=None)

    def without_images(self, keys: Collection[str]) -> ConversationSource:
        """The conversations that need none of these images."""
        bad = frozenset(keys)
        digest = text_digest("\n".join([self.digest, *sorted(bad)]))
        return replace(self, read=partial(_without, self.read, bad), digest=digest, keys=None)


def _only(
    read: Callable[[], Iterable[Conversation]], wanted: Callable[[Conversation], bool]
) -> Iterator[Conversation]:
    return filter(wanted, read())


def _without(
    read: Callable[[], Iterable[Conversation]], bad: frozenset[str]
) -> Iterator[Conversation]:
    return (each for each in read() if bad.isdisjoint(each.images))


def text_digest(content: str) -> str:
    """16 hexadecimal digits of a text."""
    return sha256(content.encode()).hexdigest()[:16]


def questions_answered(
    id: str, turns: Iterable[tuple[str, str]], images: Sequence[str] = ()
) -> Conversation:
    """A conversation of questions with their answers; its images stand before the first one."""
    messages: list[Message] = []
    front = f"{IMAGE_PLACEHOLDER}\n" * len(images)
    for question, answer in turns:
        messages += [Message("user", front + question), Message("assistant", answer)]
        front = ""
    return Conversation(id, tuple(messages), tuple(images))


def check_conversation(conversation: Conversation, where: str) -> Conversation:
    """Return the conversation if it keeps the rules; `where` names its file and place there.

    Raises:
        DataError: messages out of order, or not as many placeholders as images.
    """
    messages, images = conversation.messages, len(conversation.images)
    roles = [message.role for message in messages]
    placeholders = sum(message.text.count(IMAGE_PLACEHOLDER) for message in messages[::2])
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        problem = (
            "expected alternating user and assistant, the assistant last; "
            f"found {', '.join(roles) or 'no messages'}"
        )
    elif placeholders != images:
        problem = (
            f"expected as many {IMAGE_PLACEHOLDER} as images, found {placeholders} and {images}"
        )
    else:
        return conversation
    raise DataError(f"{where}, conversation {conversation.id!r}: {problem}.")


@dataclass(frozen=True)
class ImageFolder:
    """Images whose keys are paths relative to `root`; None where a source has no images."""

    root: Path | None

    def load(self, key: str) -> PIL.Image.Image:
        """The image, RGB.

        Raises:
            DataError: no such file, or not an image.
        """
        return load_image(self.path(key))

    def path(self, key: str) -> Path:
        """The file of an image.

        Raises:
            DataError: there is no folder.
        """
        return self._below(key) / key

    def check(self, keys: Iterable[str], where: str) -> None:
        """Look for the images that the file `where` names, without opening them.

        Raises:
            DataError: shows the first missing images, and says how many they are.
        """
        if key := next(keys := iter(keys), None):
            check_images(where, self._below(key), chain([key], keys))

    def _below(self, key: str) -> Path:
        if self.root is None:
            raise DataError(f"image {key}: no image folder given. Give the one that holds it.")
        return self.root


def image_keys(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The paths of an entry's `image` or `images`, one or a list; () if missing, null, "" or [].

    Raises:
        DataError: it is something else, there are both, or another key names a picture, which would
            not be shown; `where` names the entry.
    """
    given = {key: entry[key] for key in IMAGE_KEYS if entry.get(key) not in (None, "", [])}
    others = [key for key in unread_pictures(entry) if key not in IMAGE_KEYS]
    if len(given) > 1:
        raise DataError(f"{where}: has both {' and '.join(given)}. Keep one of them.")
    if found := [key for key in others if not given or _names(key)]:
        raise DataError(
            f"{where}: the key {found[0]!r} is not read, and looks like one for images. Call it "
            "image, or take it out."
        )
    (key, value) = next(iter(given.items()), ("image", []))
    keys = [value] if isinstance(value, str) else value
    if not isinstance(keys, list) or not all(is_text(each) and each for each in keys):
        raise DataError(
            f"{where}: expected {key} to be a path or a list of them, found {shown(value)}."
        )
    check_inside(keys, where)
    return tuple(keys)


def unread_pictures(entry: Mapping[str, Any]) -> list[str]:
    """The keys that have a picture, and those that spell `image` whatever they have."""
    return [] if _can_have_none(tuple(entry)) else _pictures(entry)


def _pictures(entry: Mapping[str, Any]) -> list[str]:
    spelled = [key for key in entry if entry[key] and (key in IMAGE_KEYS or _names(key))]
    return [*dict.fromkeys([*spelled, *picture_keys(entry)])]


@lru_cache(maxsize=1024)
def _can_have_none(keys: tuple[str, ...]) -> bool:
    """Whether no value makes one of these keys a picture: of a million turns the same two."""
    return not _pictures(dict.fromkeys(keys, "image.png"))


def _names(key: str) -> bool:
    """Whether a key beside `image` is another spelling of it; image_size is about it."""
    return bool(other_spellings([key], IMAGE_KEYS))


def has_empty_image(entry: Mapping[str, Any]) -> bool:
    """Whether an image of the entry is "", which is read as none."""
    return any(isinstance(each := entry.get(key), str) and not each for key in IMAGE_KEYS)


def warn_of_empty_images(where: str, empty: int, with_images: int) -> None:
    """Warn of `empty` images in a file of which other rows have images."""
    if empty and with_images:
        log.warning(
            "%s: %d rows have an empty image and are read as text alone; %d have images",
            *(where, empty, with_images),
        )
