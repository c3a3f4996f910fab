"""Which experts to remove and where to add one: a pure function of one window's counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Plan(NamedTuple):
    """Slots to empty, and the slot that gets a new expert."""

    remove: tuple[int, ...]
    add: int | None


def plan(load: Mapping[int, int], unserved: int, num_slots: int, min_experts: int = 1) -> Plan:
    """One update of DynMoE's Algorithm 1 (arXiv 2405.14297) for one layer.

    ``load`` maps every living slot to the tokens that chose it in the window; ``unserved`` is the
    number of tokens that chose none. Experts without a token go, except that ``min_experts`` stay
    (lowest slots first). One expert is added if any token was unserved and a slot is free, in the
    lowest free slot, those just emptied included. A window without any token decides nothing.
    """
    if sum(load.values()) + unserved == 0:
        return Plan((), None)
    idle = [slot for slot in sorted(load) if load[slot] == 0]
    must_stay = max(0, min_experts - (len(load) - len(idle)))
    remove = tuple(idle[must_stay:])
    free = [slot for slot in range(num_slots) if slot not in load or slot in remove]
    add = free[0] if unserved > 0 and free else None
    return Plan(remove, add)
