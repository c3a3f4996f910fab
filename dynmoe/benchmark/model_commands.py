"""``dynmoe-bench step --runs FOLDER``: time and memory of trained runs, beside each other."""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from dynmoe.benchmark import options
from dynmoe.benchmark.candidates import (
    EPOCH_DEFAULTS,
    Candidate,
    candidates,
    configuration,
    groups,
    keys,
    modality,
    step_defaults,
    unwrapped,
    workload,
)
from dynmoe.benchmark.commands import (
    PRECISIONS,
    File,
    device_of,
    make_console,
    new_bar,
    progress_on,
)
from dynmoe.benchmark.options import (
    EPOCH_NOTE,
    GENERATE,
    GENERATE_NOTE,
    RUNS_NOTE,
    refuse_beside_runs,
)
from dynmoe.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dynmoe.benchmark.epochs import Work
    from dynmoe.benchmark.generation import Speaker
    from dynmoe.benchmark.results import Conditions, GenerationRow
    from dynmoe.benchmark.steps import Trained
    from dynmoe.benchmark.workload import LabelledBatch
    from dynmoe.data.text.module import GlueData
    from dynmoe.data.vl.batches import QuestionBatch
    from dynmoe.tasks.base import MoETask


def time_runs(args: argparse.Namespace) -> None:
    """Measure one run of each setting, print the tables, write the file.

    The runs of one problem whose batches are of one kind are measured in turns, on the same
    batches: training batches of the first one's data.

    Raises:
        UserError: nothing to measure, or runs that cannot be measured beside each other; nothing
            has run then.
    """
    found = candidates(args.runs)
    cfg = found[0].cfg
    file = File(args.json or args.runs / "timing.json", "step")

    from dynmoe import runtime
    from dynmoe.benchmark import results, tables
    from dynmoe.benchmark.results import TrainedRow
    from dynmoe.benchmark.steps import measure_trained
    from dynmoe.benchmark.workload import token_facts

    device = device_of(args)
    settings = runtime.settle(cfg.runtime, device.type)
    machine = results.machine_facts(device, PRECISIONS[cfg.trainer.precision])
    amp = machine["dtype"] == "amp"
    file.make_folder()
    console, rows, facts = make_console(), list[TrainedRow](), list[results.Facts]()
    together = groups(found)
    with progress_on(console) as progress:
        for number, (problem, group) in enumerate(together, 1):
            batches, models = _load(group, settings["fused_attention"], device)
            size = max(len(batch.label) for batch in batches)
            facts.append({"batch": size, **token_facts(batches)})
            # Inference comes last: it makes the layers compact.
            for mode in ("train", "inference") if args.mode == "both" else (args.mode,):
                text = f"{problem.dataset}, {mode} ({number}/{len(together)})"
                rows += measure_trained(
                    mode,
                    ", ".join(problem),
                    models,
                    batches,
                    amp,
                    args.rounds,
                    new_bar(progress, text),
                )
                conditions = results.Conditions(machine, settings, workload(facts))
                file.write(conditions, rows)
    console.print(str(conditions))
    for table in tables.of_trained(rows):
        console.print(table)
    console.print(RUNS_NOTE + "\n")
    console.print(f"Written to {file.path}")


def _load(
    group: Sequence[Candidate], fused_attention: bool, device: torch.device
) -> tuple[list[LabelledBatch], list[Trained]]:
    """Batches of the first one's training data, and all models as their checkpoints left them."""
    from dynmoe.benchmark.steps import Trained
    from dynmoe.benchmark.workload import data_of, training_batches
    from dynmoe.training import build

    # Tasks log their losses, to a trainer that is not there.
    warnings.filterwarnings("ignore", message=r".*`self\.trainer` reference is not registered.*")
    data = data_of(group[0].cfg)
    batches = training_batches(data, device)
    models = []
    for run, cfg, checkpoint in group:
        task, _ = build.load(cfg, data, fused_attention, checkpoint)
        task.to(device)
        models.append(
            Trained(
                run=run.folder.path.name,
                setting=run.setting,
                environment=run.environment,
                model=task.backbone,
                loss=partial(_loss, task),
                optimizer=task.new_optimizer(),
            )
        )
    return batches, models


def _loss(task: Any, batch: LabelledBatch) -> Tensor:
    loss: Tensor = task.training_step(batch, 0)["loss"]
    return loss


# ``dynmoe-bench generate``: how fast vision-language models answer, beside each other.

CASES = ["dense", "top-2", "dynmoe"]


def time_generation(args: argparse.Namespace) -> None:
    """Measure, print the tables, write the file.

    Raises:
        UserError: what was asked for cannot be measured; nothing has run then.
    """
    if args.runs:
        refuse_beside_runs(args, GENERATE)
        _time_runs(args)
    else:
        _time_fresh(args)


