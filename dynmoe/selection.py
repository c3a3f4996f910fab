"""Which step of which run a result is reported for: DomainBed's three selection rules, GLUE's two,
and LLaVA's.

A record is one line of `results.jsonl`. A rule looks at the records of one draw of
hyper-parameters; `best_of_sweep` compares the draws. `judged` tells the numbers of any one record.

DomainBed: Gulrajani & Lopez-Paz 2021, "In Search of Lost Domain Generalization", section 3, and
domainbed/model_selection.py. Reported is always the accuracy on the test environment's in split,
its larger part.

GLUE: the test sets have no public labels, so the score on dev is reported. Published tables choose
the epoch, and the learning rate, by that same score (`best_dev`), which flatters all of them;
`heldout` chooses by examples set aside from the training set. LLaVA takes the last step.

One deviation from DomainBed: a NaN validation accuracy never beats a number. DomainBed holds to
that between draws, but within a run its plain `max` keeps a NaN that comes first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

import numpy as np

Record = Mapping[str, Any]

# What tables and summaries call the rules.
RULES = {
    "training_domain_validation": "training-domain validation",
    "oracle": "oracle (test-domain validation)",
    "leave_one_domain_out": "leave-one-domain-out validation",
    "best_dev": "best score on dev, which is also reported",
    "heldout": "held-out part of the training set",
    "last_step": "the last step",
}

# Of the rules whose runs are scored on whole sets: which set selects; None: none does.
SELECTING_SET = {"best_dev": "dev", "heldout": "heldout", "last_step": None}


def on_sets(rule: str) -> bool:
    """Whether the rule's runs are scored on whole sets, not on the splits of environments."""
    return rule in SELECTING_SET


def judging_set(facts: Mapping[str, Any]) -> str:
    """Of a run that is scored on whole sets the one that tells how well it does in training: that
    which selects, else the first that is reported."""
    judge = SELECTING_SET[facts["selection"]]
    return facts["env_names"][0] if judge is None else judge


def rule_of(config: Mapping[str, Any]) -> str:
    """The rule of a flat configuration; of texts it is the protocol's, which the task copies."""
    return config.get("task.selection") or config.get("protocol.selection", "")


@dataclass(frozen=True)
class Choice:
    """The record a rule chose, what it was chosen by, and what is reported for it."""

    record: Record
    validation: float
    test: float


Rule = Callable[[Sequence[Record], int], Choice | None]


def training_domain_validation(records: Sequence[Record], test_env: int) -> Choice | None:
    """The step with the best mean out-split accuracy over the training environments.

    The mean is over environments, not over their images; of equal steps the first wins. None
    without a run that holds out `test_env` alone.
    """
    return _best(
        Choice(
            record,
            validation=_mean(
                record[f"env{env}_out_acc"] for env in _environments(record) if env != test_env
            ),
            test=record[f"env{test_env}_in_acc"],
        )
        for record in _holding_out({test_env}, records)
    )


def oracle(records: Sequence[Record], test_env: int) -> Choice | None:
    """The last step, judged by the test environment's out split: one query of it per run.

    There is no early stopping, so the oracle can report less than training-domain validation.
    None without a run that holds out `test_env` alone.
    """
    runs = _holding_out({test_env}, records)
    if not runs:
        return None
    last = max(runs, key=lambda record: record["step"])
    return Choice(last, last[f"env{test_env}_out_acc"], last[f"env{test_env}_in_acc"])


def leave_one_domain_out(records: Sequence[Record], test_env: int) -> Choice | None:
    """The step at which runs that also hold out one other environment do best on that one.

    For every other environment v it needs, at the same step, a run that holds out `test_env` and
    v; validation is the mean over v of the accuracy on v's in split. Reported is the run that
    holds out `test_env` alone. None when no step has all of these runs.
    """
    return _best(
        Choice(
            record,
            validation=_mean(pair[f"env{env}_in_acc"] for env, pair in pairs.items()),
            test=record[f"env{test_env}_in_acc"],
        )
        for record in _holding_out({test_env}, records)
        if (pairs := _pairs(record, records, test_env)) is not None
    )


def best_dev(records: Sequence[Record], test_env: int) -> Choice | None:
    """The evaluation with the best score on dev, the first evaluation set; of equals the first."""
    return _best_on("best_dev", records, test_env)


def heldout(records: Sequence[Record], test_env: int) -> Choice | None:
    """The evaluation with the best score on held-out training examples; dev is only reported."""
    return _best_on("heldout", records, test_env)


