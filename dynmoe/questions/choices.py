"""Question sets answered by the letter of an option: ScienceQA and MMBench.

ScienceQA (Lu et al., NeurIPS 2022), its test set as LLaVA and MoE-LLaVA evaluate it.

    problems.json      pid_splits.json      images/test/<pid>/image.png
    llava_test_CQM-A.json      LLaVA's questions, if its evaluation bundle is there

An entry of problems.json, made up:

    "4": {"question": "Which is warm?", "choices": ["ice", "fire"], "answer": 1, "hint": "",
          "image": "image.png", "grade": "grade3", "subject": "natural science", ...}

The prompt is "Context: N/A\\nQuestion: Which is warm?\\nOptions: (A) ice (B) fire\\nAnswer with the
option's letter from the given choices directly.". Answers are read by LLaVA's eval_science_qa.py,
accuracies are those of ScienceQA's tools/evaluate_acc.py.

MMBench (Liu et al., ECCV 2024): questions with options, images as base64 in a table.

A row of mmbench_dev_20230712.tsv, made up:

    index  question        hint  A    B     C  D  answer  category  image    ...
    241    Which is warm?        ice  fire        B       ...       /9j/4...

The prompt is "Which is warm?\\nA. ice\\nB. fire\\nAnswer with the option's letter from the given
choices directly.", as in LLaVA's model_vqa_mmbench.py with --single-pred-prompt;
convert_mmbench_for_submission.py makes the table that MMBench's server scores.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dynmoe.errors import DataError
from dynmoe.questions.base import (
    FolderSet,
    Question,
    Unscored,
    answer_row,
    mean,
    write_json,
    write_lines,
    write_text,
)
from dynmoe.questions.files import (
    check_same,
    counted,
    first_path,
    image_folder,
    locate,
    read_json,
    read_list,
    read_object,
    read_text,
)

if TYPE_CHECKING:
    import PIL.Image

SOURCE = "https://github.com/lupantech/ScienceQA"
SPLIT = "test"
LLAVA_QUESTIONS = f"llava_{SPLIT}_CQM-A.json"
FIELDS = ("question", "choices", "answer", "hint", "image", "grade", "subject")
LETTERS = "ABCDE"
INSTRUCTION = "\nAnswer with the option's letter from the given choices directly."
STATED = re.compile(r"The answer is ([A-Z]).")


class ScienceProblem(NamedTuple):
    """Record of a question: `answer` is the place of the right one among `choices` options."""

    answer: int
    choices: int
    has_hint: bool
    has_image: bool
    subject: str
    grade: int


# The columns of the published table, as tools/evaluate_acc.py of ScienceQA forms them.
COLUMNS: dict[str, Callable[[ScienceProblem], bool]] = {
    "img": lambda problem: problem.has_image,
    "txt": lambda problem: problem.has_hint,
    "no": lambda problem: not problem.has_hint and not problem.has_image,
    "nat": lambda problem: problem.subject == "natural science",
    "soc": lambda problem: problem.subject == "social science",
    "lan": lambda problem: problem.subject == "language science",
    "g1_6": lambda problem: 1 <= problem.grade <= 6,
    "g7_12": lambda problem: 7 <= problem.grade <= 12,
}


class ScienceQa(FolderSet):
    """Records are `ScienceProblem`s; a question's kind is its subject."""

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """Accuracies: "score" over all, and each of `COLUMNS` that has questions."""
        right = [
            (problem, float(parse_choice(answer, problem.choices) == problem.answer))
            for _, problem, answer in self.pairs(answers)
        ]
        scores = {"score": mean([value for _, value in right])}
        for name, belongs in COLUMNS.items():
            if values := [value for problem, value in right if belongs(problem)]:
                scores[name] = mean(values)
        return scores

    def write(self, folder: Path, answers: Sequence[str]) -> list[Path]:
        """The answers that LLaVA's eval_science_qa.py reads, and the result that it writes.

        The result is what ScienceQA's tools/evaluate_acc.py reads: -1 is an answer without choice.
        """
        lines, results, outputs = [], {}, {}
        correct = 0
        for question, problem, answer in self.pairs(answers):
            # The script knows a question with an image by its placeholder.
            prompt = "<image>\n" * bool(question.images) + question.text
            lines.append(answer_row(question.id, prompt, answer))
            results[question.id] = parse_choice(answer, problem.choices)
            outputs[question.id] = answer
            correct += results[question.id] == problem.answer
        result = {
            "acc": correct / len(results) * 100,
            "correct": correct,
            "count": len(results),
            "results": results,
            "outputs": outputs,
        }
        return [
            write_lines(folder / "scienceqa_answers.jsonl", lines),
            write_json(folder / "scienceqa_result.json", result, indent=2),
        ]


