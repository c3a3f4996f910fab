"""Which step of which run a result is reported for: DomainBed's three selection rules, GLUE's two,
that of language modelling, and LLaVA's.

`measured_by` says once, when a run is written, which sets and which measure its rule selects by
and which are reported; `judged` and `selected` read only that and the scores of a record (a line
of `results.jsonl`). The functions at the end work on records of DomainBed's own format, also on
those that DomainBed wrote.

DomainBed: Gulrajani & Lopez-Paz 2021, "In Search of Lost Domain Generalization", section 3, and
domainbed/model_selection.py. The reported number is always the accuracy on the test environment's
in split, its larger part.

GLUE: the test sets have no public labels, so the score on dev is reported. Published tables choose
the epoch, and the learning rate, by that same score (`best_dev`), which is optimistic for every
method; `heldout` chooses by examples set aside from the training set. Language models are chosen by
the loss on validation documents, of which less is better (`goodness`). LLaVA takes the last step.

One deviation from DomainBed: a NaN validation accuracy never beats a number. DomainBed does the
same between draws, but within a run its plain `max` keeps a NaN that comes first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

Record = Mapping[str, Any]

# The rules' names in tables and summaries.
RULES = {
    "training_domain_validation": "training-domain validation",
    "oracle": "oracle (test-domain validation)",
    "leave_one_domain_out": "leave-one-domain-out validation",
    "best_dev": "best score on dev, which is also reported",
    "heldout": "held-out part of the training set",
    "validation": "loss on the validation set",
    "last_step": "the last step",
}

# Rules that take the last step: the oracle looks at the test environment once per run.
LAST = ("oracle", "last_step")

# Rules that select by whole sets: those that are reported, or others.
OF_SETS = ("best_dev", "heldout", "validation")

# Measures of which less is better.
LESS_IS_BETTER = ("loss", "bits_per_byte", "perplexity")


def goodness(measure: str, value: float) -> float:
    """A number that is the larger the better the value is; NaN is lowest."""
    if math.isnan(value):
        return -math.inf
    return -value if measure in LESS_IS_BETTER else value


def rule_of(config: Mapping[str, Any]) -> str:
    """The rule of a flat configuration; the task of texts copies the protocol's."""
    return config.get("task.selection") or config.get("protocol.selection", "")


def measured_by(rule: str, env_names: Sequence[str], test_envs: Sequence[int]) -> dict[str, Any]:
    """The entries `selects` and `reported` of `run.json`: `{"sets": [...], "measure": ...}` each.

    The mean over the sets counts. Rules of DomainBed select and report accuracies on the splits
    `<environment>/in` and `<environment>/out`, `validation` the loss, the others the score of whole
    sets. `last_step` selects by no score; its first reported set says how well the run does.
    """
    tests = [env_names[index] for index in test_envs]
    measure = "score"
    selects, reported = tests[:1], tests
    if rule == "validation":
        measure, selects = "loss", ["validation"]
    elif rule in OF_SETS:  # of several tasks, each has sets of its own
        heldout = ["heldout" if name == "dev" else f"{name}/heldout" for name in tests]
        selects = tests if rule == "best_dev" else heldout
    elif rule in DOMAINBED:
        measure = "accuracy"
        judges = [name for name in env_names if (name in tests) == (rule == "oracle")]
        selects, reported = [f"{name}/out" for name in judges], [f"{name}/in" for name in tests]
    return {
        "selects": {"sets": selects, "measure": measure},
        "reported": {"sets": reported, "measure": measure},
    }


