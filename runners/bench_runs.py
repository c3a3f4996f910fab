"""``dynmoe-bench step --runs FOLDER``: time and memory of trained runs, beside each other."""

from __future__ import annotations

import argparse
import warnings
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig

from dynmoe.comparison.run import Problem, Run
from dynmoe.comparison.runs import read_runs
from dynmoe.errors import ConfigError
from runners import trained
from runners.bench_options import RUNS_NOTE
from runners.bench_tools import PRECISIONS, File, device_of, make_console, new_bar, progress_on

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dynmoe.benchmark.trained import Trained
    from dynmoe.benchmark.workload import LabelledBatch

# What a run's batches depend on besides its problem.
OF_BATCHES = ("image_size", "tokenizer_path", "tokenizer_name", "max_length")


class Candidate(NamedTuple):
    """The run that stands for a setting."""

    run: Run
    cfg: DictConfig
    checkpoint: Path


def time_runs(args: argparse.Namespace) -> None:
    """Measure one run of each setting, print the tables, write the file.

    The runs of one problem whose batches are of one kind are measured in turns, on the same
    batches: training batches of the first one's data. It is the reference, the dense run if there
    is one.

    Raises:
        UserError: nothing to measure, or runs that cannot be measured beside each other; nothing
            has run then.
    """
    candidates = [_candidate(run) for run in representatives(args.runs)]
    cfg = candidates[0].cfg
    _check_equal_conditions(candidates)
    groups: defaultdict[tuple[Problem, tuple[Any, ...]], list[Candidate]] = defaultdict(list)
    for each in candidates:
        kind = tuple(each.cfg.data.get(key) for key in OF_BATCHES)
        groups[each.run.problem, kind].append(each)
    file = File(args.json or args.runs / "timing.json", "step")

    from dynmoe import runtime
    from dynmoe.benchmark import results, tables
    from dynmoe.benchmark.rows import TrainedRow
    from dynmoe.benchmark.trained import measure_trained

    device = device_of(args)
    settings = runtime.settle(cfg.runtime, device.type)
    machine = results.machine_facts(device, PRECISIONS[cfg.trainer.precision])
    amp = machine["dtype"] == "amp"
    file.make_folder()
    console, rows = make_console(), list[TrainedRow]()
    with progress_on(console) as progress:
        for number, ((problem, _), group) in enumerate(groups.items(), 1):
            batches, models = _load(group, settings["fused_attention"], device)
            # Inference comes last: it makes the layers compact.
            for mode in ("train", "inference") if args.mode == "both" else (args.mode,):
                text = f"{problem.dataset}, {mode} ({number}/{len(groups)})"
                rows += measure_trained(
                    mode,
                    ", ".join(problem),
                    models,
                    batches,
                    amp,
                    args.rounds,
                    new_bar(progress, text),
                )
                sizes = sorted({row.batch for row in rows})
                workload = {"batch": sizes[0] if len(sizes) == 1 else sizes}
                conditions = results.Conditions(machine, settings, workload)
                file.write(conditions, rows)
    console.print(str(conditions))
    for table in tables.of_trained(rows):
        console.print(table)
    console.print(RUNS_NOTE + "\n")
    console.print(f"Written to {file.path}")


def representatives(folder: Path) -> list[Run]:
    """Of each problem and setting the finished run of the lowest seed and first test environment.

    Raises:
        UserError: no run is finished.
    """
    found = read_runs([folder])
    if not found.runs:
        why = [*(f"{run.name} is {run.state}" for run in found.absent), *found.warnings]
        raise ConfigError(f"--runs {folder}: expected a finished run, found none: {why[0]}")
    first: dict[tuple[Problem, str], Run] = {}
    for run in sorted(found.runs, key=lambda run: (run.repetition, run.facts["test_envs"])):
        first.setdefault((run.problem, run.setting), run)
    chosen = {run.folder.path for run in first.values()}
    return [run for run in found.runs if run.folder.path in chosen]


def _candidate(run: Run) -> Candidate:
    for name in ("selected", "last"):
        checkpoint = trained.checkpoint_of(run.folder, name)
        if checkpoint.exists():
            return Candidate(run, trained.configuration(run.folder), checkpoint)
    raise ConfigError(
        f"{run.folder.path}: expected checkpoints/selected.ckpt or last.ckpt, found neither;"
        " train it again with overwrite=true"
    )


def _check_equal_conditions(candidates: Sequence[Candidate]) -> None:
    """Precision and the process's settings hold for all that are measured in turns."""
    first = candidates[0]
    if first.cfg.trainer.precision not in PRECISIONS:
        raise ConfigError(
            f"{first.run.folder.path}: trainer.precision is {first.cfg.trainer.precision}, expected"
            f" one of {', '.join(PRECISIONS)}"
        )
    for node, key in (
        ("trainer", "precision"),
        ("runtime", "matmul_precision"),
        ("runtime", "malloc"),
        ("runtime", "fused_attention"),
    ):
        for other in candidates[1:]:
            values = [each.cfg[node][key] for each in (first, other)]
            if values[0] != values[1]:
                raise ConfigError(
                    f"{node}.{key} is {values[0]} in {first.run.folder.path} and {values[1]} in"
                    f" {other.run.folder.path}: such runs cannot be measured in turns, give their"
                    " folders one by one"
                )


def _load(
    group: Sequence[Candidate], fused_attention: bool, device: torch.device
) -> tuple[list[LabelledBatch], list[Trained]]:
    """Batches of the first one's training data, and all models as their checkpoints left them."""
    from dynmoe.benchmark.trained import Trained
    from dynmoe.benchmark.workload import training_batches

    # Tasks log their losses, to a trainer that is not there.
    warnings.filterwarnings("ignore", message=r".*`self\.trainer` reference is not registered.*")
    data, batches = training_batches(group[0].cfg.data, device)
    models = []
    for run, cfg, checkpoint in group:
        task, _ = trained.load(cfg, data, fused_attention, checkpoint)
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
