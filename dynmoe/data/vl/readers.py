"""Conversations and questions from files: LLaVA's JSON, tables, ScienceQA, easy-VQA."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import dropwhile
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple, get_args

from dynmoe.data.vl.conversations import (
    IMAGE_PLACEHOLDER,
    Conversation,
    ConversationSource,
    ImageFolder,
    Message,
    SourceKind,
    check_conversation,
    has_empty_image,
    image_keys,
    questions_answered,
    text_digest,
    warn_of_empty_images,
)
from dynmoe.data.vl.entries import answer_of, csv_entries, file_digest, json_entries, seen
from dynmoe.data.vl.image_index import reading_of
from dynmoe.data.vl.turns import read_turns
from dynmoe.errors import ConfigError, DataError
from dynmoe.questions.base import Question
from dynmoe.questions.choices import INSTRUCTION, LETTERS, prompt_text, read_problems
from dynmoe.questions.exact import ExactMatch
from dynmoe.questions.files import MissingImages, read_json
from dynmoe.questions.values import is_text, other_spellings, plain_text, shown

log = logging.getLogger(__name__)

# LLaVA's conversation files: the public 558k and 665k, MoE-LLaVA's, and others of their format.

LITERAL = "<image >"
Placement = Literal["llava", "as_is"]
"""Where a question's only placeholder stands: see `read_entry`."""


def read_llava(
    name: str,
    files: Sequence[str],
    images: str | None = None,
    image_placement: Placement = "llava",
    skip_invalid: bool = False,
    cache: str | None = None,
) -> ConversationSource:
    """Conversations of all `files`, one after the other; image paths start from `images`.

    All entries are read once to find broken ones and missing images before training; with a folder
    `cache` once for all runs, while the files are the same. With `skip_invalid` broken entries are
    left out, and images are not looked for.

    Raises:
        DataError: no such file or folder, a broken entry, or images that are not there.
        ConfigError: another placement than "llava" and "as_is".
    """
    if image_placement not in get_args(Placement):
        raise ConfigError(
            f"data.content.image_placement={image_placement}: expected llava or as_is."
        )
    paths = tuple(map(Path, files))
    problems = [f"no file {path}" for path in paths if not path.exists()]
    if images is not None and not Path(images).is_dir():
        problems.append(f"no image folder {images}")
    if problems:
        raise DataError(f"data {name}: {', '.join(problems)}.")
    folder = ImageFolder(None if images is None else Path(images))
    digest = file_digest(*paths)
    if image_placement != "llava":
        digest = text_digest(f"{digest} {image_placement}")
    read = partial(_llava_conversations, paths, image_placement, skip_invalid)
    rules = f"{digest} {skip_invalid} {' '.join(map(str, paths))}"  # which warnings name
    found = reading_of(read, rules, None if cache is None else Path(cache))
    _check_images(folder, found.keys, " and ".join(map(str, paths)), skip_invalid)
    return ConversationSource(
        name, digest, read, folder.load, folder.path, found.left_out, found.keys
    )


def _llava_conversations(
    files: Sequence[Path],
    placement: Placement,
    skip_invalid: bool,
    left_out: Counter[str] | None = None,
) -> Iterator[Conversation]:
    is_first, left_out = left_out is not None, Counter() if left_out is None else left_out
    total = empty = with_images = 0
    for file in files:
        for index, entry in enumerate(json_entries(file)):
            total += 1
            where = f"{file}, entry {index}"
            try:
                conversation = read_entry(entry, index, where, placement, left_out)
            except DataError as error:
                if not skip_invalid:
                    raise
                _count_broken(left_out, error)
                continue
            if conversation is not None:
                empty += has_empty_image(entry)
                with_images += bool(conversation.images)
                yield conversation
    if not total:
        raise DataError(f"{', '.join(map(str, files))}: no conversations in it.")
    if is_first:
        warn_of_empty_images(", ".join(map(str, files)), empty, with_images)


def _check_images(folder: ImageFolder, keys: Iterable[str], where: str, skip_invalid: bool) -> None:
    """Go through the keys, which counts what is left out on the way, and look for their files."""
    if skip_invalid:
        deque(keys, maxlen=0)
        return
    try:
        folder.check(keys, where)
    except MissingImages as error:
        raise DataError(f"{error} Or leave out what needs them: data.skip_invalid=true.") from None


BROKEN = "entries that break a rule"


def _count_broken(left_out: Counter[str], error: DataError) -> None:
    if BROKEN not in left_out:
        log.warning("the first of the %s: %s", BROKEN, error)
    left_out[BROKEN] += 1


