"""MMBench (Liu et al., ECCV 2024): questions with options, images as base64 in a table.

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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynmoe.errors import DataError
from dynmoe.questions.base import Question, Unscored, write_table
from dynmoe.questions.files import locate, read_text
from dynmoe.questions.scienceqa import INSTRUCTION

if TYPE_CHECKING:
    import PIL.Image

SOURCE = "https://github.com/open-compass/MMBench"
TABLES = (
    "mmbench_dev_20230712.tsv",
    "mmbench_dev_en_20231003.tsv",
    "mmbench_test_20230712.tsv",
    "mmbench_test_en_20231003.tsv",
)
LETTERS = "ABCD"
FIELDS = ("index", "question", *LETTERS, "image")
NOT_UPLOADED = {"hint", "category", "source", "image", "comment", "l2-category"}
PLACE_OF_PREDICTION = 6  # after index, question, A, B, C, D
NOTHING = {
    "",
    "nan",
    "none",
    "null",
    "na",
    "n/a",
}  # cells that pandas, in LLaVA's scripts, reads as missing
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
        from PIL import Image

        try:
            with Image.open(io.BytesIO(base64.b64decode(self._images[key]))) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, binascii.Error) as error:
            raise DataError(f"{self._table}: no image in row {key}: {error}.") from None

    def write(self, folder: Path, answers: Sequence[str]) -> list[Path]:
        """The table that LLaVA's convert_mmbench_for_submission.py makes, tab separated."""
        columns = list(self.records[0])
        columns.insert(PLACE_OF_PREDICTION, "prediction")
        rows = [
            [(record | {"prediction": answer})[column] for column in columns]
            for _, record, answer in self.pairs(answers)
        ]
        return [write_table(folder / f"{self._table.stem}_predictions.tsv", columns, rows)]


def read_mmbench(root: str, images: str | None = None) -> MmBench:
    """The first of `TABLES` below `root`, or the table `root` itself; it holds its images.

    Raises:
        DataError: no table, or one without the columns.
    """
    table = Path(root)
    if not table.is_file():
        table = locate("MMBench", root, {"table": TABLES}, SOURCE)["table"]
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
    missing = [field for field in FIELDS if field not in header]
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
    for letter in LETTERS:
        if row[letter].lower() in NOTHING:
            break
        lines.append(f"{letter}. {row[letter]}")
    return "\n".join(lines) + INSTRUCTION
