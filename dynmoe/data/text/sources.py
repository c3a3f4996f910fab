"""The sources of a task's texts: TSV, Parquet, hub, package; all give the same examples."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import as_file, files
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dynmoe.data.text.sets import EMPTY, Loader, RawTexts, TextSet, as_text, text_set
from dynmoe.data.text.tasks import LABELLED, TESTS, GlueTask
from dynmoe.errors import DataError
from dynmoe.files import check_regular
from dynmoe.network import go_offline_if_unreachable
from dynmoe.questions.files import reading
from dynmoe.questions.values import unique_keys

if TYPE_CHECKING:
    import pyarrow

Source = Literal["hub", "tsv", "parquet", "embedded"]


class Sets(NamedTuple):
    """Train and dev, and those of the other sets asked for that the source has."""

    sets: dict[str, TextSet]
    warnings: list[str]


def read_sets(
    task: GlueTask,
    source: Source,
    root: str | None,
    names: Sequence[str] = (*LABELLED, *TESTS),
    skip_invalid: bool = False,
) -> Sets:
    """The sets `names` of a task, and warnings where their sizes are not the published ones.

    `skip_invalid` leaves out rows with unknown labels.

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
            labelled = name in LABELLED
            sets[name] = text_set(load(), task, labelled=labelled, skip_invalid=skip_invalid)
        except DataError as error:
            problems.append(str(error))
            continue
        # Published sets have a few empty texts.
        published = len(sets[name]) + sets[name].left_out.get(EMPTY, 0)
        if published != task.sizes[name]:
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
        return {name: partial(read_glosses, name) for name in ("train", "dev")}
    if source == "hub":
        return hub_loaders(task)
    if root is None or not Path(root).expanduser().is_dir():
        raise DataError(
            f"data.root: {'not given' if root is None else f'no folder {root}'}. "
            f"Give the folder of {task.title}'s files, or one that holds {task.title}/."
        )
    return (tsv_loaders if source == "tsv" else parquet_loaders)(task, Path(root).expanduser())


# Columns of a TSV or JSONL file, plain or .gz, without any quoting.
#
# NOTE: pandas (and `datasets`, which reads CSV with it) cannot do this: it reads a line that ends
# early as one with empty fields, refuses a line with more fields than the header, and ends a row at
# a carriage return within a text.


@dataclass(frozen=True)
class TextTable:
    """Columns of equal length; `row` numbers their lines from 0, counting the `dropped` ones too.

    A line is dropped if it ends before a column, or lacks its key, or says null.
    """

    columns: dict[str, list[str]]
    row: list[int]
    dropped: int

    def chosen(self, places: Sequence[int]) -> TextTable:
        """The lines at `places`, in that order."""
        columns = {key: [column[i] for i in places] for key, column in self.columns.items()}
        return TextTable(columns, [self.row[i] for i in places], self.dropped)

    def texts(self, where: Path | str, names: Sequence[str], label: str) -> RawTexts:
        """The columns `names` as texts, and the column `label` if there is one."""
        texts = [self.columns[name] for name in names]
        return RawTexts(str(where), texts, self.columns.get(label), self.row, self.dropped)


def first_file(candidates: Sequence[Path]) -> Path | None:
    """The first candidate that exists, itself or with .gz after its name, in any case."""
    for path in candidates:
        listed = {each.name: each for each in _listed(path.parent)}
        names = {name.lower(): name for name in reversed(sorted(listed))}
        for name in (path.name, f"{path.name}.gz"):
            if found := listed.get(name) or listed.get(names.get(name.lower(), "")):
                return found
    return None


def _listed(folder: Path) -> list[Path]:
    """Everything in a folder but folders: a pipe is refused when it is read."""
    return (
        [each for each in sorted(folder.iterdir()) if not each.is_dir()] if folder.is_dir() else []
    )


def read_table(
    path: Path,
    required: Sequence[str],
    optional: Sequence[str] = (),
    header: Sequence[str] | None = None,
) -> TextTable:
    """The named columns of a file.

    `header` names the columns of a TSV file whose first line does not.

    Raises:
        DataError: the file is damaged, not UTF-8, or lacks a required column.
    """
    names: Sequence[str]
    rows: Iterable[dict[str, Any]]
    with unpacking(path):
        if ".jsonl" in path.name.lower():
            rows = list(json_objects(path))
            names = list(rows[0]) if rows else []
        else:
            lines: Iterator[list[str]] = (line.split("\t") for line in lines_of(path))
            names = next(lines, [])
            _check_tabs(path, names, header or required)
            if header is not None and not set(required) <= set(names):
                names, lines = header, chain([list(names)], lines)
            rows = (dict(zip(names, fields, strict=False)) for fields in lines)
        if missing := [name for name in required if name not in names]:
            raise DataError(
                f"{path}: no column {', '.join(missing)}. "
                f"Found {', '.join(names) or 'an empty file'}."
            )
        if twice := [name for name in (*required, *optional) if list(names).count(name) > 1]:
            raise DataError(
                f"{path}: several columns are called {', '.join(twice)}. Keep one of each."
            )
        return _table(path, [*required, *(name for name in optional if name in names)], rows)