def parse_choice(answer: str, choices: int) -> int:
    """The place of the option that an answer names, else -1, as in eval_science_qa.py.

    "B", "B. because ...", or "The answer is B." exactly once.
    """
    if answer[:1] in LETTERS and (len(answer) == 1 or answer[1:3] == ". "):
        letter = answer[:1]
    else:
        stated = STATED.findall(answer)
        letter = stated[0] if len(stated) == 1 else ""
    place = LETTERS.find(letter) if letter else -1
    return place if place < choices else -1


def read_scienceqa(root: str, images: str | None = None) -> ScienceQa:
    """The test set below `root`; `images` is the folder of <pid>/image.png, else `images/test`.

    If LLaVA's file of questions is there too, its texts are asked. Otherwise they are built as
    scripts/convert_sqa_to_llava.py builds them in the format CQM-A.

    Raises:
        DataError: files are missing or damaged, or LLaVA's questions are others.
    """
    problems, paths = read_problems(root, images, SPLIT)
    llava = first_path(root, [LLAVA_QUESTIONS])
    texts = (
        {id: prompt_text(problem) for id, problem in problems.items()}
        if llava is None
        else _llava_texts(llava, problems)
    )
    questions = [
        Question(
            id=id,
            text=texts[id] + INSTRUCTION,
            images=(f"{id}/{problem['image']}",) if problem["image"] else (),
            kind=problem["subject"],
        )
        for id, problem in problems.items()
    ]
    records = [
        ScienceProblem(
            answer=row["answer"],
            choices=len(row["choices"]),
            has_hint=bool(row["hint"]),
            has_image=bool(row["image"]),
            subject=row["subject"],
            grade=int(row["grade"].removeprefix("grade")),
        )
        for row in problems.values()
    ]
    return ScienceQa("scienceqa", questions, records, paths["images"])


def read_problems(
    root: str, images: str | None, split: str
) -> tuple[dict[str, dict[str, Any]], dict[str, Path]]:
    """The problems of a split by their ids, in its order, and the paths of the files.

    Raises:
        DataError: files are missing or damaged; an id without a problem, or a problem whose answer
            is not the place of one of its choices.
    """
    wanted = {"problems": ["problems.json"], "splits": ["pid_splits.json"]}
    defaults = image_folder(images, f"images/{split}", split)
    paths = locate("ScienceQA", root, wanted | defaults, SOURCE)
    problems = read_object(paths["problems"], FIELDS)
    splits = read_json(paths["splits"])
    if not isinstance(splits, dict) or not isinstance(splits.get(split), list):
        raise DataError(
            f"{paths['splits']}: expected an object with an array of ids under {split!r}."
        )
    ids = [str(id) for id in splits[split]]
    wrong = [
        id
        for id in ids
        if id not in problems
        or problems[id]["answer"] not in range(min(len(problems[id]["choices"]), len(LETTERS)))
    ]
    if wrong:
        raise DataError(
            f"{paths['problems']}: problems of {split} that are missing or whose answer is not the "
            f"place of a choice {counted(wrong)}."
        )
    return {id: problems[id] for id in ids}, paths


def prompt_text(row: dict[str, Any]) -> str:
    """Context, question and options, as in LLaVA's convert_sqa_to_llava_base_prompt.py."""
    context = row["hint"].strip() or "N/A"
    options = " ".join(
        f"({letter}) {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False)
    )
    text = f"Context: {context}\nQuestion: {row['question']}\nOptions: {options}"
    return text.replace("  ", " ").strip()


def _llava_texts(path: Path, ids: Iterable[str]) -> dict[str, str]:
    rows = read_list(path, ("id", "conversations"))
    check_same(path, (row["id"] for row in rows), ids)
    return {
        row["id"]: row["conversations"][0]["value"].replace("<image>", "").strip() for row in rows
    }


