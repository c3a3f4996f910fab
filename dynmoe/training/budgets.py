"""A trained run at other budgets, without training: scores over mean experts per token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from dynmoe.config.budgets import rule_of, targets_of, values_of
from dynmoe.errors import ConfigError
from dynmoe.layers import Router, TopKRouter
from dynmoe.layers.moe import moe_layers
from dynmoe.layers.posthoc import Cuts, Rule, changed_routing, rules_of
from dynmoe.records import Record, RunFolder
from dynmoe.report.budgets import OWN, budget_table, draw_budgets, subject_of
from dynmoe.report.drawing import save
from dynmoe.report.evaluations import newest, title_of
from dynmoe.report.tables import to_rich
from dynmoe.training.evaluate import judged, loaded, reported_by
from dynmoe.training.instantiation import make

TOLERANCE = 0.01
"""Distance from the target, as a share of it, within which no further cut is tried."""
PASSES = 5
"""Evaluations for one target, at most."""

Evaluate = Callable[..., Record]


def budget(folder: RunFolder, checkpoint: Path, cfg: DictConfig) -> list[Record]:
    """Evaluate the run as it is and by every rule at every target or value.

    Adds to ``budget.jsonl``, draws it (``figures/budget.png``) and prints its table.

    Returns:
        The new lines of ``budget.jsonl``, the run's own routing first.

    Raises:
        ConfigError: the run's router does not offer the rule, or any.
    """
    rules = [rule for rule in _offered(cfg) if rule_of(cfg) in (None, rule)]
    reported = reported_by(folder)
    data, task, step, trainer = loaded(folder, checkpoint, cfg)
    # Cuts are found where the score is: another environment has another mean k.
    place = _Place(reported["places"] or task.env_names)
    trainer.callbacks.append(place)

    def evaluated(applied: Cuts | None = None, watched: Sequence[Cuts] = ()) -> Record:
        data.repeat_evaluation_of(step)
        with changed_routing(task.backbone, applied, watched, lambda: place.counts):
            trainer.validate(task, datamodule=data, verbose=False)
        return {
            "step": step,
            "checkpoint": checkpoint.name,
            "data_hash": data.data_hash,
            "rule": OWN if applied is None else applied.rule,
            "target_k": None,
            "cuts": None if applied is None else applied.at,
            **judged(task, reported),
        }

    names = list(moe_layers(task.backbone))
    starts = [Cuts(rule, dict.fromkeys(names, 0.0)) for rule in rules]
    records: list[Record] = []

    def lines() -> Iterator[Record]:
        yield evaluated(watched=starts)
        for start in starts:
            if values := values_of(cfg):
                yield from (evaluated(_at(start.rule, names, value)) for value in values)
            else:
                yield from _at_targets(evaluated, start, targets_of(cfg))

    folder.mend("budget")
    for record in lines():
        records.append(record)
        folder.append("budget", record)
    known = newest(folder.read("budget"), subject_of)
    title = title_of(folder.path.name, known)
    Console().print(to_rich(budget_table(known, title)))
    print(save(draw_budgets(known, title), folder.path / "figures" / "budget.png"))
    return records


class _Place(L.Callback):
    """Whether the batch under way is from one of the reported ``places``."""

    def __init__(self, places: Sequence[str]) -> None:
        self.places = places
        self.counts = False

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, *_: Any
    ) -> None:
        self.counts = pl_module.source_of(batch) in self.places


def _offered(cfg: DictConfig) -> tuple[Rule, ...]:
    """The rules of the run's router, known before data and weights are read."""
    node: Any = OmegaConf.to_container(cfg.moe.router)
    if isinstance(node.get("target_k"), list):  # one for each layer
        node["target_k"] = node["target_k"][0]
    make_router: Any = make(node, "moe.router")
    if node["_target_"].endswith(".own_router"):  # makes one of the model's own
        make_router = partial(TopKRouter, top_k=1)
    router = make_router(8, cfg.moe.max_experts)
    rules = rules_of(router) if isinstance(router, Router) else ()
    kind = type(router).__name__
    if not rules:
        raise ConfigError(
            f"mode=budget: {kind} cannot weigh other experts than it chose (Router.weigh), so its "
            "run has no budget after training. docs/routers.md lists the routers that can"
        )
    wanted = rule_of(cfg)
    if wanted is not None and wanted not in rules:
        raise ConfigError(
            f"budget.rule: {wanted} does not fit {kind}, expected one of {', '.join(rules)}"
        )
    return rules


def _at(rule: Rule, names: Sequence[str], value: float) -> Cuts:
    # The keys of the k best are 0, -1, ...: ranks, counted down.
    return Cuts(rule, dict.fromkeys(names, -value if rule == "top_k" else value))


def _at_targets(evaluated: Evaluate, cuts: Cuts, targets: Sequence[float]) -> Iterator[Record]:
    """An evaluation for each target within reach, from one to the next; says which are not."""
    least, most = cuts.reach
    for target in targets:
        if not least * (1 - TOLERANCE) <= target <= most * (1 + TOLERANCE):
            print(f"{cuts.rule}: mean k {target:g} is out of reach, {least:.2f} to {most:.2f}")
        elif cuts.rule != "top_k":
            record, cuts = reached(evaluated, cuts, target)
            yield record
        elif target.is_integer():
            yield {**evaluated(_at(cuts.rule, list(cuts.at), target)), "target_k": target}


def reached(evaluated: Evaluate, cuts: Cuts, target: float) -> tuple[Record, Cuts]:
    """Return the evaluation nearest to the target of ``PASSES`` or fewer, and its cuts.

    Each moves the cuts by the keys that were counted under the last ones: a cut changes what later
    layers see.
    """
    tried: list[tuple[float, Record, Cuts]] = []
    while len(tried) < PASSES:
        cuts = cuts.moved_to(target)
        record = {**evaluated(cuts), "target_k": target}
        tried.append((abs(record["mean_k"] - target), record, cuts))
        if tried[-1][0] <= TOLERANCE * target:
            break
    _, record, cuts = min(tried, key=lambda each: each[0])
    return record, cuts