def _time_runs(args: argparse.Namespace) -> None:
    """One run of each setting; those of one problem in turns, on the same questions."""

    found = candidates(args.runs)
    for run, cfg, _ in found:
        if modality(cfg) != "vision-language":
            raise ConfigError(
                f"{run.folder.path}: {cfg.data.name} has no questions to answer in words; expected"
                " runs of task=vl"
            )
    file = File(args.json or args.runs / "generation.json", "generate")

    from dynmoe import runtime
    from dynmoe.benchmark import results
    from dynmoe.benchmark.generation import measure_generation, question_facts
    from dynmoe.benchmark.results import GenerationRow

    cfg = found[0].cfg
    device = device_of(args)
    settings = runtime.settle(cfg.runtime, device.type)
    machine = results.machine_facts(device, PRECISIONS[cfg.trainer.precision])
    file.make_folder()
    console, rows, facts = make_console(), list[GenerationRow](), list[results.Facts]()
    together = groups(found)
    with progress_on(console) as progress:
        for number, (problem, group) in enumerate(together, 1):
            questions, speakers = _load_speakers(
                group, args.batch, settings["fused_attention"], device
            )
            facts.append(question_facts(questions, args.new_tokens))
            rows += measure_generation(
                ", ".join(problem),
                speakers,
                questions,
                args.new_tokens,
                machine["dtype"] == "amp",
                args.rounds,
                new_bar(progress, f"{problem.dataset} ({number}/{len(together)})"),
            )
            conditions = results.Conditions(machine, settings, workload(facts))
            file.write(conditions, rows)
    _show(console, conditions, rows, file)


def _load_speakers(
    group: Sequence[Candidate], batch: int | None, fused_attention: bool, device: torch.device
) -> tuple[list[QuestionBatch], list[Speaker]]:
    """Questions to the first one, and all models as their checkpoints left them."""
    from dynmoe.benchmark.generation import Speaker, question_batches
    from dynmoe.benchmark.workload import data_of
    from dynmoe.training import build

    first = group[0].cfg
    first.data.eval_batch_size = batch or first.data.eval_batch_size
    data: Any = data_of(first)
    questions = question_batches(data, device)
    speakers = []
    for run, cfg, checkpoint in group:
        task, _ = build.load(cfg, data, fused_attention, checkpoint)
        model = task.backbone.to(device)
        speakers.append(Speaker(run.setting, model, run.folder.path.name, run.environment))
    return questions, speakers


def _time_fresh(args: argparse.Namespace) -> None:
    """A dense model and MoE models of fresh weights, as in ``dynmoe-bench step``."""

    overrides = args.overrides
    if "task" not in keys(overrides):
        overrides = ["task=vl", *overrides]
    cfg = configuration(overrides, step_defaults(overrides))
    if modality(cfg) != "vision-language":
        raise ConfigError(f"task={cfg.task.name}: expected a task that answers in words, task=vl")
    cases = options.step_cases(CASES, args.k, cfg.moe.num_experts)
    file = File(args.json, "generate")

    from dynmoe import runtime
    from dynmoe.benchmark import models, results
    from dynmoe.benchmark.generation import (
        Speaker,
        measure_generation,
        question_batches,
        question_facts,
    )
    from dynmoe.benchmark.workload import data_of, of_data

    device = device_of(args)
    settings = runtime.settle(cfg.runtime, device.type)
    cfg.data.eval_batch_size = args.batch or cfg.data.eval_batch_size
    data: Any = data_of(cfg)
    fitted_on = of_data(cfg, data, device)
    questions = question_batches(data, device)
    facts = {"data": data.name, **question_facts(questions, args.new_tokens)}
    work = fitted_on._replace(facts=facts)
    amp = args.dtype == "amp"
    given_layers = "moe.layers" in keys(overrides)
    fused_attention = settings["fused_attention"]
    built, facts = models.build(cfg, work, cases, args.k, given_layers, fused_attention, amp)
    conditions = results.Conditions(results.machine_facts(device, args.dtype), settings, facts)
    file.make_folder()
    console = make_console()
    with progress_on(console) as progress:
        rows = measure_generation(
            data.name,
            [Speaker(name, model) for name, model in built.items()],
            questions,
            args.new_tokens,
            amp,
            args.rounds,
            new_bar(progress, data.name),
        )
    file.write(conditions, rows)
    _show(console, conditions, rows, file)


def _show(console: Any, conditions: Conditions, rows: Sequence[GenerationRow], file: File) -> None:
    from dynmoe.benchmark import tables

    console.print(str(conditions))
    for table in tables.of_generation(rows):
        console.print(table)
    console.print(GENERATE_NOTE + "\n")
    console.print(f"Written to {file.path}")


# ``dynmoe-bench epoch``: a training epoch in our runner beside one in a plain loop.


def time_epochs(args: argparse.Namespace) -> None:
    """Measure, print the table, write the file.

    Raises:
        UserError: what was asked for cannot be measured; nothing has run then.
    """

    cfg = configuration(args.overrides, EPOCH_DEFAULTS)
    if modality(cfg) != "text":
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
    with unwrapped():
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
    from dynmoe.benchmark.candidates import built
    from dynmoe.benchmark.epochs import LabelledTexts, PlainFineTuning, Work, plain_loader
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
