"""What conversations and questions look like on the whole: a table, and a typical one."""

from __future__ import annotations

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dynmoe.data.protocol import IntArray
from dynmoe.data.vl_questions import AskedQuestions
from dynmoe.data.vl_store import TokenStore


def print_overview(
    title: str, store: TokenStore | None, asked: AskedQuestions, console: Console | None
) -> None:
    """Conversations, if there are any, and questions: their tokens and images."""
    table = Table(title=title)
    for column in ("", "rows", "with images", "mean tokens", "longest"):
        table.add_column(column, justify="right" if column else "left")
    rows: list[tuple[str, IntArray, IntArray]] = []
    if store is not None:
        rows.append(("train", store.num_images, store.lengths))
    for name, questions in asked.sets.items():
        images = np.array([len(question.images) for question in questions.questions])
        rows.append((name, images, asked.lengths[name]))
    for name, images, lengths in rows:
        table.add_row(
            name,
            str(len(lengths)),
            str(int((images > 0).sum())),
            f"{lengths.mean():.1f}",
            str(lengths.max()),
        )
    (console or Console()).print(table)


def sample_of(
    mean_tokens: float, answer_tokens: float, patches: int, px: int
) -> tuple[dict[str, Tensor], Tensor]:
    """A vision-language model's inputs for one conversation with one image of `patches` tokens."""
    length = max(patches + 1, round(mean_tokens))
    tokens = {
        "input_ids": torch.zeros(1, length, dtype=torch.long),
        "image_mask": torch.arange(length)[None] < patches,
        "images": torch.zeros(1, 3, px, px),
    }  # without a mask nothing depends on data
    return tokens, torch.zeros(max(1, round(answer_tokens)), dtype=torch.long)
