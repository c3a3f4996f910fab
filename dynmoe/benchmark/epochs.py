"""``dynmoe-bench epoch`` and ``data``: the training loop around a model, and its loader alone."""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from dynmoe import runtime
from dynmoe.benchmark import results
from dynmoe.benchmark.models import data_of, model_name
from dynmoe.benchmark.options import EPOCH_NOTE
from dynmoe.benchmark.plain import PlainFineTuning
from dynmoe.benchmark.results import RATIO, ROUNDS, Column, Row
from dynmoe.benchmark.timing import device_of, interleave, machine_facts, speed
from dynmoe.data.images.batches import ImageBatch
from dynmoe.data.images.module import DomainData
from dynmoe.data.text.module import GlueData
from dynmoe.data.text.tokens import EncodedTexts, encode
from dynmoe.seeding import IntArray
from dynmoe.tasks.base import MoETask
from dynmoe.training import build
from dynmoe.training.instantiation import make

EPOCH_COLUMNS = (
    Column("case", "case"),
    Column("s", "median_ms", unit=1e3),
    Column("quartiles", "quartiles_ms", unit=1e3),
    Column("samples/s", "samples_per_s"),
    Column("tokens/s", "tokens_per_s"),
    *RATIO,
    Column("padded", "padded", ".1%"),
    *ROUNDS,
)
DATA_COLUMNS = (
    Column("workers", "workers", ".0f"),
    Column("images/s", "images_per_s"),
    Column("ms/image", "ms_per_image", ".4f"),
    Column("CPU ms/image", "cpu_ms_per_image", ".4f"),
    Column("images", "images", ".0f"),
)


def run(args: argparse.Namespace, output: results.Output, cfg: DictConfig) -> None:
    """Measure, print the table, write the file.

    Raises:
        UserError: a device, data or model that do not fit; nothing has run then.
    """
    device = device_of(args)
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    cfg.trainer.update(accelerator=accelerator, devices=1, strategy="auto")
    cfg.trainer.accumulate_grad_batches = 1
    settings = runtime.apply(cfg.runtime, device.type)
    data: Any = build.build_data(cfg)
    data.setup()
    task = build.build_task(cfg, data, settings["fused_attention"])
    steps = min(args.steps or data.steps_per_epoch, data.steps_per_epoch)
    loops, work = _loops(cfg, data, task, steps)
    facts = {
        "model": model_name(cfg.backbone),
        "options": str(cfg.backbone.options),
        "data": data.name,
        "max_length": cfg.data.max_length,
        "batch": cfg.data.batch_size,
        "steps": steps,
        "mean_tokens": round(data.mean_tokens, 1),
    }
    with output.progress() as new_bar:
        rows = measure_epochs(loops, work, args.rounds, device, new_bar("epochs"))
    output.add(
        rows, results.Conditions(machine_facts(device, str(cfg.trainer.precision)), settings, facts)
    )
    title = "One training epoch, {steps} steps, {samples} texts"
    output.show(*results.tables(rows, (), title, EPOCH_COLUMNS), EPOCH_NOTE + "\n")


def _loops(
    cfg: DictConfig, data: GlueData, task: MoETask, steps: int
) -> tuple[dict[str, Callable[[], object]], dict[str, Work]]:
    """Return an epoch of each loop, and its work."""
    train = data.sets["train"]
    cache = None if cfg.data.cache is None else Path(cfg.data.cache)
    encoded = encode(train, data.tokenizer, cfg.data.max_length, cache)
    texts = LabelledTexts(encoded, train.label)
    model: Any = copy.deepcopy(task.backbone.model)
    runtime.set_fused_attention(model, True)  # transformers' own choice
    optimizer = cfg.task.optimizer
    plain = PlainFineTuning(model, optimizer.lr, optimizer.weight_decay, steps)

    silent: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar"), False
    )

    def loader() -> Any:
        return plain_loader(texts, data.tokenizer, cfg.data.batch_size, cfg.seed)

    def trainer() -> Any:
        return make(cfg.trainer, max_steps=steps, limit_val_batches=0, **silent)

    ours: Any = data.train_dataloader().batch_sampler
    work = {
        "plain": Work.of(encoded.lengths[batch] for batch in islice(loader().batch_sampler, steps)),
        "dynmoe": Work.of(
            encoded.lengths[[key.row for key in batch]] for batch in islice(ours, steps)
        ),
    }
    loops: dict[str, Callable[[], object]] = {
        "plain": lambda: trainer().fit(plain, loader()),
        "dynmoe": lambda: trainer().fit(task, datamodule=data),
    }
    return loops, work


class Work(NamedTuple):
    """The work of an epoch."""

    steps: int
    samples: int
    tokens: int
    positions: int
    """Tokens and padding."""

    @classmethod
    def of(cls, batches: Iterable[IntArray]) -> Work:
        """``batches``: the tokens of each text of each batch, which is padded to the longest."""
        sizes = [(1, len(b), int(b.sum()), len(b) * int(b.max())) for b in batches]
        return cls(*(sum(column) for column in zip(*sizes, strict=True)))


