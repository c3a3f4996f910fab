"""GLUE as the hub holds it: Parquet tables, local files or fetched by `datasets`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dynmoe.data.glue_tasks import GlueTask
from dynmoe.data.glue_tsv import task_folder
from dynmoe.data.text_sets import Loader, RawTexts
from dynmoe.errors import DataError

if TYPE_CHECKING:
    import pyarrow

HUB = "nyu-mll/glue"
SPLITS = {"train": "train", "dev": "validation", "test": "test"}
MNLI_SPLITS = {
    "train": "train",
    "dev": "validation_matched",
    "mismatched": "validation_mismatched",
    "test": "test_matched",
    "test_mismatched": "test_mismatched",
}


def parquet_loaders(task: GlueTask, root: Path) -> dict[str, Loader]:
    """What reads each set that is there; train and dev are always named, and raise if missing."""
    folder = task_folder(task, root)
    loaders: dict[str, Loader] = {}
    for name, split in _splits(task).items():
        files = _files(folder, split)
        if files or name in ("train", "dev"):
            loaders[name] = partial(_read, task, folder, split, files)
    if task.name == "mnli" and (files := _files(folder.parent / "ax", "test")):
        loaders["ax"] = partial(_read, task, folder.parent / "ax", "test", files)
    return loaders


def hub_loaders(task: GlueTask) -> dict[str, Loader]:
    """Fetches the task from the hub, or takes it from the cache of `datasets`; ax when it is read.

    Raises:
        DataError: it cannot be fetched.
    """
    from datasets import load_dataset

    def fetch(name: str) -> Mapping[str, pyarrow.Table]:
        try:
            return {key: split.data.table for key, split in load_dataset(HUB, name).items()}
        except Exception as error:  # network, hub and cache errors share no base class
            raise DataError(
                f"data.source: hub: {HUB} ({name}) could not be fetched: {error}\n"
                "Without network take data.source=tsv data.root=<folder of the official files>."
            ) from None

    tables = fetch(task.name)
    loaders: dict[str, Loader] = {
        name: partial(_raw, task, f"{HUB} {task.name} {split}", tables[split])
        for name, split in _splits(task).items()
    }
    if task.name == "mnli":
        loaders["ax"] = lambda: _raw(task, f"{HUB} ax test", fetch("ax")["test"])
    return loaders


def _splits(task: GlueTask) -> dict[str, str]:
    return MNLI_SPLITS if task.name == "mnli" else SPLITS


def _files(folder: Path, split: str) -> list[Path]:
    """All shards of a split: train-00000-of-00001.parquet, or one train.parquet."""
    return sorted(folder.glob(f"{split}-*.parquet")) or sorted(folder.glob(f"{split}.parquet"))


def _read(task: GlueTask, folder: Path, split: str, files: list[Path]) -> RawTexts:
    import pyarrow
    import pyarrow.parquet

    if not files:
        raise DataError(
            f"data.root: no file {folder}/{split}-*.parquet or {split}.parquet. "
            f"Give the folder of {task.title}'s files, or one that holds {task.name}/."
        )
    try:
        table = pyarrow.concat_tables([pyarrow.parquet.read_table(file) for file in files])
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{files[0]}: cannot be read as Parquet: {error}") from None
    return _raw(task, str(files[0]), table)


def _raw(task: GlueTask, where: str, table: pyarrow.Table) -> RawTexts:
    missing = [name for name in (*task.columns, "label") if name not in table.column_names]
    if missing:
        raise DataError(
            f"{where}: no column {', '.join(missing)}. Found {', '.join(table.column_names)}."
        )
    if "idx" not in table.column_names:
        table = table.append_column("idx", [range(len(table))])
    complete = table.select([*task.columns, "label", "idx"]).drop_null()
    return RawTexts(
        where=where,
        texts=[complete[name].to_pylist() for name in task.columns],
        labels=complete["label"].to_pylist(),
        index=complete["idx"].to_pylist(),
        dropped=len(table) - len(complete),
    )