@contextmanager
def unpacking(path: Path) -> Iterator[None]:
    """`reading` of a file that gzip may have packed."""
    with reading(path):
        try:
            yield
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise DataError(f"{path}: damaged gzip file. Fetch or pack it again.") from None


def _check_tabs(path: Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Raises DataError if the first line is one cell that holds the wanted ones."""
    cells = "".join(names).replace('"', "").split(",") if len(names) == 1 else []
    if len(cells) > 1 and (set(wanted) & set(cells) or len(cells) >= len(wanted) > 1):
        raise DataError(
            f"{path}: expected columns separated by tabs, found commas: {names[0]!r:.80}. The "
            "separator of .tsv is a tab; write the file anew with tabs."
        )


def lines_of(path: Path, blank: bool = False) -> Iterator[str]:
    """Lines without their end, blank ones if asked for; only a line feed ends one, as texts may
    hold others."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", newline="\n") as lines:
        for line in lines:
            stripped = line.rstrip("\r\n")
            if stripped or blank:
                yield stripped


def json_objects(path: Path) -> Iterator[dict[str, Any]]:
    for line in lines_of(path):
        yield json_object(path, line)


def json_object(path: Path, line: str) -> dict[str, Any]:
    """Raises DataError, which names the file, if the line is none, or has a key twice."""
    try:
        return dict(json.loads(line, object_pairs_hook=unique_keys))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not one JSON object per line: {error}.") from None


def _table(where: Path, names: Sequence[str], rows: Iterable[dict[str, Any]]) -> TextTable:
    columns: list[list[str]] = [[] for _ in names]
    numbers: list[int] = []
    number = -1
    for number, row in enumerate(rows):
        values = [as_text(row.get(name), f"{where}, row {number}, {name}") for name in names]
        if None not in values:
            numbers.append(number)
            for column, value in zip(columns, values, strict=True):
                column.append(str(value))
    dropped = number + 1 - len(numbers)
    return TextTable(dict(zip(names, columns, strict=True)), numbers, dropped)


# GLUE as the official zips hold it: one folder per problem, tab separated, no quoting.
#
#     RTE/{train,dev,test}.tsv     MNLI/{train,dev_matched,dev_mismatched,...}.tsv     ...
#
# MRPC may also be the original corpus: msr_paraphrase_{train,test}.txt and mrpc_dev_ids.tsv.


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
    """Readers of the sets that are there; train and dev are always named, and raise if missing."""
    folder = task_folder(task, root)
    files = MNLI_FILES if task.name == "mnli" else FILES
    if task.name == "mrpc" and first_file([folder / MSR_FILES["train"]]):
        return {name: partial(_read_msr, task, folder, name) for name in FILES}
    loaders: dict[str, Loader] = {}
    for name, candidates in files.items():
        file = first_file([folder / candidate for candidate in candidates])
        if file is not None:
            loaders[name] = partial(_read_tsv, task, file)
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


def _read_tsv(task: GlueTask, file: Path) -> RawTexts:
    layout = LAYOUTS[task.name]
    table = read_table(file, layout.texts, (layout.label,), layout.header)
    return table.texts(file, layout.texts, layout.label)


def _missing(task: GlueTask, folder: Path, name: str) -> RawTexts:
    raise DataError(
        f"data.root: no file {folder / name} or {name}.gz. "
        f"Give the folder of {task.title}'s files, or one that holds {task.title}/."
    )


def _read_msr(task: GlueTask, folder: Path, name: str) -> RawTexts:
    """MRPC from the original corpus: GLUE's dev set is cut out of train by the list of ID pairs."""
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
        table = table.chosen(
            [i for i, pair in enumerate(id_pairs) if (pair in dev) == (name == "dev")]
        )
    return table.texts(file, layout.texts, layout.label)


