"""``dynmoe-bench epoch``: a training epoch in our runner beside one in a plain loop."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from dynmoe.errors import ConfigError
from runners.bench_options import EPOCH_NOTE
from runners.bench_tools import PRECISIONS, File, device_of, make_console, new_bar, progress_on

if TYPE_CHECKING:
    from dynmoe.benchmark.epochs import Work
    from dynmoe.data.text.module import GlueData
    from dynmoe.tasks.base import MoETask


def time_epochs(args: argparse.Namespace) -> None:
    """Measure, print the table, write the file.

    Raises:
        UserError: what was asked for cannot be measured; nothing has run then.
    """
    from dynmoe.benchmark import configured

    cfg = configured.configuration(args.overrides, configured.EPOCH_DEFAULTS)
    if configured.modality(cfg) != "text":
        raise ConfigError(f"task={cfg.task.name}: expected a task on texts, task=glue")
    if cfg.moe.router is not None:
        raise ConfigError(
            f"moe={cfg.moe.name}: the dense encoder is measured here, leave it out; MoE layers are"
            " measured by dynmoe-bench step"
        )
    file = File(args.json, "epoch")

    from dynmoe import runtime
    from dynmoe.benchmark import results, tables, workload
    from dynmoe.benchmark.epochs import measure_epochs
    from dynmoe.training import build

    device = device_of(args)
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    cfg.trainer.update(accelerator=accelerator, devices=1, strategy="auto")
    cfg.trainer.accumulate_grad_batches = 1
    cfg.data.linear_baseline = False
    settings = runtime.settle(cfg.runtime, device.type)
    data: Any = build.build_data(cfg)
    data.setup()
    with configured.unwrapped():
        task = build.build_task(cfg, data, settings["fused_attention"])
    steps = min(args.steps or data.steps_per_epoch, data.steps_per_epoch)
    loops, work = _loops(cfg, data, task, steps)
    facts = {
        "model": workload.model_name(cfg.backbone),
        "options": str(cfg.backbone.options),
        "data": data.name,
        "max_length": cfg.data.max_length,
        "batch": cfg.data.batch_size,
        "steps": steps,
        "mean_tokens": round(data.mean_tokens, 1),
    }
    dtype = PRECISIONS.get(cfg.trainer.precision, cfg.trainer.precision)
    conditions = results.Conditions(results.machine_facts(device, dtype), settings, facts)
    file.make_folder()
    console = make_console()
    with progress_on(console) as progress:
        rows = measure_epochs(loops, work, args.rounds, device, new_bar(progress, "epochs"))
    file.write(conditions, rows)
    console.print(str(conditions))
    console.print(tables.of_epochs(rows))
    console.print(EPOCH_NOTE + "\n")
    console.print(f"Written to {file.path}")


def _loops(
    cfg: DictConfig, data: GlueData, task: MoETask, steps: int
) -> tuple[dict[str, Callable[[], object]], dict[str, Work]]:
    """An epoch of each loop, and what it consists of."""
    from dynmoe import runtime
    from dynmoe.benchmark.configured import built
    from dynmoe.benchmark.epochs import Work
    from dynmoe.benchmark.plain import LabelledTexts, PlainFineTuning, plain_loader
    from dynmoe.data.text.tokens import encode

    train = data.sets["train"]
    cache = None if cfg.data.cache is None else Path(cfg.data.cache)
    encoded = encode(train, data.tokenizer, cfg.data.max_length, cache)
    texts = LabelledTexts(encoded, train.label)
    model: Any = copy.deepcopy(task.backbone.model)
    runtime.set_fused_attention(model, True)  # transformers' own choice
    optimizer = cfg.task.optimizer
    plain = PlainFineTuning(model, optimizer.lr, optimizer.weight_decay, steps)

    def loader() -> Any:
        return plain_loader(texts, data.tokenizer, cfg.data.batch_size, cfg.seed)

    def trainer() -> Any:
        return built(
            cfg.trainer,
            max_steps=steps,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            logger=False,
        )

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