def by_loss(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a run that is selected and reported by the mean loss over the same sets."""
    roles = {role: {**facts[role], "measure": "loss"} for role in ("selects", "reported")}
    return {**facts, "measure": "loss", **roles}


@dataclass(frozen=True)
class Choice:
    """The record a rule chose, what it was chosen by, and what is reported for it."""

    record: Record
    validation: float
    test: float


def judged(record: Record, facts: Mapping[str, Any]) -> Choice:
    """The number that a run's rule judges one of its records by, and the one it reports.

    `facts` are those of `run.json`. Both are means over sets. Where leave_one_domain_out cannot
    decide within one run, validation is as for training_domain_validation. NaN: not recorded, or
    no set to judge by.
    """
    validation, test = (
        mean(measured(record, name, facts[role]["measure"]) for name in facts[role]["sets"])
        for role in ("selects", "reported")
    )
    return Choice(record, validation, test)


def measured(record: Record, name: str, measure: str) -> float:
    """A measure of one set; NaN where it was not recorded."""
    return float(record["scores"].get(name, {}).get(measure, math.nan))


def selected(records: Sequence[Record], facts: Mapping[str, Any]) -> Record | None:
    """The record of one run that its rule selects: the last, or the first of the best.

    None where one run does not decide: it holds out several environments or none, it has no
    records, or the rule is leave_one_domain_out, which needs a sweep.
    """
    rule = facts["selection"]
    several = len(facts["test_envs"]) != 1 and rule not in OF_SETS
    if not records or several or rule == "leave_one_domain_out":
        return None
    if rule in LAST:
        return max(records, key=lambda record: record["step"])
    judging = (judged(record, facts) for record in records)
    best = _best(judging, facts["selects"]["measure"])
    return None if best is None else best.record


# The records of DomainBed's format: `env{i}_in_acc`, `env{i}_out_acc`, `args`.

Rule = Callable[[Sequence[Record], int], Choice | None]


def training_domain_validation(records: Sequence[Record], test_env: int) -> Choice | None:
    """The step with the best mean out-split accuracy over the training environments.

    The mean is over environments, not over their images; of equal steps the first wins. None
    without a run that holds out `test_env` alone.
    """
    return _best(
        Choice(
            record,
            validation=mean(
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
    v; validation is the mean over v of the accuracy on v's in split. The run that holds out
    `test_env` alone is reported. None when no step has all of these runs.
    """
    return _best(
        Choice(
            record,
            validation=mean(pair[f"env{env}_in_acc"] for env, pair in pairs.items()),
            test=record[f"env{test_env}_in_acc"],
        )
        for record in _holding_out({test_env}, records)
        if (pairs := _pairs(record, records, test_env)) is not None
    )


DOMAINBED: dict[str, Rule] = {
    "training_domain_validation": training_domain_validation,
    "oracle": oracle,
    "leave_one_domain_out": leave_one_domain_out,
}


def best_of_sweep(records: Iterable[Record], rule: str, test_env: int) -> Choice | None:
    """The best draw of hyper-parameters, and the step in it, by DomainBed's validation accuracy.

    `records` are those of one algorithm, data set and trial. The later one of equal draws in
    `records` wins, as in DomainBed, which sorts them and takes the last.
    """
    draws: dict[int, list[Record]] = {}
    for record in records:
        draws.setdefault(record["args"]["hparams_seed"], []).append(record)
    choices = [DOMAINBED[rule](draw, test_env) for draw in draws.values()]
    return _best(choice for choice in reversed(choices) if choice is not None)


def _best(choices: Iterable[Choice], measure: str = "accuracy") -> Choice | None:
    """The first of the best."""
    return max(choices, key=lambda choice: goodness(measure, choice.validation), default=None)


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


def mean(accuracies: Iterable[float]) -> float:
    """NaN of nothing."""
    # As numpy sums, as in DomainBed: since Python 3.12 the built-in sum rounds otherwise, which can
    # decide a tie. It adds fewer than 8 numbers one after another.
    values = list(accuracies)
    if len(values) >= 8:
        import numpy as np  # here: the command line lists the rules, and sums nothing

        return float(np.mean(values))
    total = 0.0
    for value in values:
        total += value
    return total / len(values) if values else math.nan
