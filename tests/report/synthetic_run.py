"""A synthetic run: six environments, MoE layers that gain and lose experts over 400 steps."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from dynmoe.records import RunFolder
from dynmoe.selection import measured_by

STEPS, EVERY, UPDATE = 400, 20, 50
ENVIRONMENTS = ["0", "15", "30", "45", "60", "75"]


def write_synthetic_run(path: Path, layers: int, max_experts: int) -> RunFolder:
    """A run folder in the format of a real one, the same for the same arguments."""
    rng = random.Random(0)
    folder = RunFolder(path)
    names = [f"blocks.{index}.mlp" for index in range(layers)]
    size = {"expert": 1_181_568, "router": 385, "router_fixed": 1}
    folder.write_run(
        {
            "name": "vit_digits",
            "protocol": "domainbed",
            "selection": "training_domain_validation",
            **measured_by("training_domain_validation", ENVIRONMENTS, [0]),
            "modality": "image",
            "measure": "accuracy",
            "algorithm": "DynMoE",
            "moe": "dynmoe",
            "backbone": "vit_digits",
            "weights": "from scratch",
            "dataset": "RotatedDigits",
            "env_names": ENVIRONMENTS,
            "test_envs": [0],
            "seed": 0,
            "trial_seed": 0,
            "hparams_seed": 0,
            "steps": STEPS,
            "device": "cpu",
            "threads": 2,
            "runtime": {
                "matmul_precision": "medium",
                "malloc": "tuned",
                "fused_attention": False,
                "precision": "32-true",
                "fused_optimizer": True,
            },
            "costs": {
                "parameters": {"other": 21_000_000, "layers": dict.fromkeys(names, size)},
                "slots": dict.fromkeys(names, max_experts),
            },
            "config": {"moe.algorithm": "DynMoE"},
            "start_experts": dict.fromkeys(names, 3),
            "baseline": {
                "name": "linear classifier on pixels",
                "scores": {"0/in": {"accuracy": 0.412}},
            },
        }
    )
    slots = {name: [0, 1, 2] for name in names}
    thresholds = {name: [0.0] * max_experts for name in names}
    for step in range(STEPS):
        if step % EVERY == 0 or step == STEPS - 1:
            folder.append("results", _results(step, rng))
            lines = [
                _routing(step, name, source, slots[name], thresholds[name], rng)
                for name in names
                for source in ("train", *ENVIRONMENTS)
            ]
            folder.append("routing", *lines)
        for name in names:
            for slot in slots[name]:
                thresholds[name][slot] += rng.gauss(0.0001, 0.003)
        if step % UPDATE == UPDATE - 1:
            folder.append(
                "events", *(_update(step, name, slots, max_experts, rng) for name in names)
            )
    return folder


def _results(step: int, rng: random.Random) -> dict[str, Any]:
    record: dict[str, Any] = {
        "step": step,
        "epoch": step / 40,
        "step_time": 0.25,
        "loss": 0.3 + 2 * math.exp(-step / 80),
        "mem_gb": 1.25,
        "args": {"test_envs": [0], "hparams_seed": 0, "trial_seed": 0},
        "scores": {},
    }
    for index, name in enumerate(ENVIRONMENTS):
        level = 0.62 if index == 0 else 0.9 + 0.015 * index
        accuracy = 0.1 + (level - 0.1) * (1 - math.exp(-(step + 5) / 70))
        inner, outer = accuracy + rng.gauss(0, 0.008), accuracy - 0.02 + rng.gauss(0, 0.012)
        record["scores"][f"{name}/in"] = {"accuracy": inner, "loss": 2 - 1.6 * inner}
        record["scores"][f"{name}/out"] = {"accuracy": outer, "loss": 2 - 1.5 * outer}
    return record


def _routing(
    step: int,
    name: str,
    source: str,
    slots: list[int],
    thresholds: list[float],
    rng: random.Random,
) -> dict[str, Any]:
    tokens = 10_000
    chance = 0.5 + 0.35 * math.sin(step / 150 + len(name) + int(name.split(".")[1]))
    count = len(slots)
    k_hist = [
        round(tokens * math.comb(count, k) * chance**k * (1 - chance) ** (count - k))
        for k in range(count + 1)
    ]
    load = [rng.uniform(0.2, 1.8) * tokens * chance for _ in slots]
    return {
        "step": step,
        "layer": name,
        "source": source,
        "slots": list(slots),
        "tokens": tokens,
        "mean_k": chance * count,
        "k_hist": k_hist,
        "unrouted": k_hist[0] / tokens,
        "load": load,
        "thresholds": [thresholds[slot] for slot in slots],
    }


def _update(
    step: int, name: str, slots: dict[str, list[int]], max_experts: int, rng: random.Random
) -> dict[str, Any]:
    before = slots[name]
    removed = rng.sample(before, 2) if len(before) > 3 and rng.random() < 0.4 else []
    living = [slot for slot in before if slot not in removed]
    free = [slot for slot in range(max_experts) if slot not in living]
    added = rng.choice(free) if free and rng.random() < 0.8 else None
    slots[name] = sorted([*living, *([] if added is None else [added])])
    return {
        "step": step,
        "layer": name,
        "removed": removed,
        "added": added,
        "before": len(before),
        "after": len(slots[name]),
        "unrouted": rng.random() * 0.1,
        "tokens": 100_000,
    }
