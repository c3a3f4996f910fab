"""Finished runs about images with chosen scores, in the format of real ones; see sweeps.py."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from language_runs import RUNTIME
from PIL import Image
from sweeps import ARGS, EVAL_TIME, LAYERS, STEP_TIME, STEPS, write_run

from dynmoe.records import RunFolder

KINDS = {"kind_colour": 0.1, "kind_yes_no": -0.1}
"""What is added to a score for a kind of question."""
TOKENS = {"image": 280, "prompt": 80, "answer": 40}
K_BY_PART = {"image": 1.0, "prompt": 1.5, "answer": 2.0}
"""Of an adaptive run in the first layer, on evaluation sets; in the next layer it is 0.5 more, in
training 0.25 less, with each further seed 0.1 more."""
START = "vl_instruct/scenes_dense_seed{}_0123abc{}"


def write_vl_run(
    sweep: Path,
    setting: str = "DynMoE",
    scores: Mapping[str, float] | None = None,
    seed: int = 0,
    *,
    kinds: Mapping[str, Mapping[str, float]] | None = None,
    steps: Sequence[int] = STEPS[-1:],
    config: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
) -> RunFolder:
    """`scores` by set, the first is reported. `kinds` are further measures by set; without them
    each set has `KINDS`. All of `steps`, which are evaluated, have the same scores."""
    scores = scores or {"test": 0.6, "shuffled": 0.4}
    names = list(scores)
    sizes = dict.fromkeys(names, 500)
    folder = write_run(
        sweep,
        setting,
        seed=seed,
        config={
            "data.name": "Scenes",
            "data.fit": "pad",
            "protocol.name": "llava",
            "task.selection": "last_step",
            "task.module.trains": ["moe_layers", "projector"],
            "stage.start": START.format(seed, seed),
            **(config or {}),
        },
        facts={
            "protocol": "llava",
            "selection": "last_step",
            "stage": "moe",
            "modality": "vision-language",
            "dataset": "Scenes",
            "env_names": names,
            "test_envs": [0],
            "class_names": [],
            "measure": "accuracy",
            "samples_per_step": 8,
            "patience": None,
            "runtime": RUNTIME,
            "mean_tokens": 12.5,
            "sizes": {"train": 300, **sizes},
            "baseline": {
                "name": "most frequent answer to the same question",
                "scores": {names[0]: {"score": 0.35}},
                "majority": 0.2,
            },
            **(facts or {}),
        },
    )
    run = folder.read_run()
    if kinds is None:
        kinds = {name: {kind: scores[name] + KINDS[kind] for kind in KINDS} for name in names}
    found = {name: {"score": scores[name], **kinds.get(name, {}), "loss": 2.0} for name in names}
    records = [
        {
            "step": step,
            "epoch": (step + 1) / 50,
            "step_time": STEP_TIME,
            "eval_time": EVAL_TIME,
            "loss": 1.0,
            "mem_gb": 1.25,
            "args": {key: run[key] for key in ARGS},
            "hparams": {},
            "scores": found,
        }
        for step in steps
    ]
    routing = [
        {**_without_details(line), "parts": _parts(line, setting, seed)}
        for line in folder.read("routing")
        if line["step"] in steps
    ]
    _write(folder, "results", records)
    _write(folder, "routing", routing)
    _write(folder, "examples", [{"step": step, **_served(routing, step)} for step in steps])
    return folder


def _served(routing: Sequence[dict[str, Any]], step: int) -> dict[str, Any]:
    """The example, with a 0 for each further expert that lives at a step."""
    living = {line["layer"]: len(line["slots"]) for line in routing if line["step"] == step}
    found = example()
    bits = {
        layer: [token.ljust(count, "0") for token in found["experts"][layer]]
        for layer, count in living.items()
    }
    return {**found, "experts": bits}


def example(**changes: Any) -> dict[str, Any]:
    """A question about an image of four patches."""
    return {
        "set": "test",
        "row": 0,
        "question": "what colour is it ?",
        "right": "red",
        "answer": "red",
        "image": picture(8, 8),
        "image_tokens": 4,
        "tokens": ["", None, None, None, None, "what", "colour", "red"],
        "answer_from": 7,
        "experts": {
            LAYERS[0]: ["10", "11", "11", "11", "01", "10", "10", "11"],
            LAYERS[1]: ["01", "01", "01", "01", "01", "00", "10", "10"],
        },
        **changes,
    }


def picture(width: int, height: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def _without_details(line: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k not in ("k_by_position", "load_by_class")}


def _parts(line: dict[str, Any], setting: str, seed: int) -> dict[str, Any]:
    """Two experts share all tokens; any others serve none."""
    more = 0.5 * LAYERS.index(line["layer"]) - 0.25 * (line["source"] == "train") + 0.1 * seed
    found = {}
    for part, tokens in TOKENS.items():
        k = K_BY_PART[part] + more if setting == "DynMoE" else line["mean_k"]
        load = [round(tokens * k / 2)] * 2 + [0] * (len(line["slots"]) - 2)
        found[part] = {"tokens": tokens, "mean_k": sum(load) / tokens, "load": load}
    return found


def _write(folder: RunFolder, kind: str, records: Sequence[dict[str, Any]]) -> None:
    lines = [json.dumps(record, sort_keys=True) + "\n" for record in records]
    (folder.path / f"{kind}.jsonl").write_text("".join(lines))
