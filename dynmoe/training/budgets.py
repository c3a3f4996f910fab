"""A trained run at other budgets, without training: scores over mean experts per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from dynmoe.config.budgets import rule_of, targets_of, values_of
from dynmoe.errors import ConfigError
from dynmoe.layers.moe import moe_layers
from dynmoe.layers.posthoc import Rule, Watch, changed_routing, rules_of
from dynmoe.metrics.routing import TRAIN
from dynmoe.records import Record, RunFolder
from dynmoe.report.budgets import OWN, budget_table, draw_budgets
from dynmoe.report.drawing import save
from dynmoe.report.tables import to_rich
from dynmoe.selection import mean, measured
from dynmoe.training.evaluate import loaded
from dynmoe.training.instantiation import make

TOLERANCE = 0.01
"""Distance of mean k from its target, as a share of it, within which no further cut is tried."""
PASSES = 5
"""Evaluations for one target at most: a cut changes what later layers see."""

Evaluate = Callable[..., Record]


def budget(folder: RunFolder, checkpoint: Path, cfg: DictConfig) -> list[Record]:
    """Evaluate the run as it is and by every rule at every target or value.

    Writes ``budget.jsonl`` and ``figures/budget.png`` in the run's folder, and prints the table.

    Returns:
        The lines of ``budget.jsonl``, the run's own routing first.

    Raises:
        ConfigError: the run's router does not offer the rule, or any.
    """
    offered = _offered(cfg)
    rules = [rule for rule in offered if rule_of(cfg) in (None, rule)]
    data, task, step, trainer = loaded(folder, checkpoint, cfg)

    def evaluated(applied: Watch | None = None, watched: Sequence[Watch] = ()) -> Record:
        data.repeat_evaluation_of(step)
        with changed_routing(task.backbone, applied, watched):
            trainer.validate(task, datamodule=data, verbose=False)
        record = _record(task, _reported(folder), applied)
        return {"step": step, "checkpoint": checkpoint.name, **record}

    names = list(moe_layers(task.backbone))
    watches = {rule: Watch(rule, dict.fromkeys(names, 0.0)) for rule in rules}
    records = [evaluated(watched=list(watches.values()))]
    for rule in rules:
        if values := values_of(cfg):
            records += [evaluated(_at(rule, names, value)) for value in values]
            continue
        for target in targets_of(cfg):
            most = watches[rule].most
            if most < target * (1 - TOLERANCE):
                print(f"{rule}: mean k {target:g} is out of reach, at most {most:.2f}")
            elif rule == "top_k":
                if target.is_integer():
                    records.append({**evaluated(_at(rule, names, target)), "target_k": target})
            else:
                found, watches[rule] = _reached(evaluated, watches[rule], target)
                records.append(found)
    folder.replace("budget", *records)
    title = f"{folder.path.name}, {checkpoint.name}, step {step}"
    Console().print(to_rich(budget_table(records, title)))
    print(save(draw_budgets(records, title), folder.path / "figures" / "budget.png"))
    return records


def _offered(cfg: DictConfig) -> tuple[Rule, ...]:
    """The rules of the run's router, known before data and weights are read."""
    from dynmoe.layers import Router, TopKRouter

    node = OmegaConf.to_container(cfg.moe.router)
    assert isinstance(node, dict)
    if isinstance(node.get("target_k"), list):
        node["target_k"] = node["target_k"][0]
    make_router: Any = make(node, "moe.router")
    if node["_target_"].endswith(".own_router"):  # needs the model's own, of which it makes one
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


def _at(rule: Rule, names: Sequence[str], value: float) -> Watch:
    # The keys of the k best are 0, -1, ...: ranks, counted down.
    return Watch(rule, dict.fromkeys(names, -value if rule == "top_k" else value))


def _reached(evaluated: Evaluate, watch: Watch, target: float) -> tuple[Record, Watch]:
    """The evaluation nearest to the target, and what it counted."""
    tried: list[tuple[float, Record, Watch]] = []
    while len(tried) < PASSES:
        watch = Watch(watch.rule, watch.cuts_for(target))
        record = {**evaluated(watch), "target_k": target}
        tried.append((abs(record["mean_k"] - target), record, watch))
        if tried[-1][0] <= TOLERANCE * target:
            break
    _, record, watch = min(tried, key=lambda each: each[0])
    return record, watch


def _reported(folder: RunFolder) -> Mapping[str, Any]:
    facts = folder.read_run() if (folder.path / "run.json").exists() else {}
    reported: Mapping[str, Any] = facts.get("reported", {})
    return reported


def _record(task: Any, reported: Mapping[str, Any], applied: Watch | None) -> Record:
    scores = task.scores()
    measure = reported.get("measure", "score")
    sets = reported.get("sets") or list(scores)  # a run without a test environment reports none
    load: dict[str, int] = {}
    tokens: dict[str, int] = {}
    for each in task.routing_records():
        if each["source"] != TRAIN:
            name = each["layer"]
            load[name] = load.get(name, 0) + sum(each["load"])
            tokens[name] = tokens.get(name, 0) + each["tokens"]
    known = [s for s in sets if math.isfinite(measured({"scores": scores}, s, measure))]
    return {
        "rule": OWN if applied is None else applied.rule,
        "target_k": None,
        "cuts": None if applied is None else applied.cuts,
        "mean_k": sum(load.values()) / max(1, sum(tokens.values())),
        "layers": {name: load[name] / max(1, tokens[name]) for name in load},
        "measure": measure,
        "score": mean(measured({"scores": scores}, name, measure) for name in known or sets),
        "loss": mean(measured({"scores": scores}, name, "loss") for name in known or sets),
        "scores": scores,
    }
