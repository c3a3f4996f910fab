r"""LLaVA's conversation files: the public 558k and 665k, MoE-LLaVA's, and those made like them.

An entry is {"id", "image", "conversations": [{"from": "human" or "gpt", "value"}, ...]}; `image` is
a path below the image folder, a list of them, or missing in an entry of text alone. What LLaVA's
llava/train/train.py (preprocess_multimodal, preprocess_v1) makes of an entry is kept:

- What stands before the first human turn is left out, and what is never answered is left out too.
- The only placeholder of a turn moves to its front: "What is it?\n<image>" is trained on as
  "<image>\nWhat is it?". Several in one turn stay where they are.
- Where images have no placeholder at all, they stand before the first turn.
- Inside the turns of a text-only entry "<image>" is mere text: `LITERAL`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynmoe.data.conversations import (
    IMAGE_PLACEHOLDER,
    Conversation,
    Message,
    Role,
    check_conversation,
)
from dynmoe.data.image_files import ImageFolder, image_keys
from dynmoe.data.json_entries import file_digest, json_entries
from dynmoe.errors import DataError

if TYPE_CHECKING:
    import PIL.Image

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
SILENT = "system"  # a template has its own system text
LITERAL = "<image >"


@dataclass(frozen=True)
class LlavaJson:
    """A `ConversationSource` of JSON or JSONL files, read as a stream, and one image folder."""

    name: str
    digest: str
    files: tuple[Path, ...]
    folder: ImageFolder

    def __iter__(self) -> Iterator[Conversation]:
        for file in self.files:
            for index, entry in enumerate(json_entries(file)):
                conversation = read_entry(entry, index, f"{file}, entry {index}")
                if conversation is not None:
                    yield conversation

    def load_image(self, key: str) -> PIL.Image.Image:
        return self.folder.load(key)

    def check(self) -> None:
        """Reads all entries, and looks whether their images are there, without opening them.

        Raises:
            DataError: the first broken entry; or the first missing images, and how many.
        """
        where = " and ".join(map(str, self.files))
        self.folder.check((key for conversation in self for key in conversation.images), where)


def read_llava(name: str, files: Sequence[str], images: str | None = None) -> LlavaJson:
    """Conversations of all `files` in turn; their image paths start from the folder `images`.

    Raises:
        DataError: no such file or folder.
    """
    paths = tuple(map(Path, files))
    problems = [f"no file {path}" for path in paths if not path.is_file()]
    if images is not None and not Path(images).is_dir():
        problems.append(f"no image folder {images}")
    if problems:
        raise DataError(f"data {name}: {', '.join(problems)}.")
    folder = ImageFolder(None if images is None else Path(images))
    return LlavaJson(name, file_digest(*paths), paths, folder)


def read_entry(entry: dict[str, Any], index: int, where: str) -> Conversation | None:
    """The conversation of an entry; None if nothing in it is an answer to a human.

    Raises:
        DataError: not as the head of this file says; names the entry, its id and what is wrong.
    """
    name = str(index if entry.get("id") is None else entry["id"])
    place, where = where, f"{where}, conversation {name!r}"
    if "video" in entry:
        raise DataError(f"{where}: has a video; only images can be shown. Take the entry out.")
    images = image_keys(entry, where)
    messages = list(dropwhile(lambda each: each.role != "user", _messages(entry, where)))
    while messages and messages[-1].role == "user":
        messages.pop()
    if not messages:
        return None
    messages = _placed(messages, len(images), where)
    return check_conversation(Conversation(name, tuple(messages), images), place)


def _messages(entry: dict[str, Any], where: str) -> Iterator[Message]:
    turns = entry.get("conversations")
    if not isinstance(turns, list):
        keys = ", ".join(entry)
        raise DataError(f"{where}: expected a list conversations, found the keys {keys}.")
    for place, turn in enumerate(turns):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if speaker == SILENT:
            continue
        if speaker not in ROLES or not isinstance(turn.get("value"), str):
            raise DataError(
                f'{where}, turn {place}: expected "from" ({", ".join([*ROLES, SILENT])}) and a '
                f'text "value", found {turn!r}.'
            )
        yield Message(ROLES[speaker], turn["value"])


def _placed(messages: list[Message], images: int, where: str) -> list[Message]:
    """With the placeholders where LLaVA has them."""
    first = messages[0].text.strip()
    if not images and (first.startswith(IMAGE_PLACEHOLDER) or first.endswith(IMAGE_PLACEHOLDER)):
        raise DataError(f"{where}: the first turn has {IMAGE_PLACEHOLDER}, but there is no image.")
    if not images:
        return [Message(role, text.replace(IMAGE_PLACEHOLDER, LITERAL)) for role, text in messages]
    if not any(IMAGE_PLACEHOLDER in message.text for message in messages if message.role == "user"):
        front = f"{IMAGE_PLACEHOLDER}\n" * images
        messages = [Message("user", front + messages[0].text), *messages[1:]]
    return [_in_front(message) for message in messages]


def _in_front(message: Message) -> Message:
    if message.role != "user" or message.text.count(IMAGE_PLACEHOLDER) != 1:
        return message
    rest = message.text.replace(IMAGE_PLACEHOLDER, "").strip()
    return Message("user", f"{IMAGE_PLACEHOLDER}\n{rest}")
