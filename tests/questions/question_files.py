"""Writes small sets in their published formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image


def put(file: Path, content: Any) -> Path:
    """Text as it is, other content as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    file.write_bytes(text.encode())
    return file


def put_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    return put(file, "".join(json.dumps(row) + "\n" for row in rows))


def picture(file: Path, colour: str = "red") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 1), colour).save(file)
    return file


def read_lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]
