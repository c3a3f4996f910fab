"""MME (Fu et al., arXiv 2306.13394): two questions, yes or no, about every image of 14 tasks.

    <task>/0020.png and <task>/0020.txt, or
    <task>/images/0020.png and <task>/questions_answers_YN/0020.txt

Each text has two lines: question, tab, Yes or No. Made up:

    Is there a dog in this image? Please answer yes or no.\\tYes
    Is there a cat in this image? Please answer yes or no.\\tNo

The first prompt is "Is there a dog in this image?\\nAnswer the question using a single word or
phrase.". Points are those of MME's calculation.py (eval_tool).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dynmoe.errors import DataError
from dynmoe.questions.base import FolderSet, Question, mean, write_text
from dynmoe.questions.files import first_path, locate, read_text
from dynmoe.questions.vqa import INSTRUCTION

SOURCE = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = (
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)
FOLDERS = (
    "",
    "MME_Benchmark_release_version/MME_Benchmark/",
    "MME_Benchmark_release_version/",
    "MME_Benchmark/",
)
YES_NO = "Please answer yes or no."
POINTS_OF_A_TASK = 200  # 100 for accuracy, 100 for accuracy+


class Truth(NamedTuple):
    """Record of a question: the first columns of its line in the task's results file."""

    image: str
    question: str
    answer: str


class Mme(FolderSet):
    """Records are `Truth`s, a question's kind is its task. Two in a row share an image."""

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """Points of perception, of cognition and of each task; "score" is perception / 2000.

        A task has 100 x (accuracy + accuracy+); the latter is the share of images of which both
        questions are answered rightly.
        """
        right: dict[str, list[bool]] = {}
        for question, truth, answer in self.pairs(answers):
            correct = parse_answer(answer) == truth.answer.lower()
            right.setdefault(question.kind, []).append(correct)
        points = {
            task: 100 * (mean(values) + mean([a and b for a, b in _in_twos(values)]))
            for task, values in right.items()
        }
        perception = sum(points[task] for task in PERCEPTION)
        return {
            "score": perception / (POINTS_OF_A_TASK * len(PERCEPTION)),
            "perception_points": perception,
            "cognition_points": sum(points[task] for task in COGNITION),
            **{f"{task.lower()}_points": value for task, value in points.items()},
        }

    def write(self, folder: Path, answers: Sequence[str]) -> list[Path]:
        """`<task>.txt`, as calculation.py reads it: image, question, truth, answer, by tabs."""
        lines: dict[str, list[str]] = {}
        for question, truth, answer in self.pairs(answers):
            lines.setdefault(question.kind, []).append("\t".join([*truth, _one_line(answer)]))
        return [write_text(folder / f"{task}.txt", rows) for task, rows in lines.items()]


def parse_answer(answer: str) -> str:
    """yes, no or other: what the first four characters hold, yes before no."""
    beginning = _one_line(answer).lower()[:4]
    return next((word for word in ("yes", "no") if word in beginning), "other")


def _one_line(answer: str) -> str:
    return " ".join(answer.split())


def read_mme(root: str, images: str | None = None) -> Mme:
    """The 14 tasks' folders below `root`; `images` holds the same folders if images are elsewhere.

    A prompt is the question without "Please answer yes or no.", and with LLaVA's instruction.

    Raises:
        DataError: tasks or images are missing, or a text is not two questions.
    """
    wanted = {task: [f"{folder}{task}" for folder in FOLDERS] for task in (*PERCEPTION, *COGNITION)}
    paths = locate("MME", root, wanted, SOURCE)
    image_root = paths[PERCEPTION[0]].parent if images is None else Path(images)
    pairs: list[tuple[Question, Truth]] = []
    problems: list[str] = []
    for task, folder in paths.items():
        names = _image_names(image_root, task)
        files = sorted((first_path(folder, ["questions_answers_YN"]) or folder).glob("*.txt"))
        if not files:
            problems.append(f"  {folder}: no texts")
        for file in files:
            rows = [line.split("\t") for line in read_text(file).split("\n") if line.strip()]
            if file.stem not in names:
                problems.append(f"  {file}: no image {file.stem} in {image_root / task}")
            elif not _are_two_questions(rows):
                problems.append(f"  {file}: expected two lines: question, tab, Yes or No")
            else:
                pairs += _pairs(task, file.stem, names[file.stem], rows)
    if problems:
        raise DataError("\n".join(["MME cannot be read:", *problems]))
    questions, truths = zip(*pairs, strict=True)
    return Mme("mme", questions, truths, image_root)


def _pairs(
    task: str, stem: str, image: str, rows: Sequence[Sequence[str]]
) -> Iterator[tuple[Question, Truth]]:
    for number, (text, answer) in enumerate(rows):
        asked = text.replace(YES_NO, "").strip() + INSTRUCTION
        truth = Truth(Path(image).name, text, answer.strip())
        yield Question(f"{task}/{stem}/{number}", asked, (image,), task), truth


def _image_names(root: Path, task: str) -> dict[str, str]:
    """Paths below `root` of a task's images by their stems."""
    folder = first_path(root / task, ["images"]) or root / task
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {
        file.stem: str(file.relative_to(root))
        for file in files
        if file.suffix.lower() in (".jpg", ".jpeg", ".png")
    }


def _are_two_questions(rows: Sequence[Sequence[str]]) -> bool:
    return len(rows) == 2 and all(
        len(row) == 2 and row[1].strip().lower() in ("yes", "no") for row in rows
    )


def _in_twos(values: Sequence[bool]) -> Iterator[tuple[bool, bool]]:
    return zip(values[::2], values[1::2], strict=True)
