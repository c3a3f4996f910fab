"""GLUE as the official zips hold it: one folder per problem, tab separated, no quoting.

    RTE/{train,dev,test}.tsv     MNLI/{train,dev_matched,dev_mismatched,...}.tsv     ...

MRPC may also be the original corpus: msr_paraphrase_{train,test}.txt and mrpc_dev_ids.tsv.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

from dynmoe.data.glue_tasks import GlueTask
from dynmoe.data.text_sets import Loader, RawTexts
from dynmoe.data.text_tables import Table, first_file, read_table
from dynmoe.errors import DataError


class Layout(NamedTuple):
    """Columns of the files; `header` names them where the first line does not."""

    texts: tuple[str, ...]
    label: str
    header: tuple[str, ...] | None = None


PAIR = ("sentence1", "sentence2")
LAYOUTS = {
    "cola": Layout(("sentence",), "label", ("source", "label", "original_label", "sentence")),
    "sst2": Layout(("sentence",), "label"),
    "mrpc": Layout(("#1 String", "#2 String"), "Quality"),
    "qqp": Layout(("question1", "question2"), "is_duplicate"),
    "stsb": Layout(PAIR, "score"),
    "mnli": Layout(PAIR, "gold_label"),
    "qnli": Layout(("question", "sentence"), "label"),
    "rte": Layout(PAIR, "label"),
    "wnli": Layout(PAIR, "label"),
}
FILES = {"train": ("train.tsv",), "dev": ("dev.tsv",), "test": ("test.tsv",)}
MNLI_FILES = {
    "train": ("train.tsv",),
    "dev": ("dev_matched.tsv",),
    "mismatched": ("dev_mismatched.tsv",),
    "test": ("test_matched.tsv",),
    "test_mismatched": ("test_mismatched.tsv",),
    "ax": (
        "diagnostic.tsv",
        "diagnostic/diagnostic.tsv",
        "AX.tsv",
        "../diagnostic/diagnostic.tsv",
        "../AX.tsv",
    ),
}
MSR_FILES = {"train": "msr_paraphrase_train.txt", "test": "msr_paraphrase_test.txt"}
MSR_DEV_IDS = "mrpc_dev_ids.tsv"


def tsv_loaders(task: GlueTask, root: Path) -> dict[str, Loader]:
    """What reads each set that is there; train and dev are always named, and raise if missing."""
    folder = task_folder(task, root)
    files = MNLI_FILES if task.name == "mnli" else FILES
    if task.name == "mrpc" and first_file([folder / MSR_FILES["train"]]):
        return {name: partial(_msr, task, folder, name) for name in FILES}
    loaders: dict[str, Loader] = {}
    for name, candidates in files.items():
        file = first_file([folder / candidate for candidate in candidates])
        if file is not None:
            loaders[name] = partial(_read, task, file)
        elif name in ("train", "dev"):
            loaders[name] = partial(_missing, task, folder, candidates[0])
    return loaders


def task_folder(task: GlueTask, root: Path) -> Path:
    """`root` itself or the folder of the task's name below it, in any case: SST-2, sst2."""
    if root.is_dir():
        for entry in sorted(root.iterdir()):
            if entry.is_dir() and entry.name.lower().replace("-", "") == task.name:
                return entry
    return root


def _read(task: GlueTask, file: Path) -> RawTexts:
    layout = LAYOUTS[task.name]
    return _raw(layout, file, read_table(file, layout.texts, (layout.label,), layout.header))


def _raw(layout: Layout, file: Path, table: Table) -> RawTexts:
    return RawTexts(
        where=str(file),
        texts=[table.columns[name] for name in layout.texts],
        labels=table.columns.get(layout.label),
        index=table.row,
        dropped=table.dropped,
    )


def _missing(task: GlueTask, folder: Path, name: str) -> RawTexts:
    raise DataError(
        f"data.root: no file {folder / name} or {name}.gz. "
        f"Give the folder of {task.title}'s files, or one that holds {task.title}/."
    )


def _msr(task: GlueTask, folder: Path, name: str) -> RawTexts:
    """The original corpus: GLUE's dev set is cut out of train by the list of ID pairs."""
    file = first_file([folder / MSR_FILES["test" if name == "test" else "train"]])
    ids = first_file([folder / MSR_DEV_IDS])
    if file is None or (ids is None and name != "test"):
        return _missing(task, folder, MSR_FILES["test"] if file is None else MSR_DEV_IDS)
    layout = LAYOUTS[task.name]
    table = read_table(file, (*layout.texts, layout.label, "#1 ID", "#2 ID"))
    if ids is not None and name != "test":
        pairs = read_table(ids, ("first", "second"), header=("first", "second")).columns
        dev = set(zip(pairs["first"], pairs["second"], strict=True))
        id_pairs = zip(table.columns["#1 ID"], table.columns["#2 ID"], strict=True)
        chosen = [i for i, pair in enumerate(id_pairs) if (pair in dev) == (name == "dev")]
        table = Table(
            {key: [column[i] for i in chosen] for key, column in table.columns.items()},
            [table.row[i] for i in chosen],
            table.dropped,
        )
    return _raw(layout, file, table)
