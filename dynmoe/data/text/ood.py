"""Out-of-distribution sets: texts of other sources, with labels mapped to those of a task.

The sets are those of GLUE-X (Yang et al., ACL 2023). Each is read from its published files below
`data.ood_root`, or below a folder of its name there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from dynmoe.data.text.sets import TextSet, text_set
from dynmoe.data.text.sources import first_file, read_table
from dynmoe.data.text.tasks import GlueTask
from dynmoe.errors import DataError

# The classes of tasks that a class of a set means: the first of them that the task has.
ENTAILED = ("entailment",)
NEUTRAL = ("neutral", "not_entailment")
CONTRADICTED = ("contradiction", "not_entailment")
NOT_ENTAILED = ("not_entailment",)
SAME = ("equivalent", "duplicate")
DIFFERENT = ("not_equivalent", "not_duplicate")
UNDECIDED = ()  # the annotators did not agree: the example is left out

Classes = tuple[str, ...]
VOTES: tuple[Classes, ...] = (*[DIFFERENT] * 3, UNDECIDED, *[SAME] * 3)


@dataclass(frozen=True)
class OodSet:
    """The published form of a set.

    `columns` are the two texts and the label; `header` names a TSV file's columns where its first
    line does not; `only` is a column, and the value that rows must have there if it exists.
    """

    tasks: tuple[str, ...]
    files: tuple[str, ...]
    columns: tuple[str, str, str]
    labels: Mapping[str, Classes]
    header: tuple[str, ...] | None = None
    only: tuple[str, str] | None = None


NLI: dict[str, Classes] = {
    "entailment": ENTAILED,
    "neutral": NEUTRAL,
    "contradiction": CONTRADICTED,
    "-": UNDECIDED,
}

OOD = {
    "scitail": OodSet(
        tasks=("rte",),
        files=("scitail_1.0_test.tsv", "tsv_format/scitail_1.0_test.tsv"),
        columns=("premise", "hypothesis", "label"),
        labels={"entails": ENTAILED, "neutral": NOT_ENTAILED},
        header=("premise", "hypothesis", "label"),
    ),
    "hans": OodSet(
        tasks=("rte",),
        files=("heuristics_evaluation_set.txt", "heuristics_evaluation_set.jsonl"),
        columns=("sentence1", "sentence2", "gold_label"),
        labels={"entailment": ENTAILED, "non-entailment": NOT_ENTAILED},
    ),
    "snli": OodSet(
        tasks=("mnli", "rte"),
        files=("snli_1.0_test.txt", "snli_1.0_test.jsonl"),
        columns=("sentence1", "sentence2", "gold_label"),
        labels=NLI,
    ),
    "sick": OodSet(
        tasks=("mnli", "rte"),
        files=("SICK.txt",),
        columns=("sentence_A", "sentence_B", "entailment_label"),
        labels={word.upper(): classes for word, classes in NLI.items() if classes},
        only=("SemEval_set", "TEST"),
    ),
    "qqp": OodSet(
        tasks=("mrpc",),
        files=("dev.tsv",),
        columns=("question1", "question2", "is_duplicate"),
        labels={"1": SAME, "0": DIFFERENT},
    ),
    "twitter": OodSet(  # how many of six annotators saw a paraphrase
        tasks=("mrpc", "qqp"),
        files=("Twitter_URL_Corpus_test.txt",),
        columns=("sentence1", "sentence2", "votes"),
        labels={
            f"({n},{space}6)": classes for n, classes in enumerate(VOTES) for space in ("", " ")
        },
        header=("sentence1", "sentence2", "votes", "url"),
    ),
}


def read_ood(name: str, root: str | None, task: GlueTask, skip_invalid: bool = False) -> TextSet:
    """A set of `OOD`, or the file `<root>/<name>.tsv` or `.jsonl` with the task's columns + label.

    `skip_invalid` leaves out rows with unknown labels.

    Raises:
        DataError: no such file, damaged, or a set that does not fit the task.
    """
    if root is None or not Path(root).expanduser().is_dir():
        raise DataError(
            f"data.ood_root: {'not given' if root is None else f'no folder {root}'}. "
            f"Give the folder that holds the files of {name}."
        )
    above = Path(root).expanduser()
    own = [above / f"{name}{suffix}" for suffix in (".tsv", ".jsonl")]
    if file := first_file(own):
        table = read_table(file, (*task.columns, "label"))
        raw = table.texts(file, task.columns, "label")
        return text_set(raw, task, labelled=True, skip_invalid=skip_invalid)
    if name not in OOD:
        raise DataError(
            f"data.ood: {name} is neither one of {', '.join(OOD)} nor a file: no {own[0]} or "
            f"{own[1].name}, with columns {', '.join(task.columns)}, label."
        )
    published = OOD[name]
    if task.name not in published.tasks:
        fitting = [each for each, other in OOD.items() if task.name in other.tasks]
        choices = [", ".join(fitting), f"a file with columns {', '.join(task.columns)}, label"]
        raise DataError(
            f"data.ood: {name} fits {' and '.join(published.tasks)}, not {task.name}: "
            f"{_misfit(published, task)}. For {task.name} take "
            f"{' or '.join(filter(None, choices))}."
        )
    # SciTailV1.1/ or snli_1.0/ below `root`, then `root` itself.
    below = [entry for entry in sorted(above.iterdir()) if entry.is_dir()]
    folders = [*(each for each in below if each.name.lower().startswith(name)), above]
    file = first_file([folder / each for folder, each in product(folders, published.files)])
    if file is None:
        raise DataError(
            f"data.ood_root: no file {' or '.join(published.files)} of {name} in "
            f"{' or '.join(map(str, folders))}."
        )
    return _published(published, file, task, skip_invalid)


def _misfit(published: OodSet, task: GlueTask) -> str:
    for classes in published.labels.values():
        if classes and not set(classes) & set(task.labels):
            return f"its class {' or '.join(classes)} is none of {task.name}'s"
    return "its labels mean something else"


def _published(published: OodSet, file: Path, task: GlueTask, skip_invalid: bool) -> TextSet:
    *text_columns, label = published.columns
    only = published.only
    optional = (only[0],) if only else ()
    table = read_table(file, published.columns, optional, published.header)
    numbers = {
        word: next(task.labels.index(name) for name in classes if name in task.labels)
        for word, classes in published.labels.items()
        if classes
    }
    undecided = published.labels.keys() - numbers.keys()
    if only is not None and only[0] in table.columns:
        table = table.chosen([i for i, v in enumerate(table.columns[only[0]]) if v == only[1]])
    raw = table.texts(file, text_columns, label)
    decided = replace(task, undecided=tuple(undecided))
    return text_set(raw, decided, labelled=True, known=numbers, skip_invalid=skip_invalid)
