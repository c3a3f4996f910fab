"""The selection rules choose what DomainBed's own test cases, its source, and GLUE's tables say."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dynmoe.selection import (
    SELECTION,
    Choice,
    best_dev,
    best_of_sweep,
    heldout,
    judged,
    judging_set,
    last_step,
    leave_one_domain_out,
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


@pytest.mark.parametrize("rule", SELECTION.values())
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


def test_one_run_has_a_selected_record_only_with_one_test_environment() -> None:
    assert selected(TWO_STEPS, "training_domain_validation", [0]) is TWO_STEPS[1]
    assert selected(TWO_STEPS, "oracle", [0]) is TWO_STEPS[1]
    assert selected(TWO_STEPS, "leave_one_domain_out", [0]) is None
    assert selected(TWO_STEPS, "oracle", [0, 1]) is None
    assert selected([], "oracle", [0]) is None


def scored(step: int, dev: float, held_out: float) -> Record:
    args = {"test_envs": [0], "hparams_seed": 0}
    scores = {"dev_score": dev, "mismatched_score": 1.0, "heldout_score": held_out}
    return {"step": step, "args": args, **scores}


EPOCHS = [scored(0, -0.1, math.nan), scored(1, 0.3, 0.2), scored(2, 0.3, 0.1), scored(3, 0.1, 0.4)]


def test_on_glue_the_first_best_epoch_on_the_selecting_set_is_chosen() -> None:
    assert outcome(best_dev(EPOCHS, 0)) == (1, 0.3, 0.3)
    assert outcome(heldout(EPOCHS, 0)) == (3, 0.4, 0.1)
    assert outcome(best_dev(EPOCHS[:1], 0)) == (0, -0.1, -0.1)
    assert selected(EPOCHS, "heldout", [0]) is EPOCHS[3]


def test_any_record_is_judged_as_its_rule_judges() -> None:
    def numbers(record: Record, rule: str, tests: list[int], names: list[str]) -> tuple[float, ...]:
        facts = {"selection": rule, "test_envs": tests, "env_names": names}
        choice = judged(record, facts)
        return choice.validation, choice.test

    sets = ["dev", "mismatched"]
    assert numbers(EPOCHS[1], "best_dev", [0], sets) == (0.3, 0.3)
    assert numbers(EPOCHS[1], "heldout", [0], sets) == (0.2, 0.3)
    record, names = TWO_STEPS[1], ["a", "b", "c"]
    assert numbers(record, "training_domain_validation", [0], names) == (0.75, 0.3)
    assert numbers(record, "oracle", [0], names) == (0.4, 0.3)
    assert numbers(record, "training_domain_validation", [0, 1], names) == (0.8, 0.15)
    assert all(map(math.isnan, numbers(record, "oracle", [], names)))


def answered(step: int, quiz: float, hparams_seed: int = 0) -> Record:
    args = {"test_envs": [0], "hparams_seed": hparams_seed}
    return {"step": step, "args": args, "quiz_score": quiz, "other_score": 0.5}


def test_the_last_step_is_taken_whatever_its_scores() -> None:
    """It knows no set by its name; what is reported is for `judged` to say."""
    records = [answered(1, 0.9), answered(3, 0.1), answered(2, math.nan)]
    choice = last_step(records, 0)
    assert choice is not None and choice.record is records[1] and math.isnan(choice.test)
    assert selected(records, "last_step", [0]) is records[1]
    assert selected(records[:1], "last_step", [0]) is records[0]
    assert selected([], "last_step", [0]) is None


def test_sets_that_select_nothing_are_judged_by_the_first() -> None:
    facts = {"selection": "last_step", "test_envs": [0], "env_names": ["quiz", "other"]}
    assert judging_set(facts) == "quiz"
    choice = judged(answered(3, 0.1), facts)
    assert (choice.validation, choice.test) == (0.1, 0.1)
    both = judged(answered(3, 0.1), {**facts, "test_envs": [0, 1]})
    assert (both.validation, both.test) == (0.1, 0.3)
    texts = {"test_envs": [0], "env_names": ["dev", "mismatched"]}
    assert judging_set({**texts, "selection": "best_dev"}) == "dev"
    assert judging_set({**texts, "selection": "heldout"}) == "heldout"
