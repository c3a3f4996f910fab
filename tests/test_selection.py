"""The selection rules choose what DomainBed's own test cases, its source, and GLUE's tables say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from dynmoe.selection import (
    DOMAINBED,
    Choice,
    best_of_sweep,
    judged,
    leave_one_domain_out,
    measured_by,
    oracle,
    selected,
    training_domain_validation,
)

Record = dict[str, Any]


def record(
    step: int,
    in_acc: list[float],
    out_acc: list[float],
    test_envs: tuple[int, ...] = (0,),
    hparams_seed: int = 0,
) -> Record:
    accuracies = {f"env{i}_in_acc": value for i, value in enumerate(in_acc)}
    accuracies |= {f"env{i}_out_acc": value for i, value in enumerate(out_acc)}
    args = {"test_envs": list(test_envs), "hparams_seed": hparams_seed}
    return {"step": step, "args": args, **accuracies}


def outcome(choice: Choice | None) -> tuple[int, float, float]:
    assert choice is not None
    return choice.record["step"], choice.validation, choice.test


# DomainBed's case: test environment 0, training environments 1 and 2.
TWO_STEPS = [
    record(0, in_acc=[0.1, 0.0, 0.0], out_acc=[0.2, 0.5, 0.6]),
    record(1, in_acc=[0.3, 0.0, 0.0], out_acc=[0.4, 0.7, 0.8]),
]


def test_training_domain_validation_takes_the_best_mean_over_training_environments() -> None:
    for records in (TWO_STEPS, TWO_STEPS[::-1]):
        assert outcome(training_domain_validation(records, 0)) == (1, 0.75, 0.3)


@pytest.mark.parametrize("last_is_better", [True, False])
def test_oracle_takes_the_last_step_whether_better_or_worse(last_is_better: bool) -> None:
    last = 0.9 if last_is_better else 0.1
    records = [record(1, [last, 0.0], [last, 0.0]), record(0, [0.5, 0.0], [0.5, 0.0])]
    assert outcome(oracle(records, 0)) == (1, last, last)


def test_leave_one_domain_out_averages_the_runs_of_all_pairs() -> None:
    records = [
        record(0, [0.1, 0.0, 0.0], [0.0] * 3, test_envs=(0,)),
        record(0, [0.0, 0.5, 0.0], [0.0] * 3, test_envs=(0, 1)),
        record(0, [0.0, 0.0, 0.6], [0.0] * 3, test_envs=(0, 2)),
    ]
    assert outcome(leave_one_domain_out(records, 0)) == (0, 0.55, 0.1)
    assert leave_one_domain_out(records[:2], 0) is None
    assert leave_one_domain_out(records[1:], 0) is None


def test_leave_one_domain_out_compares_only_steps_that_all_runs_reached() -> None:
    records = [
        record(step, [0.1 * step, pair, 0.0], [0.0] * 3, test_envs=test_envs)
        for step, pair in ((1, 0.5), (2, 0.9))
        for test_envs in ((0,), (0, 1), (2, 0))
        if (step, test_envs) != (2, (2, 0))
    ]
    assert outcome(leave_one_domain_out(records, 0)) == (1, 0.25, 0.1)


@pytest.mark.parametrize("rule", DOMAINBED.values())
def test_runs_that_do_not_hold_out_the_environment_give_nothing(rule: Any) -> None:
    assert rule([], 0) is None
    assert rule([record(0, [0.1, 0.2], [0.3, 0.4], test_envs=(1,))], 0) is None


def test_within_a_run_the_first_of_equal_steps_wins_and_nan_loses() -> None:
    nan = math.nan
    records = [
        record(0, [0.9, 0.0], [0.0, nan]),
        record(1, [0.2, 0.0], [0.0, 0.5]),
        record(2, [0.3, 0.0], [0.0, 0.5]),
    ]
    assert outcome(training_domain_validation(records, 0)) == (1, 0.5, 0.2)
    only_nan = training_domain_validation(records[:1], 0)
    assert only_nan is not None and only_nan.test == 0.9


def test_a_sweep_reports_the_test_accuracy_of_the_draw_with_the_best_validation() -> None:
    records = [
        record(0, [0.7, 0.0], [0.0, 0.8], hparams_seed=0),
        record(0, [0.9, 0.0], [0.0, 0.5], hparams_seed=1),
    ]
    best = best_of_sweep(records, "training_domain_validation", 0)
    assert outcome(best) == (0, 0.8, 0.7)
    assert best_of_sweep([], "training_domain_validation", 0) is None


def test_in_a_sweep_the_later_of_equal_draws_wins_and_nan_loses() -> None:
    records = [
        record(0, [0.1, 0.0], [0.0, 0.5], hparams_seed=4),
        record(0, [0.2, 0.0], [0.0, 0.5], hparams_seed=2),
        record(0, [0.3, 0.0], [0.0, math.nan], hparams_seed=9),
    ]
    best = best_of_sweep(records, "training_domain_validation", 0)
    assert best is not None and best.record["args"]["hparams_seed"] == 2


def one_run(
    rule: str, tests: Sequence[int] = (0,), names: Sequence[str] = ("a", "b", "c")
) -> dict[str, Any]:
    """The entries of `run.json` that say how it is judged."""
    return {"selection": rule, "test_envs": list(tests), **measured_by(rule, names, tests)}


def splits(step: int, in_acc: Sequence[float], out_acc: Sequence[float]) -> Record:
    sides = {"in": in_acc, "out": out_acc}
    scores = {
        f"{name}/{side}": {"accuracy": value, "loss": 1.0}
        for side, values in sides.items()
        for name, value in zip("abc", values, strict=True)
    }
    return {"step": step, "scores": scores}


def scored(step: int, **scores: float) -> Record:
    return {"step": step, "scores": {name: {"score": value} for name, value in scores.items()}}


SPLITS = [
    splits(0, [0.1, 0.0, 0.0], [0.2, 0.5, 0.6]),
    splits(1, [0.3, 0.0, 0.0], [0.4, 0.7, 0.8]),
]
NAN = math.nan
EPOCHS = [
    scored(0, dev=-0.1, mismatched=1.0, heldout=NAN),
    scored(1, dev=0.3, mismatched=1.0, heldout=0.2),
    scored(2, dev=0.3, mismatched=1.0, heldout=0.1),
    scored(3, dev=0.1, mismatched=1.0, heldout=0.4),
]
QUIZ = [scored(1, quiz=0.9, other=0.5), scored(3, quiz=0.1, other=0.5)]


@pytest.mark.parametrize(
    ("records", "facts", "place"),
    [
        (SPLITS, one_run("training_domain_validation"), 1),
        (SPLITS, one_run("oracle"), 1),
        (SPLITS[::-1], one_run("oracle"), 0),
        (SPLITS, one_run("leave_one_domain_out"), None),  # it needs a sweep
        (SPLITS, one_run("oracle", (0, 1)), None),
        (SPLITS, one_run("oracle", ()), None),
        ([], one_run("oracle"), None),
        (EPOCHS, one_run("best_dev", names=("dev", "mismatched")), 1),  # the first of equals
        (EPOCHS, one_run("heldout", names=("dev", "mismatched")), 3),
        (EPOCHS[:1], one_run("heldout", names=("dev",)), 0),  # NaN, and no other
        (QUIZ, one_run("last_step", names=("quiz", "other")), 1),
        (QUIZ[::-1], one_run("last_step", names=("quiz", "other")), 0),
    ],
)
def test_the_record_that_one_run_selects(
    records: list[Record], facts: dict[str, Any], place: int | None
) -> None:
    assert selected(records, facts) is (None if place is None else records[place])


@pytest.mark.parametrize(
    ("record", "facts", "validation", "test"),
    [
        (SPLITS[1], one_run("training_domain_validation"), 0.75, 0.3),
        (SPLITS[1], one_run("leave_one_domain_out"), 0.75, 0.3),
        (SPLITS[1], one_run("oracle"), 0.4, 0.3),
        (SPLITS[1], one_run("training_domain_validation", (0, 1)), 0.8, 0.15),
        (SPLITS[1], one_run("oracle", ()), NAN, NAN),
        (EPOCHS[1], one_run("best_dev", names=("dev", "mismatched")), 0.3, 0.3),
        (EPOCHS[1], one_run("heldout", names=("dev", "mismatched")), 0.2, 0.3),
        (EPOCHS[0], one_run("heldout", names=("dev", "mismatched")), NAN, -0.1),
        (QUIZ[1], one_run("last_step", names=("quiz", "other")), 0.1, 0.1),
        (QUIZ[1], one_run("last_step", (0, 1), ("quiz", "other")), 0.1, 0.3),
        ({"step": 0, "scores": {}}, one_run("best_dev", names=("dev",)), NAN, NAN),
    ],
)
def test_any_record_is_judged_as_its_rule_judges(
    record: Record, facts: dict[str, Any], validation: float, test: float
) -> None:
    choice = judged(record, facts)
    assert (choice.validation, choice.test) == pytest.approx((validation, test), nan_ok=True)


def test_sets_that_select_and_sets_that_are_reported_are_written_down() -> None:
    assert measured_by("oracle", ["a", "b"], [1]) == {
        "selects": {"sets": ["b/out"], "measure": "accuracy"},
        "reported": {"sets": ["b/in"], "measure": "accuracy"},
    }
    assert measured_by("heldout", ["dev", "mismatched"], [0]) == {
        "selects": {"sets": ["heldout"], "measure": "score"},
        "reported": {"sets": ["dev"], "measure": "score"},
    }
