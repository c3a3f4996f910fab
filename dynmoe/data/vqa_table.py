"""Questions about images, or without, from a table: JSON, JSON lines or CSV.

Columns: `question`; `answer`, or a list `answers` of several people, of which the most frequent
counts (the first of equally frequent ones); optional `image` (a path below the image folder, or a
list of them), `id` and `kind`. In CSV, `answers` is a JSON list, and an `image` one path.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dynmoe.data.conversations import Conversation, check_conversation, questions_answered
from dynmoe.data.image_files import ImageFolder, image_keys
from dynmoe.data.json_entries import file_digest, json_entries
from dynmoe.errors import DataError
from dynmoe.questions.base import Question
from dynmoe.questions.exact import ExactMatch

if TYPE_CHECKING:
    import PIL.Image


class Row(NamedTuple):
    """A line of the table."""

    id: str
    question: str
    answer: str
    images: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class VqaTable:
    """A `ConversationSource`: one question a conversation, `suffix` behind it; read as a stream."""

    name: str
    digest: str
    file: Path
    folder: ImageFolder
    suffix: str

    def __iter__(self) -> Iterator[Conversation]:
        for row in read_rows(self.file):
            turn = (row.question + self.suffix, row.answer)
            made = questions_answered(row.id, [turn], row.images)
            yield check_conversation(made, str(self.file))

    def load_image(self, key: str) -> PIL.Image.Image:
        return self.folder.load(key)


def vqa_table(name: str, file: str, images: str | None = None, suffix: str = "") -> VqaTable:
    """Training conversations; raises DataError: a broken row, or images that are not there."""
    path, folder = Path(file), _checked(file, images)
    digest = sha256(f"{file_digest(path)} {suffix}".encode()).hexdigest()[:16]
    return VqaTable(name, digest, path, folder, suffix)


def vqa_questions(name: str, file: str, images: str | None = None, suffix: str = "") -> ExactMatch:
    """The same table to be answered; raises DataError as `vqa_table` does."""
    folder, rows = _checked(file, images), list(read_rows(Path(file)))
    return ExactMatch(
        name,
        [Question(row.id, row.question + suffix, row.images, row.kind) for row in rows],
        [row.answer for row in rows],
        folder.load,
    )


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of a table. Raises DataError: names the first that is broken, and how."""
    entries = _csv_entries(file) if file.suffix == ".csv" else json_entries(file)
    for index, entry in enumerate(entries):
        where = f"{file}, row {index}"
        question = entry.get("question")
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{where}: expected a question, found {_seen(entry)}.")
        yield Row(
            id=str(entry.get("id") or index),
            question=question,
            answer=_answer(entry, where),
            images=image_keys(entry, where),
            kind=str(entry.get("kind") or ""),
        )


def _checked(file: str, images: str | None) -> ImageFolder:
    folder = ImageFolder(None if images is None else Path(images))
    folder.check((key for row in read_rows(Path(file)) for key in row.images), file)
    return folder


def _csv_entries(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            for entry in csv.DictReader(lines):
                if entry.get("answers"):
                    entry["answers"] = json.loads(entry["answers"])
                yield entry
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise DataError(
            f"{file}: {error}. Expected UTF-8 CSV whose answers are JSON lists."
        ) from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}.") from None


def _answer(entry: Mapping[str, Any], where: str) -> str:
    answers = entry.get("answers") or [entry.get("answer", "")]
    texts = [str(each).strip() for each in answers] if isinstance(answers, list) else []
    if not texts or not all(texts):
        raise DataError(f"{where}: expected an answer, or a list answers, found {_seen(entry)}.")
    return Counter(texts).most_common(1)[0][0]


def _seen(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in entry.items()) or "nothing"