def read_entry(
    entry: dict[str, Any],
    index: int,
    where: str,
    placement: Placement = "llava",
    left_out: Counter[str] | None = None,
) -> Conversation | None:
    """The conversation of an entry; None if nothing in it is an answer to a human.

    An entry is {"id", "image", "conversations": [{"from": "human" or "gpt", "value"}, ...]}, where
    `image` (or `images`) is a path, a list of paths, or missing if there is only text. OpenAI's
    {"messages": [{"role": "user" or "assistant", "content"}, ...]} is read, too; there `content`
    may be a list of texts and images. As in LLaVA's llava/train/train.py text before the first
    human turn is left out; a question without an answer and system turns are left out too, as a
    template has its own system text. `left_out` counts them.

    - With the placement "llava" a question's only placeholder moves to its front, as in
      preprocess_multimodal there: "What is it?\\n<image>" is trained on as "<image>\\nWhat is it?".
      Several in a question, of which LLaVA shows one, stay where they are.
    - With "as_is", as in MoE-LLaVA's and DynMoE's train.py, all do, and white space too.
    - In an answer, and in a text-only entry, "<image>" is plain text: `LITERAL`.

    Images without any placeholder, which LLaVA and MoE-LLaVA do not show, are put before the first
    turn.

    Raises:
        DataError: the entry has another form; names the entry, its id and what is wrong.
    """
    left_out = Counter() if left_out is None else left_out
    name = _id(entry, index, where, ("id",))
    place, where = where, f"{where}, conversation {name!r}"
    if any(entry.get(key) not in (None, "", []) for key in ("video", "videos")):
        raise DataError(f"{where}: has a video; only images can be shown. Take the entry out.")
    images = image_keys(entry, where)
    messages, inner = read_turns(entry, where, left_out)
    if inner and images:
        raise DataError(f"{where}: has images both in its turns and beside them. Keep one of them.")
    images = images or inner
    answering = list(dropwhile(lambda each: each.role != "user", messages))
    if answering and len(answering) < len(messages):
        left_out["turns before the first question"] += len(messages) - len(answering)
    asked = len(answering)
    while answering and answering[-1].role == "user":
        answering.pop()
    if not answering:
        left_out["entries without an answer to a question"] += 1
        return None
    if len(answering) < asked:
        left_out["questions at the end without an answer"] += asked - len(answering)
    placed = _placed(answering, len(images), where, placement)
    return check_conversation(Conversation(name, tuple(placed), images), place)


def _id(entry: Mapping[str, Any], index: int, where: str, keys: Sequence[str]) -> str:
    """The first of the keys that has a value, else the number of the entry."""
    given = next((key for key in keys if entry.get(key) not in (None, "")), None)
    if given is None:
        return str(index)
    name = plain_text(entry[given])
    if name is None:
        raise DataError(
            f"{where}: expected {given} to be text or a number, found {shown(entry[given])}."
        )
    return name


def _placed(
    messages: list[Message], images: int, where: str, placement: Placement
) -> list[Message]:
    """Put the placeholders where `placement` says."""
    first = messages[0].text.strip()
    if not images and (first.startswith(IMAGE_PLACEHOLDER) or first.endswith(IMAGE_PLACEHOLDER)):
        raise DataError(f"{where}: the first turn has {IMAGE_PLACEHOLDER}, but there is no image.")
    if not images:
        return [Message(role, text.replace(IMAGE_PLACEHOLDER, LITERAL)) for role, text in messages]
    if not any(IMAGE_PLACEHOLDER in message.text for message in messages if message.role == "user"):
        front = f"{IMAGE_PLACEHOLDER}\n" * images
        messages = [Message("user", front + messages[0].text), *messages[1:]]
    return messages if placement == "as_is" else [_in_front(message) for message in messages]


def _in_front(message: Message) -> Message:
    if message.role != "user" or message.text.count(IMAGE_PLACEHOLDER) != 1:
        return message
    rest = message.text.replace(IMAGE_PLACEHOLDER, "").strip()
    return Message("user", f"{IMAGE_PLACEHOLDER}\n{rest}")


# Tables of questions.

COLUMNS = ("id", "question", "answer", "answers", "image", "kind")
DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}


class TableRow(NamedTuple):
    """A question of a table and its answer."""

    id: str
    question: str
    answer: str
    images: tuple[str, ...]
    kind: str


def vqa_table(
    name: str,
    file: str,
    images: str | None = None,
    suffix: str = "",
    skip_invalid: bool = False,
) -> ConversationSource:
    """Training conversations: one question of the table each, with `suffix` at its end.

    With `skip_invalid` broken rows are left out, and images are not looked for.

    Raises:
        DataError: a broken row, or images that are not there.
    """
    path, folder = Path(file), ImageFolder(None if images is None else Path(images))
    digest = text_digest(f"{file_digest(path)} {suffix}")
    left_out: Counter[str] = Counter()
    read = partial(_table_conversations, path, suffix, skip_invalid)
    keys = (key for conversation in read(left_out) for key in conversation.images)
    _check_images(folder, keys, file, skip_invalid)
    return ConversationSource(name, digest, read, folder.load, folder.path, left_out)


def vqa_questions(
    name: str,
    file: str,
    images: str | None = None,
    suffix: str = "",
    skip_invalid: bool = False,
) -> ExactMatch:
    """The questions of the table as a question set; raises DataError as `vqa_table` does."""
    folder = ImageFolder(None if images is None else Path(images))
    left_out: Counter[str] = Counter()
    rows = list(read_rows(Path(file), skip_invalid, left_out))
    _check_images(folder, (key for row in rows for key in row.images), file, skip_invalid)
    return ExactMatch(
        name,
        [Question(row.id, row.question + suffix, row.images, row.kind) for row in rows],
        [row.answer for row in rows],
        folder.load,
        image_path=folder.path,
        left_out=left_out,
    )


