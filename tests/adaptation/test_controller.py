"""The adaptation decision, by table and by property."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.adaptation import Decision, decide

TABLE = {
    # name: (load by slot, unserved, slots, min_experts) -> plan
    "all used, all served": (({0: 5, 1: 3}, 0, 4, 1), Decision((), None)),
    "one activation is enough to stay": (({0: 5, 1: 1}, 0, 4, 1), Decision((), None)),
    "idle experts go, any number": (({0: 0, 1: 9, 2: 0}, 0, 4, 1), Decision((0, 2), None)),
    "one is added, whatever the number unserved": (({0: 5, 1: 3}, 999, 4, 1), Decision((), 2)),
    "the lowest empty slot is filled": (({0: 5, 3: 3}, 1, 4, 1), Decision((), 1)),
    "a full pool adds nothing": (({0: 5, 1: 3}, 7, 2, 1), Decision((), None)),
    "a full pool reuses a slot just emptied": (({0: 5, 1: 0}, 7, 2, 1), Decision((1,), 1)),
    "the lowest free slot is filled, just emptied or not": (
        ({0: 0, 1: 5}, 7, 3, 1),
        Decision((0,), 0),
    ),
    "min_experts stay, lowest slots first": (({0: 0, 1: 0, 2: 0}, 4, 4, 2), Decision((2,), 2)),
    "idle experts stay only to fill up to min_experts": (
        ({0: 0, 1: 8, 2: 0}, 0, 4, 2),
        Decision((2,), None),
    ),
    "a share of the mean load is not enough": (
        ({0: 1, 1: 12, 2: 5}, 0, 4, 1, 0.25),
        Decision((0,), None),
    ),
    "the share itself is": (({0: 2, 1: 14, 2: 8}, 0, 4, 1, 0.25), Decision((), None)),
    "of the least used those with most tokens stay": (
        ({0: 1, 1: 0, 2: 2, 3: 997}, 0, 4, 3, 0.25),
        Decision((1,), None),
    ),
    "no token at all decides nothing": (({0: 0, 1: 0}, 0, 4, 1), Decision((), None)),
}


@pytest.mark.parametrize("name", TABLE)
def test_table(name: str) -> None:
    arguments, expected = TABLE[name]
    assert decide(*arguments) == expected


@st.composite
def windows(draw: st.DrawFn) -> tuple[dict[int, int], int, int, int]:
    slots = draw(st.integers(1, 12))
    living = draw(st.sets(st.integers(0, slots - 1), min_size=1))
    load = {slot: draw(st.sampled_from([0, 0, 1, 50])) for slot in living}
    return load, draw(st.sampled_from([0, 1, 30])), slots, draw(st.integers(1, len(living)))


@given(windows())
def test_properties(window: tuple[dict[int, int], int, int, int]) -> None:
    load, unserved, slots, minimum = window
    remove, add = decide(load, unserved, slots, minimum)
    after = (set(load) - set(remove)) | ({add} if add is not None else set())
    assert minimum <= len(set(load) - set(remove)) and len(after) <= slots
    assert all(load[slot] == 0 for slot in remove)
    assert (add is None) or (unserved > 0 and 0 <= add < slots)
    assert add not in set(load) - set(remove)
    # Used experts always survive, and what could be done was done.
    assert {slot for slot in load if load[slot] > 0} <= after
    if unserved > 0 and add is None:
        assert len(load) == slots and not remove
    # Deciding again on a window in which everyone was used and served changes nothing.
    assert decide(dict.fromkeys(after, 1), 0, slots, minimum) == Decision((), None)
