"""The plan of steps: which steps an evaluation follows, and what is taken of it from the data."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.data.base import StepPlan
from dynmoe.data.vl.module import VisionLanguageData


def evaluated(plan: StepPlan) -> list[int]:
    """Steps that an evaluation follows, one after the other as a run meets them."""
    found = [plan.next_evaluated(0)]
    while found[-1] < plan.steps - 1:
        found.append(plan.next_evaluated(found[-1] + 1))
    return found


def test_evaluation_steps_of_domainbed() -> None:
    def plan(steps: int, every: int) -> StepPlan:
        return StepPlan(seed=0, steps=steps, eval_every=every, eval_after_first=True)

    steps = evaluated(plan(5001, 300))
    assert len(steps) == 18 and steps[:2] == [0, 300] and steps[-2:] == [4800, 5000]
    assert len(evaluated(plan(5001, 100))) == 51
    assert len(evaluated(plan(5001, 1000))) == 6
    assert evaluated(plan(12, 5)) == [0, 5, 10, 11]


def test_evaluations_follow_every_nth_step_and_the_last() -> None:
    assert evaluated(StepPlan(seed=0, steps=20, eval_every=8)) == [7, 15, 19]
    assert evaluated(StepPlan(seed=0, steps=3, eval_every=8)) == [2]


@given(steps=st.integers(1, 200), every=st.integers(1, 50), first=st.booleans(), data=st.data())
def test_the_next_evaluation_is_the_first_one_not_passed(
    steps: int, every: int, first: bool, data: st.DataObject
) -> None:
    plan = StepPlan(seed=0, steps=steps, eval_every=every, eval_after_first=first)
    step = data.draw(st.integers(0, steps - 1))
    ahead = [s for s in evaluated(plan) if s >= step]
    assert plan.next_evaluated(step) == ahead[0]
    assert (plan.evaluations_from(step), plan.evaluations_from(steps)) == (len(ahead), 0)


@pytest.mark.parametrize(
    ("asked", "complete"),
    [
        ({"epochs": 2}, (14, 14)),
        ({"epochs": 2, "eval_every": 5}, (14, 5)),
        ({"epochs": 2, "steps": 3}, (3, 3)),
    ],
)
def test_the_data_complete_the_plan(asked: dict[str, Any], complete: tuple[int, int]) -> None:
    class SevenBatches(VisionLanguageData):
        steps_per_epoch = 7  # type: ignore[assignment]

    data: Any = SevenBatches.__new__(SevenBatches)
    data.connect(StepPlan(seed=4, accumulate=2, **asked))
    plan = data.plan
    assert (plan.steps, plan.eval_every) == complete
    assert (plan.seed, plan.accumulate, plan.eval_after_first) == (4, 2, False)
