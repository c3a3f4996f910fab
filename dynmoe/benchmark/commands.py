"""``dynmoe-bench``: how fast a layer is, steps, inference, generation, epochs, and the data."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynmoe.benchmark import options
from dynmoe.benchmark.options import (
    LAYER_NOTE,
    STEP,
    STEP_NOTE,
    TEXT_NOTE,
    refuse_beside_runs,
)
from dynmoe.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from dynmoe.benchmark.results import Conditions


def layer(args: argparse.Namespace) -> None:
    """Measure, print the tables, write the file.

    Raises:
        ConfigError: what was asked for cannot be measured or compared; nothing has run then.
    """
    options.check(args.shape, args.k, args.only)
    file = File(args.json, "layer")

    from dynmoe import runtime
    from dynmoe.benchmark import results, tables
    from dynmoe.benchmark.layer import measure
    from dynmoe.benchmark.results import LayerRow

    device = device_of(args)
    settings = runtime.settle(
        {
            "matmul_precision": args.matmul_precision,
            "malloc": args.malloc,
            "fused_attention": "auto",
        },
        device.type,
    )
    del settings["fused_attention"]  # a layer has no attention
    conditions = results.Conditions(results.machine_facts(device, args.dtype), settings, {})
    baseline: list[LayerRow] = []
    if args.baseline:
        old, baseline = results.read(args.baseline, LayerRow)
        results.check_equal(old.machine | old.settings, conditions.machine | settings)
    file.make_folder()

    console, rows = make_console(), list[LayerRow]()
    plans = [(shape, k) for shape in args.shape for k in args.k]
    with progress_on(console) as progress:
        for done, (shape, k) in enumerate(plans, 1):
            advance = new_bar(progress, f"shape {shape.name}, k {k:g} ({done}/{len(plans)})")
            rows += measure(shape, k, args.only, args.rounds, args.dtype, device, advance)
            file.write(conditions, rows)
    console.print(str(conditions))
    for table in tables.of_layers(rows):
        console.print(table)
    console.print(LAYER_NOTE + "\n")
    console.print(tables.of_summary(rows))
    if args.baseline:
        console.print(_changes(baseline, rows))
    console.print(f"Written to {file.path}")


def step(args: argparse.Namespace) -> None:
    """Measure, print the tables, write the file.

    Raises:
        ConfigError: what was asked for cannot be measured or compared; nothing has run then.
    """
    if args.runs:
        refuse_beside_runs(args, STEP)
        from dynmoe.benchmark.model_commands import time_runs

        time_runs(args)
        return
    from dynmoe.benchmark import candidates

    cfg = candidates.configuration(args.overrides, candidates.step_defaults(args.overrides))
    cases = options.step_cases(args.only, args.k, cfg.moe.num_experts)
    file = File(args.json, "step")

    from dynmoe import runtime
    from dynmoe.benchmark import models, results, steps, tables, workload
    from dynmoe.benchmark.results import StepRow

    device = device_of(args)
    settings = runtime.settle(cfg.runtime, device.type)
    of_images = candidates.modality(cfg) == "image"
    if of_images:
        work = workload.images(cfg, args.batch or 32, device)
    else:
        cfg.data.batch_size = args.batch or cfg.data.batch_size
        work = workload.of_data(cfg, workload.data_of(cfg), device)
    amp = args.dtype == "amp"
    given_layers = "moe.layers" in candidates.keys(args.overrides)
    fused_attention = settings["fused_attention"]
    built, facts = models.build(cfg, work, cases, args.k, given_layers, fused_attention, amp)
    conditions = results.Conditions(results.machine_facts(device, args.dtype), settings, facts)
    baseline: list[StepRow] = []
    if args.baseline:
        old, baseline = results.read(args.baseline, StepRow)
        results.check_equal(old.machine | old.workload, conditions.machine | facts)
    costs = {name: workload.costs_of_sample(model, work.batches) for name, model in built.items()}
    file.make_folder()
    console, rows = make_console(), list[StepRow]()
    with progress_on(console) as progress:
        # Inference comes last: it makes the layers compact.
        for mode in ("train", "inference") if args.mode == "both" else (args.mode,):
            advance, weight = new_bar(progress, mode), cfg.moe.aux_weight
            rows += steps.measure_steps(
                mode, built, costs, work.batches, weight, amp, args.rounds, advance
            )
            file.write(conditions, rows)
    console.print(str(conditions))
    for table in tables.of_steps(rows):
        console.print(table)
    console.print(STEP_NOTE + "\n")
    if not of_images:
        console.print(TEXT_NOTE + "\n")
    if args.baseline:
        differing = results.differences(old.settings, settings)
        console.print("Settings that differ from the baseline's:", ", ".join(differing) or "none")
        console.print(_changes(baseline, rows))
    console.print(f"Written to {file.path}")


def data(args: argparse.Namespace) -> None:
    """Measure, print the table, write the file.

    Raises:
        UserError: a wrong configuration, or data that cannot be read; nothing has run then.
    """
    from dynmoe.benchmark import candidates

    cfg = candidates.configuration(args.overrides, candidates.DATA_DEFAULTS)
    if candidates.modality(cfg) != "image":
        raise ConfigError(f"task={cfg.task.name}: expected a task on images, task=vit_domainbed")
    file = File(args.json, "data")

    import torch

    from dynmoe.benchmark import results, tables
    from dynmoe.benchmark.results import DataRow
    from dynmoe.benchmark.workload import endless_data, measure_loader

    rows: list[DataRow] = []
    for workers in args.workers or [cfg.data.workers]:
        cfg.data.workers = workers
        module: Any = endless_data(cfg)
        module.setup()
        file.make_folder()
        rows.append(measure_loader(module, args.seconds))
        workload = {
            "data": cfg.data.name,
            "image_size": cfg.data.image_size,
            "batch": cfg.data.batch_size * len(module.train_envs),
        }
        machine = results.machine_facts(torch.device("cpu"), "fp32")
        conditions = results.Conditions(machine, {}, workload)
        file.write(conditions, rows)
    console = make_console()
    console.print(str(conditions))
    console.print(tables.of_loaders(rows))
    console.print(f"Written to {file.path}")


def epoch(args: argparse.Namespace) -> None:
    """Measure, print the table, write the file."""
    from dynmoe.benchmark.model_commands import time_epochs

    time_epochs(args)


def generate(args: argparse.Namespace) -> None:
    """Measure, print the table, write the file."""
    from dynmoe.benchmark.model_commands import time_generation

    time_generation(args)


def _changes(baseline: Sequence[Any], rows: Sequence[Any]) -> Any:
    from dynmoe.benchmark import results, tables

    changes = results.compare(baseline, rows)
    return tables.of_changes(changes) if changes else "The baseline has none of these measurements."


# What the commands of ``dynmoe-bench`` share: file of results, device, progress bar.

PRECISIONS = {"32-true": "fp32", "bf16-mixed": "amp"}
"""Lightning's words and ours."""


