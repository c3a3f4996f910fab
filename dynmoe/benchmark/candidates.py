"""Which trained runs ``dynmoe-bench`` measures, and which of them beside each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from dynmoe.benchmark.commands import PRECISIONS
from dynmoe.config.check import report
from dynmoe.config.compose import preflight, search_path
from dynmoe.config.options import CONFIG_NAME
from dynmoe.config.targets import class_attribute
from dynmoe.errors import ConfigError, UserError
from dynmoe.report.run import Problem, Run
from dynmoe.report.runs import read_runs
from dynmoe.training import trained

# What a run's batches depend on besides its problem.
OF_BATCHES = (
    *("image_size", "patch_size", "tokenizer_path", "tokenizer_name", "max_length"),
    *("template", "question_template"),
)


class Candidate(NamedTuple):
    """The run that stands for a setting."""

    run: Run
    cfg: DictConfig
    checkpoint: Path


def candidates(folder: Path) -> list[Candidate]:
    """A run of each problem and setting, whose conditions let all be measured in turns.

    Raises:
        UserError: no run is finished, one has no checkpoint, or they cannot be measured in turns.
    """
    found = [_candidate(run) for run in representatives(folder)]
    _check_equal_conditions(found)
    return found


def groups(found: Sequence[Candidate]) -> list[tuple[Problem, list[Candidate]]]:
    """Those of one problem whose batches are of one kind. The first is the reference, the dense run
    if there is one."""
    members: defaultdict[tuple[Problem, tuple[Any, ...]], list[Candidate]] = defaultdict(list)
    for each in found:
        kind = tuple(each.cfg.data.get(key) for key in OF_BATCHES)
        members[each.run.problem, kind].append(each)
    return [(problem, group) for (problem, _), group in members.items()]


def workload(of_groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Facts of several groups in one: a value, or a list where they differ."""
    merged = {}
    for key in dict.fromkeys(key for facts in of_groups for key in facts):
        values = list(dict.fromkeys(facts.get(key) for facts in of_groups))
        merged[key] = values[0] if len(values) == 1 else values
    return merged


def representatives(folder: Path) -> list[Run]:
    """Of each problem and setting the finished run of the lowest seed and first test environment.

    Raises:
        UserError: no run is finished.
    """
    found = read_runs([folder])
    if not found.runs:
        why = [*(f"{run.name} is {run.state}" for run in found.absent), *found.warnings]
        raise ConfigError(f"--runs {folder}: expected a finished run, found none: {why[0]}")
    first: dict[tuple[Problem, str], Run] = {}
    for run in sorted(found.runs, key=lambda run: (run.repetition, run.facts["test_envs"])):
        first.setdefault((run.problem, run.setting), run)
    chosen = {run.folder.path for run in first.values()}
    return [run for run in found.runs if run.folder.path in chosen]


def _candidate(run: Run) -> Candidate:
    for name in ("selected", "last"):
        checkpoint = trained.checkpoint_of(run.folder, name)
        if checkpoint.exists():
            return Candidate(run, trained.configuration(run.folder), checkpoint)
    raise ConfigError(
        f"{run.folder.path}: expected checkpoints/selected.ckpt or last.ckpt, found neither;"
        " train it again with overwrite=true"
    )


def _check_equal_conditions(candidates: Sequence[Candidate]) -> None:
    """Precision and the process's settings hold for all that are measured in turns."""
    first = candidates[0]
    if first.cfg.trainer.precision not in PRECISIONS:
        raise ConfigError(
            f"{first.run.folder.path}: trainer.precision is {first.cfg.trainer.precision}, expected"
            f" one of {', '.join(PRECISIONS)}"
        )
    for node, key in (
        ("trainer", "precision"),
        ("runtime", "matmul_precision"),
        ("runtime", "malloc"),
        ("runtime", "fused_attention"),
    ):
        for other in candidates[1:]:
            values = [each.cfg[node][key] for each in (first, other)]
            if values[0] != values[1]:
                raise ConfigError(
                    f"{node}.{key} is {values[0]} in {first.run.folder.path} and {values[1]} in"
                    f" {other.run.folder.path}: such runs cannot be measured in turns, give their"
                    " folders one by one"
                )


# A configuration of dynmoe-run for a benchmark: the same keys, checked in the same way.

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
    "vl": [
        "backbone.pretrained=false",
        "backbone.vision.pretrained=false",
        "moe.num_experts=4",
        "moe.max_experts=${moe.num_experts}",
    ],
}


def step_defaults(given: Sequence[str]) -> list[str]:
    """Those of the task that is given, else of the first."""
    chosen = [value for key, _, value in (text.partition("=") for text in given) if key == "task"]
    task = chosen[0] if chosen else next(iter(STEP_DEFAULTS))
    return [f"task={task}", *STEP_DEFAULTS.get(task, [])]


def configuration(given: Sequence[str], defaults: Sequence[str]) -> DictConfig:
    """The configuration of the overrides ``given``, and of the ``defaults`` for other keys.

    Raises:
        ConfigError: listing every problem of it.
    """
    texts = [text for text in defaults if text.partition("=")[0] not in keys(given)]
    texts += given
    verdict = preflight(texts)
    if verdict.problems:
        raise ConfigError(report(verdict.problems))
    with search_path():
        return compose(CONFIG_NAME, [verdict.instead.get(text, text) for text in texts])


def keys(overrides: Sequence[str]) -> set[str]:
    """What the overrides set."""
    return {text.partition("=")[0].lstrip("+~") for text in overrides}


def modality(cfg: DictConfig) -> object:
    """What the task works on: ``image``, ``text``."""
    return class_attribute(cfg.task.module._target_, "modality")


def built(node: DictConfig, **arguments: Any) -> Any:
    """``instantiate``, its errors ``unwrapped``."""
    with unwrapped():
        return instantiate(node, **arguments)


@contextmanager
def unwrapped() -> Iterator[None]:
    """What the user can mend comes without Hydra's wrapping."""
    try:
        yield
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
