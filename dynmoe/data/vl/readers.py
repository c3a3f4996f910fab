"""Conversations and questions from files: LLaVA's JSON, tables, ScienceQA, easy-VQA."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from codecs import BOM_UTF8
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import dropwhile
from pathlib import Path
from random import Random
from typing import IO, Any, Literal, NamedTuple

from dynmoe.data.vl.conversations import (
    IMAGE_PLACEHOLDER,
    Conversation,
    ConversationSource,
    ImageFolder,
    Message,
    Role,
    SourceKind,
    check_conversation,
    image_keys,
    questions_answered,
    text_digest,
)
from dynmoe.errors import ConfigError, DataError
from dynmoe.questions.base import Question
from dynmoe.questions.choices import INSTRUCTION, LETTERS, prompt_text, read_problems
from dynmoe.questions.exact import ExactMatch
from dynmoe.questions.files import json_lines, read_json, reading

FIRST = 1 << 16  # bytes in which the first character of a file is looked for


def json_entries(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that is one array of objects, or has one object a line.

    The file is read as a stream: memory holds one object and the parser's buffer.

    Raises:
        DataError: no such file, not UTF-8, not JSON, cut off, or something else than objects.
    """
    with reading(path), path.open("rb") as file:
        start = file.read(FIRST).removeprefix(BOM_UTF8).lstrip()
        lines = ((f"{path}, line {number}", entry) for number, entry in json_lines(path))
        numbered = _array(path, file) if start.startswith(b"[") else lines
        for where, entry in numbered:
            if not isinstance(entry, dict):
                raise DataError(f"{where}: expected an object, found {type(entry).__name__}.")
            yield entry


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
    return text_digest("\n".join(digests))


# LLaVA's conversation files: the public 558k and 665k, MoE-LLaVA's, and others of their format.

SPEAKERS: dict[str, Role] = {
    **{"human": "user", "user": "user"},
    **{"gpt": "assistant", "assistant": "assistant"},
}
SILENT = "system"  # a template has its own system text
LITERAL = "<image >"


def read_llava(name: str, files: Sequence[str], images: str | None = None) -> ConversationSource:
    """Conversations of all `files`, one after the other; image paths start from `images`.

    All entries are read once to find broken ones and missing images before training.

    Raises:
        DataError: no such file or folder, a broken entry, or images that are not there.
    """
    paths = tuple(map(Path, files))
    problems = [f"no file {path}" for path in paths if not path.is_file()]
    if images is not None and not Path(images).is_dir():
        problems.append(f"no image folder {images}")
    if problems:
        raise DataError(f"data {name}: {', '.join(problems)}.")
    folder = ImageFolder(None if images is None else Path(images))
    source = ConversationSource(
        name, file_digest(*paths), partial(_llava_conversations, paths), folder.load
    )
    where = " and ".join(map(str, paths))
    folder.check((key for conversation in source for key in conversation.images), where)
    return source


def _llava_conversations(files: Sequence[Path]) -> Iterator[Conversation]:
    for file in files:
        for index, entry in enumerate(json_entries(file)):
            conversation = read_entry(entry, index, f"{file}, entry {index}")
            if conversation is not None:
                yield conversation


