"""Rules that need more than one key. Each takes the configuration and yields its messages.

A value that is missing or of the wrong type is somebody else's message: a rule that cannot read
what it speaks about stays silent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from omegaconf import DictConfig

from dynmoe.config import expert_rules, protocol_rules, stage_rules, text_rules
from dynmoe.config.options import options_with
from dynmoe.config.reading import device_count, modality, read

Rule = Callable[[DictConfig], Iterator[str]]

WEIGHT_FILES = (".safetensors", ".pth", ".bin")


def same_modality(cfg: DictConfig) -> Iterator[str]:
    """The task decides; data and backbone must speak its language."""
    wanted = modality(cfg, "task.module")
    for group in ("data", "backbone"):
        found = modality(cfg, group)
        if None in (wanted, found) or wanted == found:
            continue
        fitting = options_with(group, lambda node: modality(node) == wanted)
        fix = f" Choose {group}={' or '.join(fitting)}." if fitting else ""
        yield f"{group}: task.module works on {wanted}, this {group} on {found}.{fix}"


def test_environments(cfg: DictConfig) -> Iterator[str]:
    envs = read(cfg, "data.test_envs", list)
    if envs is None or not all(isinstance(env, int) for env in envs):
        return
    if not envs:
        yield "data.test_envs: empty: name at least one environment to test on, e.g. [0]"
    if len(set(envs)) < len(envs):
        yield f"data.test_envs: expected distinct environments, found {envs}"
    if any(env < 0 for env in envs):
        yield f"data.test_envs: expected indices from 0, found {envs}"


def batch_divides(cfg: DictConfig) -> Iterator[str]:
    batch = read(cfg, "data.batch_size", int)
    parts = read(cfg, "trainer.accumulate_grad_batches", int) or 1
    ranks = (device_count(cfg) or 1) * (read(cfg, "trainer.num_nodes", int) or 1)
    if batch is not None and batch > 0 and parts * ranks > 0 and batch % (parts * ranks):
        yield (
            f"data.batch_size: {batch} does not divide into {ranks} devices x {parts} accumulated "
            f"parts. Choose a multiple of {ranks * parts}."
        )


def ranges(cfg: DictConfig) -> Iterator[str]:
    for key in (
        "task.steps",
        "task.epochs",
        "task.eval_every",
        "task.save_every",
        "task.patience",
        "trainer.max_steps",
        "data.batch_size",
        "data.eval_batch_size",
        "data.max_length",
    ):
        count = read(cfg, key, int)
        endless = count == -1 and key in ("task.steps", "trainer.max_steps")
        if count is not None and count < 1 and not endless:
            yield f"{key}: expected 1 or more, found {count}"
    if read(cfg, "trainer.max_steps", int) == -1 and read(cfg, "task.epochs", int) is None:
        yield "task.steps: -1 takes its length from task.epochs, which this task has not"
    for key in ("seed", "trial_seed", "hparams_seed"):
        seed = read(cfg, key, int)
        if seed is not None and seed < 0:
            yield f"{key}: expected 0 or more, found {seed}"
    share = read(cfg, "protocol.holdout_fraction", float)
    none_will_do = share == 0 and modality(cfg, "task.module") != "image"
    if share is not None and not (0 < share < 1 or none_will_do):
        yield f"protocol.holdout_fraction: expected a share between 0 and 1, found {share}"


def pretrained_weights(cfg: DictConfig) -> Iterator[str]:
    for key in ("backbone.pretrained", "backbone.vision.pretrained"):
        weights = read(cfg, key, str)
        if weights is not None and not weights.endswith(WEIGHT_FILES):
            yield (
                f"{key}: expected true, false or a file ending in {', '.join(WEIGHT_FILES)}, "
                f"found '{weights}'"
            )
        elif weights is not None and not Path(weights).expanduser().is_file():
            yield f"{key}: no file '{weights}'"
    untrained = read(cfg, "backbone.pretrained", bool) is False and cfg.get("stage") is None
    if untrained and read(cfg, "moe.adaptation.init", str) == "pretrained":
        yield (
            "moe.adaptation.init: 'pretrained' copies the backbone's trained FFN, but "
            "backbone.pretrained is false. Set backbone.pretrained=true or another init."
        )


def data_folder(cfg: DictConfig) -> Iterator[str]:
    if read(cfg, "mode", str) == "plan":  # reads none
        return
    for key in ("data.root", "data.ood_root"):
        root = read(cfg, key, str)
        if root is not None and not Path(root).expanduser().is_dir():
            yield f"{key}: no folder '{root}'. Give the folder of the data set: {key}=FOLDER"


def run_folder(cfg: DictConfig) -> Iterator[str]:
    name, outputs = read(cfg, "name", str), read(cfg, "paths.outputs", str)
    if name is not None and (Path(name).is_absolute() or ".." in Path(name).parts):
        yield (
            f"name: expected a folder below paths.outputs, found '{name}'. "
            "Another place is chosen by paths.outputs=FOLDER."
        )
    if outputs is None:
        return
    path = Path(outputs)
    parent = next(p for p in (path, *path.parents) if os.path.exists(p))
    if not parent.is_dir():
        yield f"paths.outputs: '{parent}' is not a folder, found '{outputs}'"
    elif not os.access(parent, os.W_OK | os.X_OK):
        yield (
            f"paths.outputs: no right to write to '{parent}'. Choose another: paths.outputs=FOLDER"
        )


def one_device_per_job(cfg: DictConfig) -> Iterator[str]:
    """Lightning starts its other processes with the whole command line, the sweep's -m included."""
    strategy = read(cfg, "trainer.strategy", str) or read(cfg, "trainer.strategy._target_", str)
    distributed = any(word in str(strategy).lower() for word in ("ddp", "fsdp", "deepspeed"))
    if distributed or device_count(cfg) != 1:
        yield (
            "trainer: a sweep runs each job on one device, found "
            f"devices={read(cfg, 'trainer.devices', object)}, strategy={strategy}. "
            "Set trainer.devices=1 trainer.strategy=auto, or start the jobs one by one."
        )


def clipping_optimizer(cfg: DictConfig) -> Iterator[str]:
    """Lightning refuses it at the first step (plugins/precision/amp.py, clip_gradients)."""
    clips = read(cfg, "trainer.gradient_clip_val", float)
    mixed = "mixed" in str(read(cfg, "trainer.precision", object))
    if clips and mixed and read(cfg, "task.optimizer.fused", bool):
        yield (
            "trainer: gradient_clip_val with mixed precision needs an optimizer that is not fused. "
            "Set task.optimizer.fused=false."
        )


RULES: tuple[Rule, ...] = (
    *expert_rules.RULES,
    same_modality,
    test_environments,
    batch_divides,
    ranges,
    pretrained_weights,
    data_folder,
    *text_rules.RULES,
    *stage_rules.RULES,
    *protocol_rules.RULES,
    run_folder,
    clipping_optimizer,
)
SWEEP_RULES: tuple[Rule, ...] = (one_device_per_job,)
