"""The commands of ``dynmoe-bench`` up to their refusal. What they measure needs PyTorch: it is
loaded once a command can be carried out."""

from __future__ import annotations

import argparse

from dynmoe.benchmark import options
from dynmoe.errors import ConfigError


def layer(args: argparse.Namespace) -> None:
    """Time a single layer.

    Raises:
        UserError: nothing can be measured as asked; nothing has run then. So in all commands.
    """
    options.check_layer(args.shape, args.k, args.only)
    from dynmoe.benchmark.results import Output

    output = Output(args.json, "layer")
    from dynmoe.benchmark.layer import run

    run(args, output)


def step(args: argparse.Namespace) -> None:
    """Time training steps and inference of fresh models, or of trained runs."""
    from dynmoe.benchmark.candidates import candidates, configuration, modality, step_defaults
    from dynmoe.benchmark.results import Output

    cases: list[str] = []
    if args.runs:
        options.refuse_beside_runs(args)
        found = candidates(args.runs)
        cfg = found[0].cfg
        output = Output(args.json or args.runs / "timing.json", "step")
    else:
        found = []
        cfg = configuration(args.overrides, step_defaults(args.overrides))
        cases = options.step_cases(args.only, args.k, cfg.moe.num_experts)
        output = Output(args.json, "step")
        is_image = modality(cfg) == "image"
        cfg.data.batch_size = args.batch or (32 if is_image else cfg.data.batch_size)
    from dynmoe.benchmark import steps

    steps.run(args, output, cfg, cases, found)


def generate(args: argparse.Namespace) -> None:
    """Time the answers of fresh vision-language models, or of trained runs."""
    from dynmoe.benchmark.candidates import candidates, configuration, keys, modality, step_defaults
    from dynmoe.benchmark.results import Output

    cases: list[str] = []
    if args.runs:
        options.refuse_beside_runs(args)
        found = candidates(args.runs)
        for run, cfg, _ in found:
            if modality(cfg) != "vision-language":
                raise ConfigError(
                    f"{run.folder.path}: {cfg.data.name} has no questions to answer;"
                    " expected runs of task=vl"
                )
        cfg = found[0].cfg
        output = Output(args.json or args.runs / "generation.json", "generate")
    else:
        found = []
        overrides = args.overrides
        if "task" not in keys(overrides):
            overrides = ["task=vl", *overrides]
        cfg = configuration(overrides, step_defaults(overrides))
        if modality(cfg) != "vision-language":
            raise ConfigError(
                f"task={cfg.task.name}: expected a task that answers questions, task=vl"
            )
        cases = options.step_cases(options.GENERATE_CASES, args.k, cfg.moe.num_experts)
        output = Output(args.json, "generate")
    for each in (cfg, *(candidate.cfg for candidate in found)):
        each.data.eval_batch_size = args.batch or each.data.eval_batch_size
    from dynmoe.benchmark import steps

    steps.run(args, output, cfg, cases, found)


def epoch(args: argparse.Namespace) -> None:
    """Time training epochs on texts."""
    from dynmoe.benchmark.candidates import EPOCH_DEFAULTS, configuration, modality
    from dynmoe.benchmark.results import Output

    cfg = configuration(args.overrides, EPOCH_DEFAULTS)
    if modality(cfg) != "text":
        raise ConfigError(f"task={cfg.task.name}: expected a task on texts, task=glue")
    if cfg.moe.router is not None:
        raise ConfigError(
            f"moe={cfg.moe.name}: the dense encoder is measured here, leave it out; MoE layers are"
            " measured by dynmoe-bench step"
        )
    output = Output(args.json, "epoch")
    from dynmoe.benchmark.epochs import run

    run(args, output, cfg)


def data(args: argparse.Namespace) -> None:
    """Time the training loader of images."""
    from dynmoe.benchmark.candidates import DATA_DEFAULTS, configuration, modality
    from dynmoe.benchmark.results import Output

    cfg = configuration(args.overrides, DATA_DEFAULTS)
    if modality(cfg) != "image":
        raise ConfigError(f"task={cfg.task.name}: expected a task on images, task=vit_domainbed")
    output = Output(args.json, "data")
    from dynmoe.benchmark.epochs import run_loader

    run_loader(args, output, cfg)
