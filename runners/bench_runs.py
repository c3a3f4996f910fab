"""``dynmoe-bench step --runs FOLDER``: time and memory of trained runs, beside each other."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from runners.bench_candidates import Candidate, candidates, groups, workload
from runners.bench_model_options import RUNS_NOTE
from runners.bench_tools import PRECISIONS, File, device_of, make_console, new_bar, progress_on

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dynmoe.benchmark.trained import Trained
    from dynmoe.benchmark.workload import LabelledBatch


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
    from dynmoe.benchmark.rows import TrainedRow
    from dynmoe.benchmark.trained import measure_trained
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
    from dynmoe.benchmark.trained import Trained
    from dynmoe.benchmark.workload import data_of, training_batches
    from dynmoe.training import build

    # Tasks log their losses, to a trainer that is not there.
    warnings.filterwarnings("ignore", message=r".*`self\.trainer` reference is not registered.*")
    data = data_of(group[0].cfg.data)
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
