"""Rules of runs on texts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec

from omegaconf import DictConfig

from dynmoe.config.reading import modality, read
from dynmoe.data.text.tasks import LABELLED, TASKS, TESTS

OWN_SETS = (*LABELLED, "heldout", *TESTS)


def text_run(cfg: DictConfig) -> Iterator[str]:
    """What a run on texts needs beside its keys."""
    if modality(cfg, "task.module") != "text" or modality(cfg, "data") != "text":
        return
    missing = [name for name in ("transformers", "datasets") if find_spec(name) is None]
    if missing:
        yield f'task: needs {" and ".join(missing)}: pip install "dynmoe[language]"'
    source, root = read(cfg, "data.source", str), read(cfg, "data.root", str)
    if source in ("tsv", "parquet") and root is None:
        yield f"data.root: data.source={source} needs the folder of the files: data.root=FOLDER"
    if source in ("hub", "embedded") and root is not None:
        yield f"data.root: data.source={source} reads no folder. Add data.source=tsv or parquet"
    ood, ood_root = read(cfg, "data.ood", list), read(cfg, "data.ood_root", str)
    if ood and ood_root is None:
        yield f"data.ood_root: data.ood={ood} needs the folder of their files: data.ood_root=FOLDER"
    for name in map(str, ood or ()):
        if name in OWN_SETS:
            yield f"data.ood: {name} is a set of the task itself. Take another name"
        elif not re.fullmatch(r"[\w-]+", name, re.ASCII):
            yield f"data.ood: expected a name of letters, digits, _ and -, found '{name}'"
    task = TASKS.get(read(cfg, "data.task", str) or "")
    if read(cfg, "data.linear_baseline", bool) and task is not None and task.regression:
        yield "data.linear_baseline: tells classes apart, this task has none. Set it to false"


RULES = (text_run,)
