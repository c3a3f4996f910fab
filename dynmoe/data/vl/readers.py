"""The objects of a JSON array or of JSON lines, one after the other, in constant memory."""

from __future__ import annotations

import csv
import hashlib
import json
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import dropwhile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

from dynmoe.data.vl.conversations import (
    IMAGE_PLACEHOLDER,
    Conversation,
    ConversationList,
    ImageFolder,
    Message,
    Role,
    check_conversation,
    image_keys,
    questions_answered,
)
from dynmoe.errors import DataError
from dynmoe.questions.base import Question
from dynmoe.questions.exact import ExactMatch
from dynmoe.questions.files import (
    image_folder,
    json_lines,
    locate,
    read_json,
    read_object,
    reading,
)
from dynmoe.questions.scienceqa import FIELDS, INSTRUCTION, LETTERS, SOURCE, prompt_text

if TYPE_CHECKING:
    import PIL.Image

FIRST = 1 << 16  # bytes in which the first character of a file is looked for


def json_entries(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that is one array of objects, or has one object a line.

    The file is read as a stream: memory holds one object and the parser's buffer.

    Raises:
        DataError: no such file, not UTF-8, not JSON, cut off, or something else than objects.
    """
    with reading(path), path.open("rb") as file:
        start = file.read(FIRST).removeprefix(BOM_UTF8).lstrip()
        numbered = _array(path, file) if start.startswith(b"[") else _lines(path)
        for where, entry in numbered:
            if not isinstance(entry, dict):
                raise DataError(f"{where}: expected an object, found {type(entry).__name__}.")
            yield entry


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    return ((f"{path}, line {number}", entry) for number, entry in json_lines(path))


def _array(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    import ijson  # of the extra vision-language

    file.seek(0)
    if file.read(len(BOM_UTF8)) != BOM_UTF8:
        file.seek(0)
    number = 0
    try:
        for entry in ijson.items(file, "item", use_float=True):
            yield f"{path}, entry {number}", entry
            number += 1
    except ijson.JSONError as error:
        reason = str(error).splitlines()[0]  # the others show the place in the parser's buffer
        wrong = f"not JSON, or cut off: {reason}."
        if "UTF8" in reason:
            wrong = "not UTF-8. Convert it to UTF-8."
        raise DataError(f"{path}, entry {number}: {wrong}") from None


def file_digest(*paths: Path) -> str:
    """16 hexadecimal digits of the files' bytes; a gigabyte takes about a second."""
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


# LLaVA's conversation files: the public 558k and 665k, MoE-LLaVA's, and those made like them.
#
# An entry is {"id", "image", "conversations": [{"from": "human" or "gpt", "value"}, ...]}; `image`
# is a path below the image folder, a list of them, or missing in an entry of text alone. What
# LLaVA's llava/train/train.py (preprocess_multimodal, preprocess_v1) makes of an entry is kept:
#
# - What stands before the first human turn is left out, and what is never answered is left out too.
# - The only placeholder of a turn moves to its front: "What is it?\n<image>" is trained on as
#   "<image>\nWhat is it?". Several in one turn stay where they are.
# - Where images have no placeholder at all, they stand before the first turn.
# - Inside the turns of a text-only entry "<image>" is mere text: `LITERAL`.

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


# Questions about images, or without, from a table: JSON, JSON lines or CSV.
#
# Columns: `question`; `answer`, or a list `answers` of several people, of which the most frequent
# counts (the first of equally frequent ones); optional `image` (a path below the image folder, or a
# list of them), `id` and `kind`. In CSV, `answers` is a JSON list, and an `image` one path.


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


# ScienceQA (Lu et al., NeurIPS 2022) to train on: asked as the test set is, answered by a letter.
#
# problems.json      pid_splits.json      images/train/<pid>/image.png


def science_qa(
    root: str, images: str | None = None, split: Literal["train", "val"] = "train"
) -> ConversationList:
    """One conversation for each problem of a split, with its image where it has one.

    `images` is the folder of <pid>/image.png, else `images/<split>` below `root`.

    Raises:
        DataError: files are missing or damaged.
    """
    wanted = {"problems": ["problems.json"], "splits": ["pid_splits.json"]}
    defaults = image_folder(images, f"images/{split}", split)
    paths = locate("ScienceQA", root, wanted | defaults, SOURCE)
    problems = read_object(paths["problems"], FIELDS)
    splits = read_json(paths["splits"])
    if not isinstance(splits, dict) or not isinstance(splits.get(split), list):
        raise DataError(f"{paths['splits']}: expected an object with an array of ids at {split!r}.")
    ids = [str(id) for id in splits[split]]
    wrong = [id for id in ids if id not in problems or not _has_answer(problems[id])]
    if wrong:
        raise DataError(
            f"{paths['problems']}: of {len(ids):,} problems of {split}, {len(wrong):,} are not "
            f"there or their answer is not the place of a choice; the first is {wrong[0]}."
        )
    made = [
        questions_answered(
            id,
            [(prompt_text(problems[id]) + INSTRUCTION, LETTERS[problems[id]["answer"]])],
            [f"{id}/{problems[id]['image']}"] if problems[id]["image"] else [],
        )
        for id in ids
    ]
    folder = ImageFolder(paths["images"])
    folder.check((key for each in made for key in each.images), str(paths["problems"]))
    content = f"{split} {file_digest(paths['problems'], paths['splits'])}"
    digest = sha256(content.encode()).hexdigest()[:16]
    return ConversationList(f"scienceqa {split}", digest, made, folder.load)


def _has_answer(problem: Mapping[str, Any]) -> bool:
    return problem["answer"] in range(min(len(problem["choices"]), len(LETTERS)))
