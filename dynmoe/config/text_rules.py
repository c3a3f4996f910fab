"""Rules of runs on texts."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig

from dynmoe.config.reading import modality, read


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
    path = read(cfg, "backbone.path", str)
    if path is not None and not (Path(path).expanduser() / "config.json").is_file():
        yield f"backbone.path: expected a folder with a config.json, found none in '{path}'"
    if read(cfg, "hparams_seed", int):
        yield "hparams_seed: draws DomainBed's hyper-parameters. Sweep task.optimizer.lr instead"


def selection_fits(cfg: DictConfig) -> Iterator[str]:
    selection, kind = read(cfg, "task.selection", str), modality(cfg, "task.module")
    of_texts = selection in ("best_dev", "heldout")
    if selection is None or kind is None:
        return
    if of_texts != (kind == "text"):
        fix = "protocol=glue or glue_heldout" if kind == "text" else "protocol=domainbed"
        yield f"task.selection: {selection} is not for a task on {kind}. Choose {fix}."
    elif selection == "heldout" and read(cfg, "protocol.holdout_fraction", float) == 0:
        yield (
            "protocol.holdout_fraction: 0 leaves nothing to select by. "
            "Set a share, e.g. 0.1, or task.selection=best_dev"
        )


RULES = (text_run, selection_fits)
