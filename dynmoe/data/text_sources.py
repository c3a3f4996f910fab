"""Where the texts of a task come from; every source gives the same examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from dynmoe.data.glosses import gloss_loaders
from dynmoe.data.glue_parquet import hub_loaders, parquet_loaders
from dynmoe.data.glue_tasks import LABELLED, TESTS, GlueTask
from dynmoe.data.glue_tsv import tsv_loaders
from dynmoe.data.text_sets import Loader, TextSet, text_set
from dynmoe.errors import DataError

Source = Literal["hub", "tsv", "parquet", "embedded"]


class Sets(NamedTuple):
    """Of the sets asked for: train and dev, and those of the others that the source has."""

    sets: dict[str, TextSet]
    warnings: list[str]


def read(
    task: GlueTask,
    source: Source,
    root: str | None,
    names: Sequence[str] = (*LABELLED, *TESTS),
) -> Sets:
    """The sets `names` of a task, and warnings where their sizes are not the published ones.

    Raises:
        DataError: lists every problem of every set.
    """
    sets: dict[str, TextSet] = {}
    warnings: list[str] = []
    problems: list[str] = []
    for name, load in _loaders(task, source, root).items():
        if name not in names:
            continue
        try:
            raw = load()
            sets[name] = text_set(raw, task, labelled=name in LABELLED)
        except DataError as error:
            problems.append(str(error))
            continue
        if raw.dropped:
            rows = "row" if raw.dropped == 1 else "rows"
            warnings.append(
                f"{task.title} {name}: dropped {raw.dropped:,} {rows} with missing fields"
            )
        if len(sets[name]) != task.sizes[name]:
            warnings.append(
                f"{task.title} {name}: expected {task.sizes[name]:,} rows, "
                f"found {len(sets[name]):,}"
            )
    if problems:
        raise DataError("\n".join([f"{task.title} cannot be read:", *problems]))
    return Sets(sets, warnings)


def _loaders(task: GlueTask, source: Source, root: str | None) -> dict[str, Loader]:
    if (source == "embedded") != (task.name == "glosses"):
        raise DataError(
            f"data.source: {source} does not hold {task.title}. "
            "The package embeds Glosses only (data=glosses); GLUE comes from tsv, parquet or hub."
        )
    if source == "embedded":
        return gloss_loaders()
    if source == "hub":
        return hub_loaders(task)
    if root is None or not Path(root).is_dir():
        raise DataError(
            f"data.root: {'not given' if root is None else f'no folder {root}'}. "
            f"Give the folder of {task.title}'s files, or one that holds {task.title}/."
        )
    return (tsv_loaders if source == "tsv" else parquet_loaders)(task, Path(root))