def measure_epochs(
    loops: Mapping[str, Callable[[], object]],
    work: Mapping[str, Work],
    rounds: int,
    device: torch.device,
    advance: results.Advance,
) -> list[Row]:
    """Return a row for each of the ``loops``, whose calls are epochs; the first is the reference.

    Speeds are compared by token: the first steps of an epoch are of other texts in each loop.

    Its own fields: ``case``; ``steps``, ``samples`` and real ``tokens`` of all texts;
    ``padded``, the share of padding in the positions that are computed; ``samples_per_s``.
    """
    reference = next(iter(loops))
    samples = interleave(loops, rounds, device, reference, advance, warm_ups=1)
    rows = []
    for name, own in work.items():
        times = speed(
            samples[name], samples[reference], own.tokens, "tokens_per_s", work[reference].tokens
        )
        rows.append(
            {
                "case": name,
                "steps": own.steps,
                "samples": own.samples,
                "tokens": own.tokens,
                "padded": 1 - own.tokens / own.positions,
                "reference": reference,
                **times,
                "samples_per_s": 1e3 * own.samples / times["median_ms"],
            }
        )
    return rows


class LabelledTexts(Dataset[dict[str, Any]]):
    """Tokens and label of each example; a batch is fetched at once."""

    def __init__(self, encoded: EncodedTexts, labels: np.ndarray) -> None:
        self.encoded = encoded
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        texts = self.encoded.rows(indices)
        labels = self.labels[indices].tolist()
        return [{**text, "label": label} for text, label in zip(texts, labels, strict=True)]


def plain_loader(
    texts: LabelledTexts, tokenizer: PreTrainedTokenizerBase, batch_size: int, seed: int
) -> DataLoader[Any]:
    """Return a loader that shuffles in the same way each time it is made."""
    return DataLoader(
        texts,
        batch_size,
        shuffle=True,
        collate_fn=DataCollatorWithPadding(tokenizer),
        generator=torch.Generator().manual_seed(seed),
    )


# The loader alone.

WARM_UP = 3
"""Batches: workers start, transforms are set up."""


def run_loader(args: argparse.Namespace, output: results.Output, cfg: DictConfig) -> None:
    """Measure, print the table, write the file.

    Raises:
        UserError: data that cannot be read; nothing has run then.
    """
    machine = machine_facts(torch.device("cpu"), "32-true")
    counts = args.workers or [cfg.data.workers]

    def set_up(workers: Any) -> Any:
        module = data_of(cfg, workers)
        module.setup()
        return module

    module = set_up(counts[0])
    facts = {
        "data": cfg.data.name,
        "image_size": cfg.data.image_size,
        "batch": cfg.data.batch_size * len(module.train_envs),
    }
    with output.progress() as new_bar:
        for i, workers in enumerate(counts):
            new_bar(f"{workers} workers")
            module = set_up(workers) if i else module
            output.add(
                [measure_loader(module, args.seconds)], results.Conditions(machine, {}, facts)
            )
    output.show(*results.tables(output.rows, (), "Training loader", DATA_COLUMNS))


def measure_loader(data: DomainData, seconds: float) -> Row:
    """Iterate the training loader for so many ``seconds`` after a warm-up.

    ``data`` comes from ``data_of`` and has been set up.

    Returns:
        ``workers``, ``images``, ``seconds``, ``images_per_s``, ``ms_per_image``, and
        ``cpu_ms_per_image``, CPU time of this process and the workers, None where the workers'
        cannot be read.
    """
    data.repeat_evaluation_of(0)  # go on after step 0, which an evaluation follows
    batches: Iterator[ImageBatch] = iter(data.train_dataloader())
    for _ in range(WARM_UP):
        next(batches)
    images, cpu, start = 0, _cpu_seconds(), time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        images += len(next(batches).label)
    used = _cpu_seconds()
    return {
        "workers": data.num_workers,
        "images": images,
        "seconds": passed,
        "images_per_s": images / passed,
        "ms_per_image": 1e3 * passed / images,
        "cpu_ms_per_image": None if cpu is None or used is None else 1e3 * (used - cpu) / images,
    }


def _cpu_seconds() -> float | None:
    """Return the CPU time of this process and, by /proc/<pid>/stat, of its workers.

    NOTE: resource.getrusage counts children only after they ended, and then their warm-up too.
    """
    total = time.process_time()
    for child in multiprocessing.active_children():
        stat = Path(f"/proc/{child.pid}/stat")
        if not stat.exists():
            return None
        # utime and stime are fields 14 and 15 (proc_pid_stat(5)); field 2 may contain spaces.
        fields = stat.read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total