def read_entry(entry: dict[str, Any], index: int, where: str) -> Conversation | None:
    """The conversation of an entry; None if nothing in it is an answer to a human.

    An entry is {"id", "image", "conversations": [{"from": "human" or "gpt", "value"}, ...]}, where
    `image` is a path, a list of paths, or missing if there is only text. It becomes what LLaVA's
    llava/train/train.py (preprocess_multimodal, preprocess_v1) makes of it:

    - Text before the first human turn is left out, and a question without an answer too.
    - A turn's only placeholder moves to its front: "What is it?\\n<image>" is trained on as
      "<image>\\nWhat is it?". Several placeholders in one turn stay where they are.
    - Images without any placeholder are put before the first turn.
    - In a text-only entry "<image>" within a turn is plain text: `LITERAL`.

    Raises:
        DataError: the entry has another form; names the entry, its id and what is wrong.
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
        if speaker not in SPEAKERS or not isinstance(turn.get("value"), str):
            raise DataError(
                f'{where}, turn {place}: expected "from" ({", ".join([*SPEAKERS, SILENT])}) and a '
                f'text "value", found {turn!r}.'
            )
        yield Message(SPEAKERS[speaker], turn["value"])


def _placed(messages: list[Message], images: int, where: str) -> list[Message]:
    """Put the placeholders where LLaVA has them."""
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


class TableRow(NamedTuple):
    """A question of a table and its answer."""

    id: str
    question: str
    answer: str
    images: tuple[str, ...]
    kind: str


def vqa_table(
    name: str, file: str, images: str | None = None, suffix: str = ""
) -> ConversationSource:
    """Training conversations: one question of the table each, with `suffix` at its end.

    Raises:
        DataError: a broken row, or images that are not there.
    """
    path, folder = Path(file), _checked(file, images)
    digest = text_digest(f"{file_digest(path)} {suffix}")
    read = partial(_table_conversations, path, suffix)
    return ConversationSource(name, digest, read, folder.load)


def vqa_questions(name: str, file: str, images: str | None = None, suffix: str = "") -> ExactMatch:
    """The questions of the table as a question set; raises DataError as `vqa_table` does."""
    folder, rows = _checked(file, images), list(read_rows(Path(file)))
    return ExactMatch(
        name,
        [Question(row.id, row.question + suffix, row.images, row.kind) for row in rows],
        [row.answer for row in rows],
        folder.load,
    )


def _table_conversations(file: Path, suffix: str) -> Iterator[Conversation]:
    for row in read_rows(file):
        made = questions_answered(row.id, [(row.question + suffix, row.answer)], row.images)
        yield check_conversation(made, str(file))


def read_rows(file: Path) -> Iterator[TableRow]:
    """The rows of a table of questions: JSON, JSON lines or CSV, read as a stream.

    Columns: `question`; `answer`, or a list `answers` of several people, of which the most frequent
    counts (the first of equally frequent ones); optional `image` (a path below the image folder, or
    a list of paths), `id` and `kind`. In CSV, `answers` is a JSON list, and an `image` one path.

    Raises:
        DataError: names the first broken row, and what is wrong with it.
    """
    entries = _csv_entries(file) if file.suffix == ".csv" else json_entries(file)
    for index, entry in enumerate(entries):
        where = f"{file}, row {index}"
        question = entry.get("question")
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{where}: expected a question, found {_seen(entry)}.")
        yield TableRow(
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
        with reading(file), file.open(encoding="utf-8-sig", newline="") as lines:
            for entry in csv.DictReader(lines):
                if entry.get("answers"):
                    entry["answers"] = json.loads(entry["answers"])
                yield entry
    except (json.JSONDecodeError, csv.Error) as error:
        raise DataError(f"{file}: {error}. Expected CSV whose answers are JSON lists.") from None


def _answer(entry: Mapping[str, Any], where: str) -> str:
    answers = entry.get("answers") or [entry.get("answer", "")]
    texts = [str(each).strip() for each in answers] if isinstance(answers, list) else []
    if not texts or not all(texts):
        raise DataError(f"{where}: expected an answer, or a list answers, found {_seen(entry)}.")
    return Counter(texts).most_common(1)[0][0]


def _seen(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in entry.items()) or "nothing"


def science_qa(
    root: str, images: str | None = None, split: Literal["train", "val"] = "train"
) -> ConversationSource:
    """A split of ScienceQA (Lu et al., NeurIPS 2022), asked as its test set, answered by a letter.

    One conversation for each problem, with its image where it has one. `images` is the folder of
    <pid>/image.png, else `images/<split>` below `root`.

    Raises:
        DataError: files are missing or damaged.
    """
    problems, paths = read_problems(root, images, split)
    made = [
        questions_answered(
            id,
            [(prompt_text(problem) + INSTRUCTION, LETTERS[problem["answer"]])],
            [f"{id}/{problem['image']}"] if problem["image"] else [],
        )
        for id, problem in problems.items()
    ]
    folder = ImageFolder(paths["images"])
    folder.check((key for each in made for key in each.images), str(paths["problems"]))
    digest = text_digest(f"{split} {file_digest(paths['problems'], paths['splits'])}")
    return ConversationSource(f"scienceqa {split}", digest, partial(iter, made), folder.load)


# easy-VQA (Zhou 2019): 5,000 images of one shape, 48,248 questions; PyPI's package `easy-vqa`.
#
# The package's data folder holds answers.txt and, for train and test, images/<number>.png (64 px)
# and questions.json, a list of [question, answer, image number]. It is located, not imported.

Triple = tuple[str, str, int]
"""A question, its answer and the number of its image."""

SHAPES = frozenset({"circle", "rectangle", "triangle"})
COLOURS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
CAPTION_QUESTION = "what is in the image?"


def easy_vqa_source(
    kind: SourceKind, root: str | None = None, max_turns: int = 4
) -> ConversationSource:
    """Training conversations; `root` is the data folder where it is not the package's.

    questions: an image's questions, shuffled, at most `max_turns` in a conversation, as an earlier
    turn may give a later answer away. captions: "a blue circle", from the questions of an image.

    Raises:
        ConfigError: the package is not installed, or a setting is impossible.
        DataError: the folder is not as the package lays it out.
    """
    if kind not in ("captions", "questions"):
        raise ConfigError(f"easy-VQA: expected the kind captions or questions, found {kind!r}.")
    if max_turns < 1:
        raise ConfigError(f"easy-VQA: expected max_turns of 1 or more, found {max_turns}.")
    folder = _folder(root) / "train"
    by_image: dict[int, list[Triple]] = defaultdict(list)
    for triple in _read_triples(folder):
        by_image[triple[2]].append(triple)
    made: list[Conversation] = []
    for number, own in by_image.items():
        if kind == "captions":
            turns = [(CAPTION_QUESTION, text)] if (text := caption_of(own)) else []
        else:
            turns = [triple[:2] for triple in Random(number).sample(own, len(own))]
        for start in range(0, len(turns), max_turns):
            chosen = turns[start : start + max_turns]
            made.append(questions_answered(f"{number}-{start}", chosen, (f"{number}.png",)))
    digest = text_digest(f"{kind} {max_turns} {file_digest(folder / 'questions.json')}")
    load = ImageFolder(folder / "images").load
    return ConversationSource(f"easy-vqa {kind}", digest, partial(iter, made), load)


def easy_vqa_questions(root: str | None = None) -> ExactMatch:
    """The test set, of the kinds shape, colour and yes_no.

    The text alone gives 0.67 of the answers, and 0.83 of yes and no: most questions ask for
    something that is not there.

    Raises:
        ConfigError: the package is not installed.
        DataError: the folder is not as the package lays it out.
    """
    folder = _folder(root) / "test"
    questions, answers = [], []
    for index, (question, answer, image) in enumerate(_read_triples(folder)):
        kind = "shape" if answer in SHAPES else "colour" if answer in COLOURS else "yes_no"
        questions.append(Question(str(index), question, (f"{image}.png",), kind))
        answers.append(answer)
    return ExactMatch("easy_vqa", questions, answers, ImageFolder(folder / "images").load)


def caption_of(triples: Sequence[Triple]) -> str | None:
    """A caption of an image's one shape from its questions and answers; None if they name nothing.

    "what is the blue shape?" "circle" names both its colour and its shape. "is there a blue
    shape?" "yes" names one of them, and so does "is no blue shape present?" "no".
    """
    said: set[str] = set()
    for question, answer, _ in triples:
        words = set(re.findall(r"[a-z]+", question))
        if answer in SHAPES | COLOURS:
            said |= {answer} | words
        elif (answer == "yes") != bool(words & {"no", "not"}):
            said |= words
    shape, colour = min(said & SHAPES, default=""), min(said & COLOURS, default="")
    return f"a {colour} {shape or 'shape'}".replace("  ", " ") if shape or colour else None


def _folder(root: str | None) -> Path:
    if root is not None:
        return Path(root)
    package = find_spec("easy_vqa")
    if package is None or package.origin is None:
        raise ConfigError(
            "easy-VQA is not installed: pip install easy-vqa, or give the folder with its train/ "
            "and test/ as data.content.root."
        )
    return Path(package.origin).parent / "data"


def _read_triples(folder: Path) -> list[Triple]:
    file = folder / "questions.json"
    try:
        triples = [(str(text), str(answer), int(image)) for text, answer, image in read_json(file)]
    except (ValueError, TypeError):
        raise DataError(f"{file}: expected a list of [question, answer, image number].") from None
    ImageFolder(folder / "images").check((f"{image}.png" for _, _, image in triples), str(file))
    return triples
