"""Finished language runs with chosen scores, in the format of real ones; see tests/sweeps.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sweeps import ARGS, EVAL_TIME, STEP_TIME, STEPS, write_run

from dynmoe.records import RunFolder

MEASURES = {
    "CoLA": ("Matthews correlation", ("matthews",)),
    "MRPC": ("mean of accuracy and F1", ("accuracy", "f1")),
    "RTE": ("accuracy", ("accuracy",)),
    "MNLI": ("accuracy", ("accuracy",)),
}
RUNTIME = {
    "matmul_precision": "high",
    "malloc": "tuned",
    "fused_attention": True,
    "precision": "32-true",
    "fused_optimizer": True,
}
LRS = (2e-5, 3e-5, 5e-5)
SAMPLES = 32
MEAN_TOKENS = 40.5


def write_language_run(
    sweep: Path,
    setting: str = "DynMoE",
    dev: Sequence[float] = (0.5, 0.6, 0.7, 0.6),
    seed: int = 0,
    *,
    dataset: str = "RTE",
    lr: float = LRS[0],
    heldout: Sequence[float] | None = None,
    others: Sequence[str] = (),
    config: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    state: str = "done",
    stopped_early: bool = False,
) -> RunFolder:
    """One run: `dev` are its scores by evaluation, `heldout` those that select instead, if given.

    `stopped_early` says that patience ended it after these. `others` are evaluation sets beside
    dev, on which it does 0.1 worse.
    """
    measure, metrics = MEASURES[dataset]
    selection = "best_dev" if heldout is None else "heldout"
    protocol = "glue" if heldout is None else "glue_heldout"
    env_names = ["dev", *others]
    sizes = dict.fromkeys(env_names, 200)
    folder = write_run(
        sweep / dataset,
        setting,
        seed=seed,
        config={
            "task.optimizer.lr": lr,
            "data.name": dataset,
            "protocol.name": protocol,
            "protocol.searched": ["task.optimizer.lr"],
            "protocol.selection": selection,
            **(config or {}),
        },
        facts={
            "protocol": protocol,
            "selection": selection,
            "dataset": dataset,
            "env_names": env_names,
            "test_envs": [0],
            "modality": "text",
            "measure": measure,
            "samples_per_step": SAMPLES,
            "batch_size": SAMPLES,
            "patience": 3,
            "mean_tokens": MEAN_TOKENS,
            "sizes": {"train": 2000, "heldout": 0 if heldout is None else 200, **sizes},
            "baseline": None,
            "runtime": RUNTIME,
            **(facts or {}),
        },
        state=state,
    )
    run = folder.read_run()
    results = []
    for step, (place, score) in zip(STEPS, enumerate(dev), strict=False):
        scores = {name: score - 0.1 * (name != "dev") for name in env_names}
        if heldout is not None:
            scores["heldout"] = heldout[place]
        record: dict[str, Any] = {
            "step": step,
            "epoch": (step + 1) / 50,
            "step_time": STEP_TIME,
            "eval_time": EVAL_TIME,
            "loss": 1.0 / (step + 1),
            "mem_gb": 1.25,
            "args": {key: run[key] for key in ARGS},
            "hparams": {},
            "scores": {},
        }
        for name, value in scores.items():
            # The last metric is 0.02 above the score, the first as much below.
            spread = (0.0,) if len(metrics) == 1 else (-0.02, 0.02)
            each = {m: value + d for m, d in zip(metrics, spread, strict=True)}
            record["scores"][name] = {**each, "score": value, "loss": 1.5}
        results.append(record)
    results[-1] |= {"stopped_early": True} if stopped_early else {}
    last = results[-1]["step"]
    routing = [line for line in folder.read("routing") if line["step"] <= last]
    _write(folder, "results", results)
    _write(folder, "routing", routing)
    _write(folder, "events", [line for line in folder.read("events") if line["step"] <= last])
    return folder


def _write(folder: RunFolder, kind: str, records: Sequence[dict[str, Any]]) -> None:
    lines = [json.dumps(record, sort_keys=True) + "\n" for record in records]
    (folder.path / f"{kind}.jsonl").write_text("".join(lines))