class File:
    """The --json file of one run, written again after each part: an interrupted run leaves some.

    Raises:
        ConfigError: it cannot be written there.
    """

    def __init__(self, given: Path | None, command: str) -> None:
        now = datetime.now()
        self.path = given or Path(f"outputs/bench/{command}-{now:%Y%m%d-%H%M%S}.json")
        self._date = f"{now:%Y-%m-%d %H:%M:%S}"
        if self.path.is_dir():
            raise ConfigError(f"--json {self.path}: expected a file to write, this is a folder")

    def make_folder(self) -> None:
        is_new = not self.path.exists()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        except OSError as error:
            raise ConfigError(f"--json {self.path}: cannot be written ({error})") from None
        if is_new:  # an empty file would pass for a damaged one
            self.path.unlink()

    def write(self, conditions: Conditions, rows: Sequence[object]) -> None:
        from dynmoe.benchmark import results

        command = [Path(sys.argv[0]).name, *sys.argv[1:]]
        results.write(self.path, command, self._date, conditions, rows)


def device_of(args: argparse.Namespace) -> torch.device:
    """The device to measure; sets the number of threads."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def make_console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a file has no width, and the tables are wider than rich's 80
    return console


def progress_on(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, console=console, transient=True)


def new_bar(progress: Progress, text: str) -> Callable[[int, int], None]:
    """A bar, the only one; it is told what is done, of how much."""
    for task in progress.task_ids:
        progress.remove_task(task)
    bar = progress.add_task(text, total=None)
    return lambda done, total: progress.update(bar, completed=done, total=total)
