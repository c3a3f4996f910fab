"""Configurations of benchmarks, and the trained runs that ``--runs`` chooses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from dynmoe.config import options
from dynmoe.config.check import report
from dynmoe.config.compose import preflight, search_path
from dynmoe.errors import ConfigError
from dynmoe.report.run import Problem, Run
from dynmoe.report.runs import read_runs
from dynmoe.training import trained

# Keys of the data that a run's batches depend on besides its problem.
BATCH_KEYS = (
    *("image_size", "patch_size", "tokenizer_path", "tokenizer_name", "max_length"),
    *("template", "question_template"),
)
# Keys of the process: they hold for all runs that are measured interleaved.
SHARED_KEYS = (
    *("trainer.precision", "runtime.matmul_precision", "runtime.malloc"),
    "runtime.fused_attention",
)


class Candidate(NamedTuple):
    """The run that represents a setting."""

    run: Run
    cfg: DictConfig
    checkpoint: Path


def candidates(folder: Path, targets: Sequence[str] = ()) -> list[Candidate]:
    """Return a run of each problem and setting, the finished one of the lowest seed and first test
    environment. ``targets``: see ``trained.configuration``.

    Raises:
        UserError: no run is finished, one has no checkpoint, or they cannot be measured
            interleaved.
    """
    found = read_runs([folder])
    if not found.runs:
        why = [*(f"{run.name} is {run.state}" for run in found.absent), *found.warnings]
        raise ConfigError(f"--runs {folder}: expected a finished run, found none: {why[0]}")
    first: dict[tuple[Problem, str], Run] = {}
    for run in sorted(found.runs, key=lambda run: (run.repetition, run.facts["test_envs"])):
        first.setdefault((run.problem, run.setting), run)
    chosen = {run.folder.path for run in first.values()}
    members = [_candidate(run, targets) for run in found.runs if run.folder.path in chosen]
    first_cfg, path = members[0].cfg, members[0].run.folder.path
    for key in SHARED_KEYS:
        value = OmegaConf.select(first_cfg, key)
        for other in members[1:]:
            if (found_there := OmegaConf.select(other.cfg, key)) != value:
                raise ConfigError(
                    f"{key} is {value} in {path} and {found_there} in {other.run.folder.path}: such"
                    " runs cannot be measured interleaved, give their folders one by one"
                )
    return members


def groups(found: Sequence[Candidate]) -> list[tuple[Problem, list[Candidate]]]:
    """Group candidates of one problem whose batches are of one kind. The first of a group is the
    reference, the dense run if there is one."""
    members: defaultdict[tuple[Problem, tuple[Any, ...]], list[Candidate]] = defaultdict(list)
    for each in found:
        kind = tuple(each.cfg.data.get(key) for key in BATCH_KEYS)
        members[each.run.problem, kind].append(each)
    return [(problem, group) for (problem, _), group in members.items()]


def _candidate(run: Run, targets: Sequence[str]) -> Candidate:
    for name in ("selected", "last"):
        checkpoint = trained.checkpoint_of(run.folder, name)
        if checkpoint.exists():
            return Candidate(run, trained.configuration(run.folder, targets), checkpoint)
    raise ConfigError(
        f"{run.folder.path}: expected checkpoints/selected.ckpt or last.ckpt, found neither;"
        " train it again with overwrite=true"
    )


# Configurations: keys of dynmoe-run, checked in the same way.

DATA_DEFAULTS = ["task=vit_domainbed"]
EPOCH_DEFAULTS = ["task=glue", "moe=dense"]
FEW_EXPERTS = ["moe.num_experts=8", "moe.max_experts=${moe.num_experts}"]
STEP_DEFAULTS = {
    "vit_domainbed": [
        "backbone=vit_tiny",
        "backbone.pretrained=false",
        "backbone.image_size=64",
        *FEW_EXPERTS,
    ],
    "glue": ["backbone.pretrained=false", *FEW_EXPERTS],
    "lm": ["backbone.pretrained=false", *FEW_EXPERTS],
    "vl": [
        "backbone.pretrained=false",
        "backbone.vision.pretrained=false",
        "moe.num_experts=4",
        "moe.max_experts=${moe.num_experts}",
    ],
}


def step_defaults(given: Sequence[str]) -> list[str]:
    """Return the defaults of the given task, or of the first one."""
    chosen = [value for key, _, value in (text.partition("=") for text in given) if key == "task"]
    task = chosen[0] if chosen else next(iter(STEP_DEFAULTS))
    return [f"task={task}", *STEP_DEFAULTS.get(task, [])]


def configuration(given: Sequence[str], defaults: Sequence[str]) -> DictConfig:
    """Compose the overrides ``given``, and the ``defaults`` of other keys.

    Raises:
        ConfigError: listing every problem of it.
    """
    texts = [text for text in defaults if text.partition("=")[0] not in keys(given)]
    texts += given
    verdict = preflight(texts)
    if verdict.problems:
        raise ConfigError(report(verdict.problems))
    with search_path():
        return compose(options.CONFIG_NAME, [verdict.instead.get(text, text) for text in texts])


def keys(overrides: Sequence[str]) -> set[str]:
    """Return the keys that the overrides set."""
    return {text.partition("=")[0].lstrip("+~") for text in overrides}


def modality(cfg: DictConfig) -> str | None:
    """Return the modality of the task: ``image``, ``text``, ``text-stream`` or
    ``vision-language``."""
    return options.modality(cfg, "task.module")
