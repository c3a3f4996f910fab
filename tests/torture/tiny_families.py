"""A tiny run of each family, as a command, and all that it leaves that has to be equal."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_lm import LLAMA, TINY_LM, write_corpus
from tiny_runs import TINY_DYNMOE, forty_images
from tiny_texts import FEW_EXPERTS, TINY_TEXT, write_rte
from tiny_vl import SHORT_WINDOWS, TINY_VL

from dynmoe.records import LOCKS, RecordError, RunFolder

MEASURED = {"step_time", "eval_time", "mem_gb", "seconds"}


@dataclass(frozen=True)
class Family:
    name: str
    arguments: tuple[str, ...]
    ranks: int = 1


def families(data: Path) -> dict[str, Family]:
    """The families by name; their data are written below `data`."""
    texts, corpus = data / "glue", data / "corpus"
    write_rte(texts)
    write_corpus(corpus)
    folders = (text for text in forty_images(data / "images") if not text.startswith("task."))
    vision = (
        *(text for text in TINY_DYNMOE if not text.startswith("logger=")),
        *folders,
        *("logger=csv", "task.eval_every=2", "trainer.log_every_n_steps=1", "data.workers=0"),
    )
    mixed = ("mixing=dynamic", "mixing.every=2", "mixing.probe_tokens=40", "mixing.eta=50")
    glue = (*TINY_TEXT, "data=rte", f"data.root={texts}", "moe=dynmoe_glue", *FEW_EXPERTS)
    lm = (*TINY_LM, f"data.root={corpus}", *FEW_EXPERTS, "moe.layers=all", *LLAMA)
    vl = (*TINY_VL, *SHORT_WINDOWS)
    ddp = ("trainer=ddp", "trainer.devices=2")
    found = [
        Family("vision", vision),
        Family("mixed", (*vision, *mixed)),
        Family("language", glue),
        Family("lm", lm),
        Family("vl", vl),
        Family("ddp", (*vision, *ddp), ranks=2),
    ]
    return {family.name: family for family in found}


def runs(outputs: Path) -> list[RunFolder]:
    """The run folders of a command, by name."""
    folders = (path for path in outputs.glob("*/*/") if path.name != LOCKS)
    return [RunFolder(path) for path in sorted(folders)]


def traces(outputs: Path) -> dict[str, Any]:
    """All that a finished command leaves, by run and kind: records, weights, optimizer, logs."""
    found: dict[str, Any] = {}
    for run in runs(outputs):
        for kind in ("results", "routing", "events", "examples", "mixing"):
            found[f"{run.path.name}/{kind}"] = _records(run, kind)
        for file in sorted((run.path / "checkpoints").glob("*.ckpt")):
            found[f"{run.path.name}/{file.name}"] = digest(file)
        found[f"{run.path.name}/csv"] = dict(sorted(logged(run.path)))
        found[f"{run.path.name}/state"] = run.state
    return found


def _records(run: RunFolder, kind: Any) -> list[dict[str, Any]] | str:
    try:
        return [without_time(record) for record in run.read(kind)]
    except RecordError as error:
        return f"cannot be read: {error!s:.60}"


def without_time(record: Mapping[str, Any]) -> dict[str, Any]:
    # repr: NaN is equal to itself then.
    return {key: repr(value) for key, value in record.items() if key not in MEASURED}


def logged(run: Path) -> Iterator[tuple[str, str]]:
    """The numbers in the CSV files; a later start is right about a step."""
    for file in sorted(run.glob("csv/*/metrics.csv")):
        with file.open() as lines:
            for row in csv.DictReader(lines):
                yield from ((f"{row['step']} {k}", v) for k, v in row.items() if v and k != "epoch")


def digest(file: Path) -> str:
    """A hash of the weights and of what the training goes on from."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        return f"cannot be read: {error!s:.60}"
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "loss_window")
    content = hashlib.blake2b()
    for part in parts:
        _feed(content, state.get(part))
    return content.hexdigest()


def _feed(content: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        content.update(value.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in value:
            content.update(str(key).encode())
            _feed(content, value[key])
    elif isinstance(value, list | tuple):
        for each in value:
            _feed(content, each)
    else:
        content.update(repr(value).encode())


def difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """What differs; empty where nothing does."""
    keys = sorted({*found, *expected})
    pairs = {key: (found.get(key), expected.get(key)) for key in keys}
    return "\n  ".join(f"{key}: {_first(a, b)}" for key, (a, b) in pairs.items() if a != b)


def _first(a: Any, b: Any) -> str:
    if isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return f"{len(a)} lines, expected {len(b)}"
        a, b = next((x, y) for x, y in zip(a, b, strict=True) if x != y)
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [key for key in {*a, *b} if a.get(key) != b.get(key)]
        return "; ".join(f"{k} {a.get(k)!s:.120} for {b.get(k)!s:.120}" for k in sorted(keys)[:3])
    return f"{a!s:.120} for {b!s:.120}"
