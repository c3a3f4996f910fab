"""The turns of a conversation as files have them: LLaVA's, and OpenAI's messages."""

from __future__ import annotations

from collections import Counter
from typing import Any

from dynmoe.data.vl.conversations import IMAGE_PLACEHOLDER, Message, Role, unread_pictures
from dynmoe.errors import DataError
from dynmoe.questions.files import check_inside
from dynmoe.questions.values import is_text, shown

TEMPLATE_NAMES = ("plain", "simple", "v1", "phi", "qwen", "stablelm", "tokenizer")
"""Names of the templates that write conversations (data/vl/chat.py)."""

SPEAKERS: dict[str, Role] = {
    **{"human": "user", "user": "user"},
    **{"gpt": "assistant", "assistant": "assistant"},
}
SILENT = "system"  # a template has its own system text
TURNS = ("conversations", "messages")
FORMS = {"from": "value", "role": "content"}
"""The key of a turn's speaker, and of what it says: LLaVA's and OpenAI's."""


def read_turns(
    entry: dict[str, Any], where: str, left_out: Counter[str]
) -> tuple[list[Message], tuple[str, ...]]:
    """The turns of an entry, and the images that stand in them; `left_out` counts system turns.

    Raises:
        DataError: no turns, or one of another form.
    """
    named = [key for key in TURNS if entry.get(key) is not None]
    turns = entry[named[0]] if len(named) == 1 else None
    if not isinstance(turns, list):
        keys = ", ".join(map(str, entry))
        raise DataError(
            f"{where}: expected a list conversations, or a list messages, found the keys {keys}."
        )
    messages: list[Message] = []
    images: list[str] = []
    for place, turn in enumerate(turns):
        here = f"{where}, turn {place}"
        form = next((key for key in FORMS if isinstance(turn, dict) and key in turn), "from")
        speaker = turn.get(form) if isinstance(turn, dict) else None
        text = turn.get(FORMS[form]) if isinstance(turn, dict) else None
        if form == "role" and isinstance(text, list):
            text, shown_here = _parts(text, here)
            images += shown_here
        known = isinstance(speaker, str) and (speaker in SPEAKERS or speaker == SILENT)
        if not known or not is_text(text):
            raise DataError(
                f'{here}: expected "{form}" ({", ".join([*SPEAKERS, SILENT])}) and a text '
                f'"{FORMS[form]}", found {shown(turn)}.'
            )
        if pictures := unread_pictures(turn):
            raise DataError(
                f"{here}: the key {pictures[0]!r} is not read. Name the images of an entry in its "
                "image, in the order of their <image>."
            )
        if speaker == SILENT:
            left_out["system turns: a template has its own"] += 1
        else:
            messages.append(Message(SPEAKERS[str(speaker)], str(text)))
    return messages, tuple(images)


def _parts(parts: list[Any], where: str) -> tuple[str, list[str]]:
    """The text of OpenAI's list of texts and images, and the paths of its images."""
    text, images = "", []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and is_text(part.get("text")):
            text += part["text"]
            continue
        path = part.get(kind) if kind in ("image", "image_url") else None
        if kind == "image_url" and isinstance(path, dict):
            path = path.get("url")
        if kind in ("image", "image_url"):
            text += f"{IMAGE_PLACEHOLDER}\n"
        if kind == "image" and len(part) == 1:
            continue  # its path stands beside the turns
        if not is_text(path) or not path or ":" in path.split("/")[0]:
            raise DataError(
                f"{where}: expected texts, and images with a path, found {shown(part)}. Save "
                "images as files."
            )
        check_inside([path], where)
        images.append(path)
    return text, images
