"""The name of a run: readable, safe for any file system, and a function of its configuration alone.

DomainBed names a run by a hash of its sorted arguments (domainbed/command_launchers.py, sweep.py).
A hash of the resolved configuration goes one step further: a default spelled out gives the same
folder, an edited YAML file gives another one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

# Dotted keys that do not change the result of a run.
NOT_IN_IDENTITY = (
    "hydra",
    "logger",
    "mode",
    "name",
    "overwrite",
    "paths",
    "plan",
    "protocol.datasets",  # the entry in use shows in the keys that copy it
    "protocol.defaults",
    "protocol.stages",
    "runtime.malloc",
    "sweep",
    "task.save_every",
    "backbone.grad_checkpointing",  # the same numbers, computed twice
    "data.question_sets",  # more of them are answered by dynmoe-eval
    "data.cache",
    "data.cache_gb",
    "data.eval_batch_size",
    "data.examples",
    "data.verify",
    "data.workers",
    "moe.recompute",
    "trainer.default_root_dir",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.logger",
)

# `${a.b}`, another key; `${recipe:lr}` computes something.
COPY = re.compile(r"\$\{[\w.]+\}")


def sha8(text: str) -> str:
    """First 8 hexadecimal digits of the SHA-256 of `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_name(cfg: DictConfig) -> str:
    """`<data>_<moe>[_env<test envs>]_seed<seed>_<hash>`: `pacs_dynmoe_env0_seed0_1f3a90bc`."""
    tests = [f"env{'-'.join(map(str, cfg.data.test_envs))}"] if "test_envs" in cfg.data else []
    parts = (cfg.data.name, cfg.moe.name, *tests, f"seed{cfg.seed}", config_hash(cfg))
    return re.sub(r"[^a-z0-9_.-]+", "-", "_".join(str(part) for part in parts).lower())


def config_hash(cfg: DictConfig) -> str:
    """Hash of everything that can change the result of a run."""
    text = json.dumps(_relevant(cfg, prefix=""), sort_keys=True, default=str)
    return sha8(text)


def flat(cfg: DictConfig) -> dict[str, Any]:
    """Everything that can change the result of a run, as dotted keys and resolved values.

    A key that copies another one, `data.trial_seed: ${trial_seed}`, is left out: two runs that
    differ in one setting differ in one key here.
    """
    return dict(_flat(_relevant(cfg, prefix=""), OmegaConf.to_container(cfg), ""))


def _flat(node: dict[str, Any], raw: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        written = raw.get(key) if isinstance(raw, dict) else None
        if isinstance(written, str) and COPY.fullmatch(written):
            continue
        if isinstance(value, dict) and value:
            yield from _flat(value, written, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _relevant(cfg: DictConfig, prefix: str) -> dict[str, Any]:
    # Node by node, so that an interpolation below a key that is left out is never resolved.
    found: dict[str, Any] = {}
    for key in map(str, cfg):
        dotted = f"{prefix}{key}"
        if dotted in NOT_IN_IDENTITY:
            continue
        value = cfg[key]
        if isinstance(value, DictConfig):
            value = _relevant(value, f"{dotted}.")
        elif OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
        found[key] = value
    return found
