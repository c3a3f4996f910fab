"""Writing prediction files, and the one that LLaVA's evaluation scripts share."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MODEL = "dynmoe"
"""What the files name as the model."""


def write_json(file: Path, content: Any, indent: int | None = None) -> Path:
    return _write(file, json.dumps(content, ensure_ascii=False, indent=indent))


def write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    return _write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(file: Path, lines: Iterable[str]) -> Path:
    return _write(file, "".join(f"{line}\n" for line in lines))


def write_table(file: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Path:
    """Tab separated; quoted where a cell holds tabs, quotes or line ends."""
    text = io.StringIO()
    csv.writer(text, "excel-tab", lineterminator="\n").writerows([header, *rows])
    return _write(file, text.getvalue())


def answer_row(question_id: Any, prompt: str, text: str) -> dict[str, Any]:
    """A line of LLaVA's answers file, as llava/eval/model_vqa.py writes it."""
    return {
        "question_id": question_id,
        "prompt": prompt,
        "text": text,
        "answer_id": str(question_id),  # any string; LLaVA's is random
        "model_id": MODEL,
        "metadata": {},
    }


def _write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8", newline="\n")
    return file