MMBENCH_SOURCE = "https://github.com/open-compass/MMBench"
TABLES = (
    "mmbench_dev_20230712.tsv",
    "mmbench_dev_en_20231003.tsv",
    "mmbench_test_20230712.tsv",
    "mmbench_test_en_20231003.tsv",
)
OPTIONS = "ABCD"
MMBENCH_COLUMNS = ("index", "question", *OPTIONS, "image")
NOT_UPLOADED = {"hint", "category", "source", "image", "comment", "l2-category"}
PLACE_OF_PREDICTION = 6  # after index, question, A, B, C, D
NOTHING = {"", "nan", "none", "null", "na", "n/a"}  # missing to pandas, in LLaVA's scripts
LONGEST_CELL = 1 << 26  # characters; the csv module's own limit is less than an image


class MmBench(Unscored):
    """Records are the columns to upload, in their order."""

    note = (
        "MMBench's server scores it, at mmbench.opencompass.org.cn: "
        "save the table of predictions as .xlsx and upload that."
    )

    def __init__(
        self,
        questions: Sequence[Question],
        records: Sequence[dict[str, str]],
        images: dict[str, str],
        table: Path,
    ) -> None:
        super().__init__("mmbench", questions, records)
        self._images = images
        self._table = table

    def load_image(self, key: str) -> PIL.Image.Image:
        from dynmoe.image_files import decode_image

        where = f"{self._table}, row {key}"
        try:
            content = base64.b64decode(self._images[key])
        except binascii.Error as error:
            raise DataError(f"{where}: no image: {error}.") from None
        return decode_image(content, where)

    def write(self, folder: Path, answers: Sequence[str]) -> list[Path]:
        """The table that LLaVA's convert_mmbench_for_submission.py makes, tab separated."""
        columns = list(self.records[0])
        columns.insert(PLACE_OF_PREDICTION, "prediction")
        rows = [
            [(record | {"prediction": answer})[column] for column in columns]
            for _, record, answer in self.pairs(answers)
        ]
        text = io.StringIO()  # excel-tab quotes cells with tabs, quotes or line ends
        csv.writer(text, "excel-tab", lineterminator="\n").writerows([columns, *rows])
        return [write_text(folder / f"{self._table.stem}_predictions.tsv", text.getvalue())]


def read_mmbench(root: str, images: str | None = None) -> MmBench:
    """The first of `TABLES` below `root`, or the table `root` itself; it holds its images.

    Raises:
        DataError: no table, or one without the columns.
    """
    table = Path(root)
    if not table.is_file():
        table = locate("MMBench", root, {"table": TABLES}, MMBENCH_SOURCE)["table"]
    rows = _rows(table)
    questions, records, pictures = [], [], {}
    for row in rows:
        questions.append(Question(row["index"], _text(row), (row["index"],)))
        records.append({name: cell for name, cell in row.items() if name not in NOT_UPLOADED})
        pictures[row["index"]] = row["image"]
    return MmBench(questions, records, pictures, table)


def _rows(table: Path) -> list[dict[str, str]]:
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        rows = list(csv.reader(io.StringIO(read_text(table)), delimiter="\t"))
    except csv.Error as error:
        raise DataError(f"{table}: not a table: {error}.") from None
    finally:
        csv.field_size_limit(limit)
    header = rows[0] if rows else []
    missing = [field for field in MMBENCH_COLUMNS if field not in header]
    if missing:
        raise DataError(f"{table}: no column {', '.join(missing)}. Found {', '.join(header)}.")
    uneven = [number for number, row in enumerate(rows, start=1) if len(row) != len(header)]
    if uneven:
        raise DataError(
            f"{table}: expected {len(header)} columns, found {len(rows[uneven[0] - 1])} "
            f"in row {uneven[0]}. Fetch it again."
        )
    return [dict(zip(header, row, strict=True)) for row in rows[1:]]


def _text(row: dict[str, str]) -> str:
    """Hint, question, and the options up to the first that is nothing."""
    hint = row.get("hint", "")
    lines = [row["question"]] if hint.lower() in NOTHING else [hint, row["question"]]
    for letter in OPTIONS:
        if row[letter].lower() in NOTHING:
            break
        lines.append(f"{letter}. {row[letter]}")
    return "\n".join(lines) + INSTRUCTION
