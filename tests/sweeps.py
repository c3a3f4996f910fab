"""Small sweeps with chosen accuracies, in the format of real ones.

Three environments, two MoE layers, four records of which the third is the selected one. The sizes
are round, so that a test can work its answer out by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynmoe.records import RunFolder
from dynmoe.selection import measured_by

Facts = dict[str, Any]

ENVIRONMENTS = ["0", "15", "30"]
LAYERS = ["blocks.2.mlp", "blocks.4.mlp"]
STEPS, SELECTED = (0, 50, 100, 150), 100
STEP_TIME, EVAL_TIME = 0.5, 2.0
BATCH = 8
TOKENS = 400
"""In a routing line, per layer and source."""
ARGS = ("algorithm", "dataset", "test_envs", "hparams_seed", "trial_seed", "seed")
OTHER, EXPERT, ROUTER, ROUTER_FIXED = 1000, 100, 10, 1
FLOPS_OTHER = 5000
FLOPS_LAYER = {"tokens": 4, "expert": 200, "router": 20, "router_fixed": 2}


def write_sweep(
    folder: Path, accuracies: Mapping[str, Mapping[str, Sequence[float]]], **options: Any
) -> Path:
    """One finished run for each accuracy: `{setting: {environment: [by seed]}}`.

    A setting is `dense`, `top-2 of 8`, `GMoE top-1 of 6`, `ReMoE` or `DynMoE`.
    """
    for setting, by_environment in accuracies.items():
        for environment, by_seed in by_environment.items():
            for seed, accuracy in enumerate(by_seed):
                write_run(folder, setting, accuracy, environment, seed, **options)
    return folder


def write_run(
    sweep: Path,
    setting: str = "DynMoE",
    accuracy: float = 0.5,
    environment: str = "0",
    seed: int = 0,
    *,
    validation: float | None = None,
    hparams_seed: int = 0,
    config: Facts | None = None,
    facts: Facts | None = None,
    state: str = "done",
    mean_k: float | None = None,
    name: str | None = None,
) -> RunFolder:
    """One run: `accuracy` is what is reported of it, `validation` (the same) what selects it.

    `config` and `facts` go over the usual ones. A `state` other than done leaves the run without
    `done`; `failed` also gives it a failure. `name`: its folder, if not by what it is.
    """
    moe = _moe(setting)
    validation = accuracy if validation is None else validation
    test = ENVIRONMENTS.index(environment)
    tags = "".join(f"_{key}{value}" for key, value in (config or {}).items())
    if hparams_seed:
        tags += f"_hparams{hparams_seed}"
    name = name or re.sub(r"[^\w.-]+", "-", f"digits_{setting}_env{test}_seed{seed}{tags}".lower())
    folder = RunFolder(sweep / name)
    folder.path.mkdir(parents=True, exist_ok=True)
    content = {
        "name": sweep.name,
        "protocol": "domainbed",
        "selection": "training_domain_validation",
        "modality": "image",
        "measure": "accuracy",
        "algorithm": moe["moe.algorithm"],
        "moe": moe["moe.name"],
        "backbone": "vit_digits",
        "weights": "from scratch",
        "dataset": "RotatedDigits",
        "env_names": ENVIRONMENTS,
        "class_names": ["odd", "even"],
        "num_classes": 2,
        "test_envs": [test],
        "seed": seed,
        "trial_seed": 0,
        "hparams_seed": hparams_seed,
        "steps": STEPS[-1] + 1,
        "batch_size": BATCH,
        "stage": None,
        "patience": None,
        "sizes": {},
        "data_hash": f"abc{seed}",
        "versions": {"dynmoe": "0.1.0", "torch": "2.11.0"},
        "device": "cpu",
        "threads": 2,
        "machine": {"cpu": "Example CPU", "cores": 2},
        "runtime": {"precision": "32-true"},
        "costs": costs(moe),
        "start_experts": dict.fromkeys(_layers(moe), moe["moe.num_experts"]),
        "baseline": None,
        "config": {
            "data.name": "RotatedDigits",
            "data.test_envs": [test],
            "data.batch_size": BATCH,
            "protocol.name": "domainbed",
            "task.selection": "training_domain_validation",
            "task.steps": STEPS[-1] + 1,
            "task.optimizer.lr": 0.001,
            "task.optimizer.weight_decay": 0.0,
            "seed": seed,
            "trial_seed": 0,
            "hparams_seed": hparams_seed,
            **moe,
            **(config or {}),
        },
        **(facts or {}),
    }
    rule, names, tests = (content[key] for key in ("selection", "env_names", "test_envs"))
    samples = content["batch_size"] * (len(names) - len(tests))
    content = {**measured_by(rule, names, tests), "samples_per_step": samples, **content}
    (folder.path / "run.json").write_text(json.dumps(content))
    results = [_result(step, accuracy, validation, content) for step in STEPS]
    _write(folder.path / "results.jsonl", results)
    _write(folder.path / "routing.jsonl", _routing(moe, mean_k, content["env_names"]))
    _write(folder.path / "events.jsonl", _events(moe))
    if state == "done":
        (folder.path / "done").write_text("done\n")
    if state == "failed":
        (folder.path / "failed.txt").write_text("DataError: no such folder\n")
    return folder


def costs(moe: Facts) -> Facts:
    """What `dynmoe.metrics.efficiency.count` returns for the model of a setting."""
    layers = _layers(moe)
    size = {"expert": EXPERT, "router": ROUTER, "router_fixed": ROUTER_FIXED}
    return {
        "parameters": {"other": OTHER, "layers": dict.fromkeys(layers, size)},
        "flops": {"other": FLOPS_OTHER, "layers": dict.fromkeys(layers, FLOPS_LAYER)},
        "slots": dict.fromkeys(layers, moe.get("moe.max_experts", moe["moe.num_experts"])),
    }


def save_nothing(figure: object, path: Path) -> Path:
    """In the place of `drawing.save`, where a test does not look at figures: an empty file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def _moe(setting: str) -> Facts:
    if setting == "dense":
        return _mixture("dense", "dense", 1, **{"moe.router": None, "moe.adaptation": None})
    if setting.startswith("DynMoE"):
        adaptation = {"moe.adaptation.length": 100, "moe.adaptation.period": 100}
        return _mixture("dynmoe", setting, 2, **{"moe.max_experts": 8}, **adaptation)
    if setting == "ReMoE":
        return _mixture("remoe", setting, 8, **{"moe.adaptation": None, "moe.router.target_k": 2.0})
    match = re.fullmatch(r"(GMoE )?top-(\d+) of (\d+)", setting)
    assert match is not None, setting
    gmoe, top_k, experts = match.groups()
    fixed = {"moe.top_k": int(top_k), "moe.adaptation": None}
    name, algorithm = ("gmoe", "GMoE") if gmoe else ("topk", "TopK")
    return _mixture(name, algorithm, int(experts), **fixed)


