"""``dynmoe-bench start``: from the command to the first training step, in new processes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from dynmoe.benchmark import first_step, plain, results, timing
from dynmoe.benchmark.options import START_NOTE
from dynmoe.benchmark.results import RATIO, ROUNDS, Column
from dynmoe.errors import ConfigError
from dynmoe.training import build

IMPORTS = "import torch, lightning, transformers"
COLUMNS = (
    Column("case", "case"),
    Column("s", "median_ms", ".2f", 1e3),
    Column("quartiles", "quartiles_ms", ".2f", 1e3),
    Column("time,\nx plain", "time_ratio", ".2f"),
    *RATIO,
    *ROUNDS,
)


def run(args: argparse.Namespace, output: results.Output, cfg: DictConfig) -> None:
    """Measure, print the table, write the file. ``cfg`` is the dense configuration.

    Raises:
        ConfigError: a process that ends before its first step, with its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        _prepare(cfg, Path(folder))
        cases = {
            "imports": Start([sys.executable, "-c", IMPORTS], 0),
            "plain": _up_to_step(plain.__file__, folder),
            "dynmoe": _up_to_step("runners.run", *args.overrides, "trainer.accelerator=cpu"),
        }
        device = torch.device("cpu")
        with output.progress() as new_bar:
            samples = timing.interleave(
                cases, args.rounds, device, "plain", new_bar("starts"), warm_ups=1
            )
            rows = [
                {
                    "case": name,
                    "reference": "plain",
                    **timing.speed(samples[name], samples["plain"], 1, "starts_per_s"),
                    "time_ratio": timing.paired(samples[name], samples["plain"]).median,
                }
                for name in cases
            ]
            facts = {"overrides": " ".join(args.overrides)}
            machine = timing.machine_facts(device, str(cfg.trainer.precision))
            output.add(rows, results.Conditions(machine, {}, facts))
    output.show(*results.tables(rows, (), "Up to the first training step", COLUMNS), START_NOTE)


@dataclass
class Start:
    """A process in a new, empty folder: nothing of an earlier one is there."""

    command: Sequence[str]
    status: int

    def __call__(self) -> None:
        self.sample(1)

    def sample(self, calls: int) -> timing.Sample:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            done = subprocess.run(
                self.command, cwd=folder, capture_output=True, text=True, check=False
            )
            seconds = time.perf_counter() - start
        if done.returncode != self.status:
            last = [*done.stderr.splitlines(), *done.stdout.splitlines(), "no output"]
            raise ConfigError(
                f"{' '.join(self.command)} ended with {done.returncode} before its first step:"
                f" {' '.join(last[-10:])}"
            )
        return timing.Sample(seconds, False)


def _up_to_step(*words: str) -> Start:
    return Start([sys.executable, "-P", os.fspath(first_step.__file__), *words], first_step.STEPPED)


def _prepare(cfg: DictConfig, folder: Path) -> None:
    """Write what the plain script reads: texts, tokenizer, model with its weights."""
    cfg.data.linear_baseline = False
    data: Any = build.build_data(cfg)
    data.setup()
    task = build.build_task(cfg, data, fused_attention=True)
    model: Any = task.backbone.model
    model.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    train = data.sets["train"]
    plan = {
        "texts": [train.first] if train.second is None else [train.first, train.second],
        "labels": train.label.tolist(),
        "max_length": cfg.data.max_length,
        "batch": cfg.data.batch_size,
        "lr": cfg.task.optimizer.lr,
        "weight_decay": cfg.task.optimizer.weight_decay,
        "steps": data.steps_per_epoch,
        "precision": cfg.trainer.precision,
        "seed": cfg.seed,
    }
    (folder / "plan.json").write_text(json.dumps(plan))
