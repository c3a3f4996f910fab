"""Files with random damage are read, or refused with their name: no other exception.

More of them: `python tests/data/vl/test_damaged_files.py 10000`.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image

from dynmoe.data.vl.readers import easy_vqa_questions, read_llava, science_qa, vqa_questions
from dynmoe.errors import ConfigError, DataError
from dynmoe.questions import read_question_set

VALUES: list[Any] = [
    *(
        None,
        0,
        False,
        True,
        -1,
        2**70,
        1.5,
        float("nan"),
        float("inf"),
        "",
        " ",
        "a\x00b",
        "\ud800",
    ),
    *([], {}, [None], [[]], [{}], ["a.png"], {"answer": "x"}, {"a": {"b": []}}, "<image>", "../.."),
    *("<image>" * 3, "x" * 5000, "None", "nan", "a.png", "/", "\u2028", "grade", "\n"),
]
KEYS = [
    "",
    "image",
    "images",
    "img",
    "id",
    "from",
    "value",
    "role",
    "content",
    "messages",
    "answer",
]
LINES = {".jsonl", ".csv", ".tsv"}

ROWS = [
    {"id": "a", "question": "what?", "answer": "cat", "image": "a.png", "kind": "k"},
    {"question_id": 0, "question": "who?", "answers": ["1", {"answer": "2"}], "image": None},
]
TURNS = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
PARTS = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "q"}]
ENTRIES = [
    {"id": 1, "image": "a.png", "conversations": TURNS},
    {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "a"}]},
]
PROBLEM = {"question": "q", "choices": ["a", "b"], "answer": 1, "hint": "h", "image": "image.png"}
PROBLEMS = {"1": {**PROBLEM, "grade": "grade3", "subject": "natural science"}}
SPLITS = {split: ["1"] for split in ("train", "val", "test")}
POPE = {"question_id": 1, "image": "a.png", "text": "Is it?", "label": "yes"}
GQA = {"question": "q", "imageId": "a", "answer": "yes", "types": {"structural": "verify"}}
VQA = {"question_id": 10, "image_id": 1, "question": "q"}
HUMANS = {"question_id": 10, "answer_type": "other", "answers": [{"answer": "red"}] * 10}
TEXTVQA = {"question_id": 1, "image_id": "a", "question": "q", "answers": ["x"] * 10}
BENCH = {"question_id": 0, "image": "a.png", "text": "q", "category": "c"}
V2 = "v2_OpenEnded_mscoco_val2014_questions.json"
V2_HUMANS = "v2_mscoco_val2014_annotations.json"

Files = dict[str, Any]
"""Contents by name; JSON by its suffix, one object a line for names in -.jsonl, .csv and .tsv."""


def llava(name: str) -> Callable[[Path], Any]:
    return lambda root: list(read_llava("mix", [str(root / name)], str(root)))


def table(name: str) -> Callable[[Path], Any]:
    def read(root: Path) -> Any:
        found = vqa_questions("own", str(root / name), str(root))
        return found.digest, found.score(["x"] * len(found.questions))

    return read


def published(name: str) -> Callable[[Path], Any]:
    def read(root: Path) -> Any:
        found = read_question_set(name, str(root))
        for answer in ("x", "", "yes", "No."):  # of all questions the same
            answers = [answer] * len(found.questions)
            found.write(root / "out", answers)
            if found.is_scored:
                assert all(0 <= value <= 1 for value in found.score(answers).values())
        return found.digest

    return read


CASES: dict[str, tuple[Files, Callable[[Path], Any]]] = {
    "llava.json": ({"a.json": ENTRIES}, llava("a.json")),
    "llava.jsonl": ({"a.jsonl": ENTRIES}, llava("a.jsonl")),
    "table.json": ({"a.json": ROWS}, table("a.json")),
    "table.jsonl": ({"a.jsonl": ROWS}, table("a.jsonl")),
    "table.csv": ({"a.CSV": ROWS}, table("a.CSV")),
    "table.tsv": ({"a.tsv": ROWS}, table("a.tsv")),
    "easy_vqa": (
        {"test/questions.json": [["is it?", "yes", 1]]},
        lambda root: easy_vqa_questions(str(root)),
    ),
    "science_qa": (
        {"problems.json": PROBLEMS, "pid_splits.json": SPLITS},
        lambda root: list(science_qa(str(root))),
    ),
    "scienceqa": ({"problems.json": PROBLEMS, "pid_splits.json": SPLITS}, published("scienceqa")),
    "pope": ({"coco_pope_random.json": POPE}, published("pope")),
    "gqa": ({"testdev_balanced_questions.json": {"1": GQA}}, published("gqa")),
    "vqav2": (
        {V2: {"questions": [VQA]}, V2_HUMANS: {"annotations": [HUMANS]}},
        published("vqav2"),
    ),
    "textvqa": ({"TextVQA_0.5.1_val.json": {"data": [TEXTVQA]}}, published("textvqa")),
    "vizwiz": ({"test.json": [{"image": "a.png", "question": "q"}]}, published("vizwiz")),
    "llava_bench": ({"questions.jsonl": [BENCH]}, published("llava_bench")),
    "mm_vet": (
        {"mm-vet.json": {"v1": {"imagename": "a.png", "question": "q"}}},
        published("mm_vet"),
    ),
    "mmbench": (
        {
            "mmbench_dev_20230712.tsv": [
                {"index": "1", "question": "q", **dict.fromkeys("ABCD", "x"), "image": "eA=="}
            ]
        },
        published("mmbench"),
    ),
}
IMAGES = [
    *("a.png", "test/images/1.png", "images/train/1/image.png", "images/test/1/image.png"),
    *("val2014/a.png", "val2014/COCO_val2014_000000000001.jpg", "images/a.jpg", "images/a.png"),
    *("train_images/a.jpg", "test/a.png"),
]


def damaged_value(random: Random, value: Any) -> Any:
    """The value with one thing in it replaced, removed, renamed, doubled or put into a list."""
    value = copy.deepcopy(value)
    holder = [value]
    place: Any = 0
    target: Any = holder
    while isinstance(target[place], dict | list) and target[place] and random.random() < 0.85:
        target = target[place]
        place = random.choice(list(target) if isinstance(target, dict) else range(len(target)))
    match random.randrange(5):
        case 0 if target is not holder:
            del target[place]
        case 1 if isinstance(target, dict):
            target[random.choice([*KEYS, str(place).upper(), f" {place}", f"{place}s"])] = (
                target.pop(place)
            )
        case 2:
            target[place] = [target[place], target[place]]
        case _:
            target[place] = random.choice(VALUES)
    return holder[0]


def damaged_bytes(random: Random, content: bytes) -> bytes:
    """The bytes cut off, or with one of them replaced, removed, or something put between them."""
    at = random.randrange(len(content) + 1)
    inserted = random.choice(
        [b'"', b"\\", b"\xff", b"\x00", b"[" * 5000, b"{", b"}", b",", b"\n", b"1" * 5000, b"\r"]
    )
    match random.randrange(4):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + bytes([random.randrange(256)]) + content[at + 1 :]
        case 2:
            return content[:at] + content[at + random.randrange(1, 9) :]
        case _:
            return content[:at] + inserted + content[at:]


def written(name: str, value: Any) -> bytes:
    if not any(name.lower().endswith(suffix) for suffix in LINES):
        return json.dumps(value).encode()
    rows = value if isinstance(value, list) else [value]
    if name.endswith(".jsonl"):
        return "\n".join(map(json.dumps, rows)).encode()
    rows = [row for row in rows if isinstance(row, dict)]
    columns = list(dict.fromkeys(key for row in rows for key in row)) or ["question"]
    delimiter = "\t" if name.endswith(".tsv") else ","
    cells = [["" if row.get(column) is None else row[column] for column in columns] for row in rows]
    lines = [
        delimiter.join(
            '"' + str(json.dumps(cell) if isinstance(cell, list) else cell).replace('"', '""') + '"'
            for cell in line
        )
        for line in [columns, *cells]
    ]
    return "\n".join(lines).encode(errors="replace")


def put_whole(name: str, root: Path) -> None:
    for image in IMAGES:
        if not (root / image).exists():
            (root / image).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2)).save(root / image)
    for file, value in CASES[name][0].items():
        (root / file).write_bytes(written(file, value))


def read_damaged(name: str, seed: int, root: Path) -> bool:
    """Whether the files could be read; raises all but DataError and ConfigError, and one of these
    that does not name where it comes from."""
    put_whole(name, root)
    random = Random(f"{name} {seed}")
    files, read = CASES[name]
    chosen = random.choice(list(files))
    for file, value in files.items():
        for _ in range(random.randrange(1, 3) if file == chosen and random.random() < 0.7 else 0):
            value = damaged_value(random, value)
        content = written(file, value)
        if file == chosen and random.random() < 0.4:
            content = damaged_bytes(random, content)
        (root / file).write_bytes(content)
    try:
        read(root)
    except (DataError, ConfigError) as error:
        assert str(root) in str(error) or "own:" in str(error) or name in str(error), error
        return False
    return True


@pytest.mark.parametrize("name", CASES)
def test_damaged_files_are_refused(name: str, tmp_path: Path) -> None:
    put_whole(name, tmp_path)
    CASES[name][1](tmp_path)
    found = [read_damaged(name, seed, tmp_path) for seed in range(25)]
    assert not all(found)


if __name__ == "__main__":
    tries = int(sys.argv[1])
    wrong = 0
    for case in CASES:
        read_whole = 0
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(tries // len(CASES)):
                try:
                    read_whole += read_damaged(case, seed, Path(folder))
                except Exception as error:
                    wrong += 1
                    print(f"{case} {seed}: {type(error).__name__}: {str(error)[:200]}")
        print(f"{case}: {read_whole} read")
    print(f"{wrong} tracebacks")
