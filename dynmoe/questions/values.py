"""Values in the files of others: which are text, and which keys look like a known one."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeGuard

from dynmoe.errors import DataError

Kind = Literal["text", "text or null", "id", "whole number", "list", "list of texts", "object"]

ALIKE = 0.85
"""Share of equal characters from which on a key looks like another one; question_type is not
question, nor image_size images."""
LONGEST = 200  # characters of a value in a message
PICTURES = ("image", "img", "picture", "photo")
SHOWN = re.compile(
    r"""^data:image/ | \.(jpe?g|jfif|png|gif|bmp|webp|tiff?|p[bgp]m|avif|heic)(\?\S*)?['"\]\s]*$""",
    re.IGNORECASE | re.VERBOSE,
)
ENCODED = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk0")
"""First characters of JPEG, PNG, GIF, WebP and BMP files in base64."""


def is_text(value: Any) -> TypeGuard[str]:
    """Whether it is text that can be written as UTF-8: JSON may hold halves of surrogate pairs."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def plain_text(value: Any) -> str | None:
    """A text, number or boolean as text; None for all else: null, NaN, lists, objects."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, bool | int | float) or is_text(value):
        return str(value)
    return None


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON parser's pairs; `json` keeps the last of equal keys without a word.

    Raises:
        DataError: a key stands there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        refuse_repeated([key for key, count in Counter(k for k, _ in pairs).items() if count > 1])
    return found


class NotingKeys(dict[str, Any]):
    """The object of a parser that sets key after key; `repeated` takes those that were there."""

    def __init__(self, repeated: list[str]) -> None:
        super().__init__()
        self._repeated = repeated

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self:
            self._repeated.append(key)
        super().__setitem__(key, value)


def refuse_repeated(keys: Sequence[str]) -> None:
    """Raises DataError if there are any."""
    if keys:
        raise DataError(f"an object has the key {keys[0]!r} twice. Keep one of them.")


def shown(value: Any) -> str:
    """A value for a message, long ones cut."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _is_id(value: Any) -> bool:
    return is_text(value) or isinstance(value, int)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


KINDS: dict[Kind, Callable[[Any], bool]] = {
    "text": is_text,
    "text or null": lambda value: value is None or is_text(value),
    "id": _is_id,
    "whole number": _is_number,
    "list": lambda value: isinstance(value, list),
    "list of texts": lambda value: isinstance(value, list) and all(map(is_text, value)),
    "object": lambda value: isinstance(value, dict),
}


Fields = Mapping[str, Kind] | Collection[str]
"""The fields that every object of a file has, and of what kind their values are, if not any."""


def wrong_fields(row: Mapping[str, Any], fields: Fields) -> list[str]:
    """Return what is wrong with an object: "has no image", "has label=[], which is no text"."""
    kinds: Mapping[str, Kind] = fields if isinstance(fields, Mapping) else {}
    lacking = [field for field in fields if field not in row]
    wrong = [
        f"has {field}={shown(row[field])}, which is no {kind}"
        for field, kind in kinds.items()
        if field in row and not KINDS[kind](row[field])
    ]
    return [*([f"has no {', '.join(lacking)}"] if lacking else []), *wrong]


def other_spellings(keys: Iterable[Any], known: Sequence[str]) -> dict[str, str]:
    """The keys that are not known and look like a known one, with that one."""
    found = {key: _near(key, tuple(known)) for key in keys if isinstance(key, str)}
    return {key: name for key, name in found.items() if name is not None}


def picture_keys(entry: Mapping[Any, Any]) -> list[str]:
    """The keys that name pictures in any way, and have one: image_path, img, photos, imgae.

    Keys about a picture, such as image_id or photo_credit, are none of them.
    """
    named = [key for key in entry if isinstance(key, str) and _names_pictures(key)]
    return [key for key in named if is_picture(entry[key])]


def is_picture(value: Any) -> bool:
    """Whether it is the path, address or content of an image file, or a list or object with one."""
    if isinstance(value, str):
        return SHOWN.search(value) is not None or (
            len(value) > LONGEST and value.startswith(ENCODED)
        )
    if isinstance(value, dict):
        return any(map(is_picture, value.values()))
    return isinstance(value, list) and any(map(is_picture, value))


# The same few keys stand in each of a million turns.


@lru_cache(maxsize=1024)
def _near(key: str, known: tuple[str, ...]) -> str | None:
    bare = {_bare(name): name for name in known}
    if key in known:
        return None
    near = difflib.get_close_matches(_bare(key), bare, n=1, cutoff=ALIKE)
    return bare[near[0]] if near else None


@lru_cache(maxsize=1024)
def _names_pictures(key: str) -> bool:
    bare = _bare(key)
    return any(word in bare for word in PICTURES) or sorted(bare) == sorted("image")


def _bare(key: str) -> str:
    return "".join(key.split()).replace("_", "").replace("-", "").casefold()
