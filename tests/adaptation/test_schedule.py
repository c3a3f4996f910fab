"""Windows of recording, in steps and in fractions of an epoch."""

from __future__ import annotations

import pytest

from dynmoe.adaptation import Schedule


def windows(schedule: Schedule, steps: int) -> tuple[list[int], list[int]]:
    return (
        [s for s in range(steps) if schedule.records(s)],
        [s for s in range(steps) if schedule.updates_after(s)],
    )


@pytest.mark.parametrize(
    ("schedule", "recorded", "updated"),
    [
        (Schedule(2, 3, 6), [2, 3, 4, 8, 9, 10], [4, 10]),
        (Schedule(0, 1, 1), list(range(12)), list(range(12))),  # the official vision code
        (Schedule(0, 4, 4), list(range(12)), [3, 7, 11]),
        # The official language code: from 1/2 to 3/4 of every epoch; here 8 steps an epoch.
        (Schedule(0.5, 0.25, 1, "epoch").in_steps(8), [4, 5], [5]),
        # The paper's text: from 1/3 to 2/3; here 6 steps an epoch.
        (Schedule(1 / 3, 1 / 3, 1, "epoch").in_steps(6), [2, 3, 8, 9], [3, 9]),
        (Schedule(0.5, 0.01, 1, "epoch").in_steps(8), [4], [4]),  # never empty
    ],
)
def test_windows(schedule: Schedule, recorded: list[int], updated: list[int]) -> None:
    assert windows(schedule, 12) == (recorded, updated)


@pytest.mark.parametrize("bad", [(-1, 1, 1), (0, 0, 1), (0, 5, 4)])
def test_impossible_windows_are_refused(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="0 < length <= period"):
        Schedule(*bad)


@pytest.mark.parametrize("parts", [(0, 2.5, 5), (0.5, 0.5, 1), (0, 1, 1.5), (0, 1, float("inf"))])
def test_windows_of_parts_of_a_step_are_refused(parts: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match=r"whole steps|length <= period"):
        Schedule(*parts)
    if parts[2] < float("inf"):
        assert Schedule(*parts, unit="epoch").in_steps(10).first_update == 10 * sum(parts[:2])


def test_units_have_two_names() -> None:
    with pytest.raises(ValueError, match="'step' or 'epoch', found 'epochs'"):
        Schedule(0, 1, 1, unit="epochs")  # type: ignore[arg-type]


def test_a_training_that_ends_before_the_first_update() -> None:
    assert Schedule(2, 3, 6).never_updates(5) is None
    assert "after 5 optimizer steps" in (Schedule(2, 3, 6).never_updates(4) or "")
