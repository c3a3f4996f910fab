"""Finished runs of language modelling with chosen losses; see tests/sweeps.py."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from language_runs import RUNTIME
from sweeps import ARGS, EVAL_TIME, STEP_TIME, STEPS, write_run

from dynmoe.records import RunFolder

SETS = ("validation", "test")
TOKENS_PER_BYTE = 0.25
GAP = 0.1  # that the test loss is above that of validation


def write_lm_run(
    sweep: Path,
    setting: str = "DynMoE",
    losses: Sequence[float] = (3.0, 2.5, 2.75),
    seed: int = 0,
    *,
    lr: float = 1e-3,
    facts: dict[str, Any] | None = None,
) -> RunFolder:
    """One run: `losses` are those on the validation set by evaluation."""
    folder = write_run(
        sweep,
        setting,
        seed=seed,
        config={
            "task.optimizer.lr": lr,
            "data.name": "GlossTexts",
            "protocol.name": "lm",
            "protocol.searched": ["task.optimizer.lr"],
            "protocol.selection": "validation",
        },
        facts={
            "protocol": "lm",
            "selection": "validation",
            "dataset": "GlossTexts",
            "env_names": list(SETS),
            "test_envs": [1],
            "modality": "text-stream",
            "measure": "loss",
            "class_names": [],
            "samples_per_step": 16,
            "batch_size": 16,
            "mean_tokens": 128.0,
            "sizes": {"train": 700, "validation": 70, "test": 70},
            "steps": STEPS[len(losses) - 1] + 1,
            "runtime": RUNTIME,
            **(facts or {}),
        },
    )
    run = folder.read_run()
    results = []
    for step, loss in zip(STEPS, losses, strict=False):
        by_set = dict(zip(SETS, (loss, loss + GAP), strict=True))
        results.append(
            {
                "step": step,
                "epoch": (step + 1) / 50,
                "step_time": STEP_TIME,
                "eval_time": EVAL_TIME,
                "loss": loss + 0.01,
                "mem_gb": 1.25,
                "args": {key: run[key] for key in ARGS},
                "hparams": {},
                "scores": {
                    name: {
                        "loss": each,
                        "bits_per_byte": each / math.log(2) * TOKENS_PER_BYTE,
                        "perplexity": math.exp(each),
                        "accuracy": 0.25,
                    }
                    for name, each in by_set.items()
                },
            }
        )
    last = STEPS[len(losses) - 1]
    lines = {"results": results}
    for kind in ("routing", "events"):
        kept = [each for each in folder.read(kind) if each["step"] <= last]  # type: ignore[arg-type]
        by_label = ("k_by_position", "load_by_class")  # of which there are none
        lines[kind] = [{k: v for k, v in each.items() if k not in by_label} for each in kept]
    for kind, records in lines.items():
        text = "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)
        (folder.path / f"{kind}.jsonl").write_text(text)
    return folder
