"""``dynmoe-bench``: how fast a layer is, steps, inference, generation, epochs, and the data."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from dynmoe.benchmark import plan
from dynmoe.errors import ConfigError, UserError
from runners.bench_model_options import STEP, STEP_NOTE, TEXT_NOTE, refuse_beside_runs
from runners.bench_options import LAYER_NOTE, Command, parser
from runners.bench_tools import File, device_of, make_console, new_bar, progress_on


def main() -> None:
    """Exit 0, 2 with a message that names what is wrong, or 130 when interrupted."""
    # PyTorch's profiler, which counts allocations, reports every start and stop, and memory that
    # it saw freed but not allocated: a text's mask of the step before.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        commands: dict[str, Command] = {
            "layer": layer,
            "step": step,
            "data": data,
            "epoch": epoch,
            "generate": generate,
        }
        args = parser(commands).parse_args(_overrides_first(sys.argv[1:]))
        run: Command = args.run
        run(args)
    except UserError as error:
        print(f"dynmoe-bench: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("dynmoe-bench: stopped; the --json file holds what was finished", file=sys.stderr)
        raise SystemExit(130) from None


def _overrides_first(arguments: Sequence[str]) -> list[str]:
    """Move key=value behind the command: an option before it would take it as its own value."""
    overrides = [a for a in arguments if a[0:1] == "~" or ("=" in a and a[0:1] != "-")]
    others = [a for a in arguments if a not in overrides]
    return [*others[:1], *overrides, *others[1:]]


def layer(args: argparse.Namespace) -> None:
    """Measure, print the tables, write the file.

    Raises:
        ConfigError: what was asked for cannot be measured or compared; nothing has run then.
    """
    plan.check(args.shape, args.k, args.only)
    file = File(args.json, "layer")

    from dynmoe import runtime
    from dynmoe.benchmark import results, tables
    from dynmoe.benchmark.measure import measure
    from dynmoe.benchmark.rows import LayerRow

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
        from runners.bench_runs import time_runs

        time_runs(args)
        return
    from dynmoe.benchmark import configured

    cfg = configured.configuration(args.overrides, configured.step_defaults(args.overrides))
    cases = plan.step_cases(args.only, args.k, cfg.moe.num_experts)
    file = File(args.json, "step")

    from dynmoe import runtime
    from dynmoe.benchmark import models, results, steps, tables, workload
    from dynmoe.benchmark.rows import StepRow

    device = device_of(args)
    settings = runtime.settle(cfg.runtime, device.type)
    of_images = configured.modality(cfg) == "image"
    if of_images:
        work = workload.images(cfg, args.batch or 32, device)
    else:
        cfg.data.batch_size = args.batch or cfg.data.batch_size
        work = workload.of_data(cfg, workload.data_of(cfg.data), device)
    amp = args.dtype == "amp"
    given_layers = "moe.layers" in configured.keys(args.overrides)
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
    from dynmoe.benchmark import configured

    cfg = configured.configuration(args.overrides, configured.DATA_DEFAULTS)
    if configured.modality(cfg) != "image":
        raise ConfigError(f"task={cfg.task.name}: expected a task on images, task=vit_domainbed")
    file = File(args.json, "data")

    import torch

    from dynmoe.benchmark import results, tables
    from dynmoe.benchmark.loader import measure_loader
    from dynmoe.benchmark.rows import DataRow
    from dynmoe.benchmark.workload import ENDLESS

    cfg.data.steps = cfg.data.eval_every = ENDLESS
    rows: list[DataRow] = []
    for workers in args.workers or [cfg.data.workers]:
        cfg.data.workers = workers
        module = configured.built(cfg.data)
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
    from runners.bench_epoch import time_epochs

    time_epochs(args)


def generate(args: argparse.Namespace) -> None:
    """Measure, print the table, write the file."""
    from runners.bench_generate import time_generation

    time_generation(args)


def _changes(baseline: Sequence[Any], rows: Sequence[Any]) -> Any:
    from dynmoe.benchmark import results, tables

    changes = results.compare(baseline, rows)
    return tables.of_changes(changes) if changes else "The baseline has none of these measurements."


if __name__ == "__main__":
    main()