def _mixture(name: str, algorithm: str, experts: int, **more: Any) -> Facts:
    return {
        "moe.name": name,
        "moe.algorithm": algorithm,
        "moe.num_experts": experts,
        **({} if "moe.router" in more else {"moe.router._target_": f"{algorithm}Router"}),
        **more,
    }


def _layers(moe: Facts) -> list[str]:
    return [] if moe["moe.name"] == "dense" else LAYERS


def _result(step: int, accuracy: float, validation: float, facts: Facts) -> Facts:
    chosen = step == SELECTED
    record = {
        "step": step,
        "epoch": step / 10,
        "step_time": STEP_TIME,
        "eval_time": EVAL_TIME,
        "loss": 1.0 / (step + 1),
        "mem_gb": 1.25,
        "args": {key: facts[key] for key in ARGS},
        "hparams": {},
    }
    scores = {}
    for index, name in enumerate(facts["env_names"]):
        is_test = index in facts["test_envs"]
        level = accuracy if is_test else validation
        # The last record is better on the test environment: who reports it selects wrongly.
        other = level + 0.01 if is_test else level - 0.1
        for split in ("in", "out"):
            record[f"env{index}_{split}_acc"] = level if chosen else other
            scores[f"{name}/{split}"] = {"accuracy": level if chosen else other, "loss": 0.5}
    return {**record, "scores": scores}


def _routing(moe: Facts, mean_k: float | None, env_names: Sequence[str]) -> list[Facts]:
    """Experts grow by one at each record if they adapt; the second layer's k is half a k higher."""
    adaptive = moe["moe.name"] == "dynmoe"
    k = moe.get("moe.top_k", 1.5) if mean_k is None else mean_k
    lines = []
    for index, step in enumerate(STEPS):
        experts = moe["moe.num_experts"] + (index if adaptive else 0)
        for depth, layer in enumerate(_layers(moe)):
            for source in ("train", *env_names):
                here = k + (0.5 * depth if adaptive else 0)
                line = {
                    "step": step,
                    "layer": layer,
                    "source": source,
                    "slots": list(range(experts)),
                    "tokens": TOKENS,
                    "mean_k": here,
                    "k_hist": [0, TOKENS // 2, TOKENS // 2],
                    "unrouted": 0.0,
                    "load": [here * TOKENS / experts] * experts,
                    "thresholds": [0.0] * experts if adaptive else None,
                }
                if source != "train":
                    line["k_by_position"] = [here] * 5
                    line["load_by_class"] = [[here * TOKENS / experts / 2] * experts] * 2
                lines.append(line)
    return lines


def _events(moe: Facts) -> list[Facts]:
    if moe["moe.name"] != "dynmoe":
        return []
    start = moe["moe.num_experts"]
    return [
        {
            "step": step - 1,
            "layer": layer,
            "removed": [],
            "added": start + index,
            "before": start + index,
            "after": start + index + 1,
            "unrouted": 0.1,
            "tokens": TOKENS,
        }
        for index, step in enumerate(STEPS[1:])
        for layer in LAYERS
    ]


def _write(file: Path, records: Sequence[Facts]) -> None:
    file.write_text("".join(json.dumps(record, sort_keys=True) + "\n" for record in records))