def last_step(records: Sequence[Record], test_env: int) -> Choice | None:
    """The last evaluation, chosen by its step alone (LLaVA, MoE-LLaVA). Its scores are named after
    the sets of the run, which a record does not tell: see `judged`."""
    return max(
        (Choice(each, each["step"], math.nan) for each in _holding_out({test_env}, records)),
        key=lambda choice: choice.validation,
        default=None,
    )


SELECTION: dict[str, Rule] = {
    "training_domain_validation": training_domain_validation,
    "oracle": oracle,
    "leave_one_domain_out": leave_one_domain_out,
    "best_dev": best_dev,
    "heldout": heldout,
    "last_step": last_step,
}


def selected(records: Sequence[Record], rule: str, test_envs: Sequence[int]) -> Record | None:
    """The record of one run that `rule` selects.

    None where one run does not answer: it holds out several environments or none, it has no
    records, or the rule is leave_one_domain_out, which needs a sweep.
    """
    if len(test_envs) != 1:
        return None
    choice = SELECTION[rule](records, test_envs[0])
    return None if choice is None else choice.record


def judged(record: Record, facts: Mapping[str, Any]) -> Choice:
    """What a run's rule judges one of its records by, and what is reported for it.

    `facts` are those of `run.json`. Of several test environments it is the mean. Where
    leave_one_domain_out cannot decide within one run, validation is as for
    training_domain_validation. NaN: not recorded, or no environment to judge by.
    """
    rule, tests = facts["selection"], facts["test_envs"]
    if on_sets(rule):
        judges = [f"{judging_set(facts)}_score"]
    else:
        environments = range(len(facts["env_names"]))
        judges = [
            f"env{env}_out_acc" for env in environments if (env in tests) == (rule == "oracle")
        ]
    reported = [reported_key(facts, env) for env in tests]
    validation, test = (
        _mean(record.get(key, math.nan) for key in keys) for keys in (judges, reported)
    )
    return Choice(record, validation, test)


def reported_key(facts: Mapping[str, Any], index: int) -> str:
    """The key of a record under which an environment's, or evaluation set's, result stands."""
    if on_sets(facts["selection"]):
        return f"{facts['env_names'][index]}_score"
    return f"env{index}_in_acc"


def best_of_sweep(records: Iterable[Record], rule: str, test_env: int) -> Choice | None:
    """The best draw of hyper-parameters, and the step in it, by validation accuracy.

    `records` are those of one algorithm, data set and trial. Of equal draws the later one in
    `records` wins, as in DomainBed, which sorts them and takes the last.
    """
    draws: dict[int, list[Record]] = {}
    for record in records:
        draws.setdefault(record["args"]["hparams_seed"], []).append(record)
    choices = [SELECTION[rule](draw, test_env) for draw in draws.values()]
    return _best(choice for choice in reversed(choices) if choice is not None)


def _best_on(rule: str, records: Sequence[Record], test_env: int) -> Choice | None:
    key = f"{SELECTING_SET[rule]}_score"
    return _best(
        Choice(record, record[key], record["dev_score"])
        for record in _holding_out({test_env}, records)
    )


def _best(choices: Iterable[Choice]) -> Choice | None:
    """The first of the best; NaN is lowest."""
    return max(
        choices,
        key=lambda choice: -math.inf if math.isnan(choice.validation) else choice.validation,
        default=None,
    )


def _holding_out(test_envs: set[int], records: Iterable[Record]) -> list[Record]:
    return [record for record in records if set(record["args"]["test_envs"]) == test_envs]


def _pairs(record: Record, records: Iterable[Record], test_env: int) -> dict[int, Record] | None:
    """For every other environment, the record at the same step of the run without both."""
    same_step = [other for other in records if other["step"] == record["step"]]
    pairs = {
        env: _holding_out({test_env, env}, same_step)
        for env in _environments(record)
        if env != test_env
    }
    if not all(pairs.values()):
        return None
    return {env: found[-1] for env, found in pairs.items()}


def _environments(record: Record) -> list[int]:
    return list(takewhile(lambda env: f"env{env}_out_acc" in record, count()))


def _mean(accuracies: Iterable[float]) -> float:
    # numpy's sum, as in DomainBed: since Python 3.12 the built-in one rounds otherwise, which
    # can decide a tie.
    values = list(accuracies)
    return float(np.mean(values)) if values else math.nan