# GLUE as the hub holds it: Parquet tables, local files or downloaded by `datasets`.

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
    """Readers of the sets that are there; train and dev are always named, and raise if missing."""
    folder = task_folder(task, root)
    loaders: dict[str, Loader] = {}
    for name, split in _splits(task).items():
        files = _files(folder, split)
        if files or name in ("train", "dev"):
            loaders[name] = partial(_read_parquet, task, folder, split, files)
    if task.name == "mnli" and (files := _files(folder.parent / "ax", "test")):
        loaders["ax"] = partial(_read_parquet, task, folder.parent / "ax", "test", files)
    return loaders


def hub_loaders(task: GlueTask) -> dict[str, Loader]:
    """Readers of the task from the hub, or from the cache of `datasets`; ax only when it is read.

    Raises:
        DataError: the task cannot be downloaded.
    """
    go_offline_if_unreachable()
    from datasets import load_dataset

    def fetch(name: str) -> Mapping[str, pyarrow.Table]:
        try:
            return {key: split.data.table for key, split in load_dataset(HUB, name).items()}
        except Exception as error:  # network, hub and cache errors share no base class
            raise DataError(
                f"data.source: hub: {HUB} ({name}) could not be downloaded: {error}\n"
                "Without network use data.source=tsv data.root=<folder of the official files>."
            ) from None

    tables = fetch(task.name)
    loaders: dict[str, Loader] = {
        name: partial(_raw_parquet, task, f"{HUB} {task.name} {split}", tables[split])
        for name, split in _splits(task).items()
    }
    if task.name == "mnli":
        loaders["ax"] = lambda: _raw_parquet(task, f"{HUB} ax test", fetch("ax")["test"])
    return loaders


def _splits(task: GlueTask) -> dict[str, str]:
    return MNLI_SPLITS if task.name == "mnli" else SPLITS


def _files(folder: Path, split: str) -> list[Path]:
    """All shards of a split: train-00000-of-00001.parquet, or one train.parquet; in any case."""
    files = [file for file in _listed(folder) if file.suffix.lower() == ".parquet"]
    shards = [file for file in files if file.stem.lower().startswith(f"{split}-")]
    return shards or [file for file in files if file.stem.lower() == split]


def _read_parquet(task: GlueTask, folder: Path, split: str, files: list[Path]) -> RawTexts:
    import pyarrow
    import pyarrow.parquet

    if not files:
        raise DataError(
            f"data.root: no file {folder}/{split}-*.parquet or {split}.parquet. "
            f"Give the folder of {task.title}'s files, or one that holds {task.name}/."
        )
    try:
        for file in files:
            check_regular(file)
        table = pyarrow.concat_tables([pyarrow.parquet.read_table(file) for file in files])
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{files[0]}: cannot be read as Parquet: {error}") from None
    return _raw_parquet(task, str(files[0]), table)


def _raw_parquet(task: GlueTask, where: str, table: pyarrow.Table) -> RawTexts:
    missing = [name for name in (*task.columns, "label") if name not in table.column_names]
    if missing:
        raise DataError(
            f"{where}: no column {', '.join(missing)}. Found {', '.join(table.column_names)}."
        )
    if "idx" not in table.column_names:
        table = table.append_column("idx", [range(len(table))])
    columns = [
        [as_text(v, f"{where}, row {n}, {name}") for n, v in enumerate(table[name].to_pylist())]
        for name in (*task.columns, "label")
    ]
    rows = zip(*columns, table["idx"].to_pylist(), strict=True)
    complete = [row for row in rows if None not in row]
    *texts, labels, index = map(list, zip(*complete, strict=True)) if complete else [[]] * 4
    return RawTexts(
        where=where,
        texts=texts[: len(task.columns)],
        labels=labels,
        index=index,
        dropped=len(table) - len(complete),
    )


def read_glosses(split: str) -> RawTexts:
    """Glosses: 4,800 noun definitions of WordNet 3.0, classified by topic; nothing to download.

    Made once from WordNet's data.noun: the label is the lexicographer file of the noun, one of ten;
    the text is its definition up to the first quoted example. Left out are definitions of less than
    4 or more than 40 words, with other quotes in them, that name their own topic, or that more than
    one topic has (in any case of letters). Sorted by the SHA-256 of the text, the first 80 of every
    topic are dev and the next 400 train. Licence: glosses.LICENSE.
    """
    with as_file(files("dynmoe.data.text") / "glosses.tsv.gz") as path:
        table = read_table(path, ("split", "label", "text"))
    table = table.chosen([i for i, name in enumerate(table.columns["split"]) if name == split])
    texts = table.texts(f"glosses {split}", ("text",), "label")
    return replace(texts, index=range(len(table.row)))