def _table_conversations(
    file: Path, suffix: str, skip_invalid: bool, left_out: Counter[str] | None = None
) -> Iterator[Conversation]:
    for row in read_rows(file, skip_invalid, left_out):
        made = questions_answered(row.id, [(row.question + suffix, row.answer)], row.images)
        yield check_conversation(made, str(file))


def read_rows(
    file: Path, skip_invalid: bool = False, left_out: Counter[str] | None = None
) -> Iterator[TableRow]:
    """The rows of a table of questions: JSON, JSON lines, CSV or TSV, read as a stream.

    Columns: `question`; `answer`, or a list `answers` of several people, of which the most frequent
    counts (of equally frequent ones the `answer` beside them, else the first); optional `image` or
    `images` (a path below the image folder, or a list of paths), `id` or `question_id`, and `kind`.
    Answers are texts, numbers or booleans, in `answers` also objects with such an `answer`, as
    VQAv2 has them. In CSV
    and TSV `answers` is a JSON list, and an `image` one path. With `skip_invalid` broken rows are
    left out, which `left_out` counts.

    Raises:
        DataError: names the first broken row, and what is wrong with it; or there are no rows.
    """
    is_first, left_out = left_out is not None, Counter() if left_out is None else left_out
    delimiter = DELIMITERS.get(file.suffix.lower())
    entries = json_entries(file) if delimiter is None else csv_entries(file, delimiter)
    empty = with_images = 0
    index = -1
    for index, entry in enumerate(entries):
        try:
            row = _row(entry, index, f"{file}, row {index}")
        except DataError as error:
            if not skip_invalid:
                raise
            _count_broken(left_out, error)
            continue
        empty += has_empty_image(entry)
        with_images += bool(row.images)
        yield row
    if index < 0:
        raise DataError(f"{file}: expected rows with question and answer, found none.")
    if is_first:
        warn_of_empty_images(str(file), empty, with_images)


def _row(entry: Mapping[str, Any], index: int, where: str) -> TableRow:
    question = entry.get("question")
    if not is_text(question) or not question.strip():
        raise DataError(f"{where}: expected a question, found {seen(entry)}.")
    if IMAGE_PLACEHOLDER in question:
        raise DataError(
            f"{where}: {IMAGE_PLACEHOLDER} in the question. Take it out: images stand before it."
        )
    others = other_spellings(entry, (*COLUMNS, "images", "question_id"))
    if key := next((key for key in others if entry[key] not in (None, "")), None):
        raise DataError(
            f"{where}: the key {key!r} is not read. Call it {others[key]}, or take it out."
        )
    kind = plain_text("" if entry.get("kind") is None else entry["kind"])
    if kind is None:
        raise DataError(f"{where}: expected kind to be text, found {shown(entry['kind'])}.")
    return TableRow(
        id=_id(entry, index, where, ("id", "question_id")),
        question=question,
        answer=answer_of(entry, where),
        images=image_keys(entry, where),
        kind=kind,
    )


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
    read = partial(iter, made)
    return ConversationSource(f"scienceqa {split}", digest, read, folder.load, folder.path)


# easy-VQA (Zhou 2019): 5,000 images of one shape, 48,248 questions; PyPI's package `easy-vqa`.
#
# The package's data folder holds answers.txt and, for train and test, images/<number>.png (64 px)
# and questions.json, a list of [question, answer, image number]. It is located, not imported.

Triple = tuple[str, str, int]
"""A question, its answer and the number of its image."""

SHAPES = frozenset({"circle", "rectangle", "triangle"})
COLOURS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
EASY_ANSWER = 4  # tokens; the longest is one word
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
    shown_from = ImageFolder(folder / "images")
    return ConversationSource(
        f"easy-vqa {kind}", digest, partial(iter, made), shown_from.load, shown_from.path
    )


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
    shown_from = ImageFolder(folder / "images")
    return ExactMatch("easy_vqa", questions, answers, shown_from.load, EASY_ANSWER, shown_from.path)


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
        return Path(root).expanduser()
    package = find_spec("easy_vqa")
    if package is None or package.origin is None:
        raise ConfigError(
            "easy-VQA is not installed: pip install easy-vqa, or give the folder with its train/ "
            "and test/ as data.content.root."
        )
    return Path(package.origin).parent / "data"


def _read_triples(folder: Path) -> list[Triple]:
    file = folder / "questions.json"
    rows = read_json(file)
    triples = [
        (row[0], row[1], row[2])
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, list) and len(row) == 3
        if is_text(row[0]) and is_text(row[1]) and type(row[2]) is int
    ]
    if not triples or len(triples) < len(rows):
        raise DataError(f"{file}: expected a list of [question, answer, image number].")
    ImageFolder(folder / "images").check((f"{image}.png" for _, _, image in triples), str(file))
    return triples
