"""``dynmoe-bench generate``: how fast vision-language models answer, beside each other."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dynmoe.benchmark import plan
from dynmoe.errors import ConfigError
from runners.bench_candidates import Candidate, candidates, groups, workload
from runners.bench_model_options import GENERATE, GENERATE_NOTE, refuse_beside_runs
from runners.bench_tools import PRECISIONS, File, device_of, make_console, new_bar, progress_on

if TYPE_CHECKING:
    import torch

    from dynmoe.benchmark.generation import Speaker
    from dynmoe.benchmark.results import Conditions
    from dynmoe.benchmark.rows import GenerationRow
    from dynmoe.data.vl.batches import QuestionBatch

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
    from dynmoe.benchmark import configured

    found = candidates(args.runs)
    for run, cfg, _ in found:
        if configured.modality(cfg) != "vision-language":
            raise ConfigError(
                f"{run.folder.path}: {cfg.data.name} has no questions to answer in words; expected"
                " runs of task=vl"
            )
    file = File(args.json or args.runs / "generation.json", "generate")

    from dynmoe import runtime
    from dynmoe.benchmark import results
    from dynmoe.benchmark.generation import measure_generation, question_facts
    from dynmoe.benchmark.rows import GenerationRow

    cfg = found[0].cfg
    device = device_of(args)
    settings = runtime.settle(cfg.runtime, device.type)
    machine = results.machine_facts(device, PRECISIONS[cfg.trainer.precision])
    file.make_folder()
    console, rows, facts = make_console(), list[GenerationRow](), list[results.Facts]()
    together = groups(found)
    with progress_on(console) as progress:
        for number, (problem, group) in enumerate(together, 1):
            questions, speakers = _load(group, args.batch, settings["fused_attention"], device)
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


def _load(
    group: Sequence[Candidate], batch: int | None, fused_attention: bool, device: torch.device
) -> tuple[list[QuestionBatch], list[Speaker]]:
    """Questions to the first one, and all models as their checkpoints left them."""
    from dynmoe.benchmark.generation import Speaker, question_batches
    from dynmoe.benchmark.workload import data_of
    from dynmoe.training import build

    node = group[0].cfg.data
    node.eval_batch_size = batch or node.eval_batch_size
    data: Any = data_of(node)
    questions = question_batches(data, device)
    speakers = []
    for run, cfg, checkpoint in group:
        task, _ = build.load(cfg, data, fused_attention, checkpoint)
        model = task.backbone.to(device)
        speakers.append(Speaker(run.setting, model, run.folder.path.name, run.environment))
    return questions, speakers


def _time_fresh(args: argparse.Namespace) -> None:
    """A dense model and MoE models of fresh weights, as in ``dynmoe-bench step``."""
    from dynmoe.benchmark import configured

    overrides = args.overrides
    if "task" not in configured.keys(overrides):
        overrides = ["task=vl", *overrides]
    cfg = configured.configuration(overrides, configured.step_defaults(overrides))
    if configured.modality(cfg) != "vision-language":
        raise ConfigError(f"task={cfg.task.name}: expected a task that answers in words, task=vl")
    cases = plan.step_cases(CASES, args.k, cfg.moe.num_experts)
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
    data: Any = data_of(cfg.data)
    fitted_on = of_data(cfg, data, device)
    questions = question_batches(data, device)
    facts = {"data": data.name, **question_facts(questions, args.new_tokens)}
    work = fitted_on._replace(facts=facts)
    amp = args.dtype == "amp"
    given_layers = "moe.layers" in configured.keys(overrides)
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
