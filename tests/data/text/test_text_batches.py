"""Batches of texts: every example once an epoch, resumable, little padding."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest

from dynmoe.data.base import StepBatches, StepPlan
from dynmoe.data.text.batches import EpochDraw, EvalBatches, Key, steps_per_epoch

LENGTHS = np.random.default_rng(0).integers(3, 100, size=330)


def train_batches(
    steps: int = 42,
    eval_every: int = 21,
    accumulate: int = 1,
    next_step: Callable[[], int] = lambda: 0,
    rank: int = 0,
    world_size: int = 1,
    **changes: Any,
) -> StepBatches[Key]:
    draw = EpochDraw(**{"lengths": LENGTHS, "batch_size": 16, "seed": 0, **changes})
    plan = StepPlan(seed=0, steps=steps, eval_every=eval_every, accumulate=accumulate)
    return StepBatches(plan, draw, next_step, rank, world_size)


def rows(batches: StepBatches[Key]) -> list[list[int]]:
    return [[key.row for key in batch] for batch in batches]


def test_an_epoch_has_every_example_once_the_last_batch_smaller() -> None:
    seen = rows(train_batches())
    assert len(seen) == 21
    assert sorted(row for batch in seen for row in batch) == list(range(330))
    assert sorted(map(len, seen)) == [10, *[16] * 20]


def test_epochs_and_seeds_differ_and_repeat() -> None:
    first, second = rows(train_batches()), rows(train_batches(next_step=lambda: 21))
    assert first != second
    assert rows(train_batches(seed=1)) != first
    assert rows(train_batches()) == first


def test_goes_on_in_the_middle_of_an_epoch() -> None:
    """Evaluations every 8 steps: the stretches put together are the epoch."""
    at = [0, 8, 16]
    stretches = [rows(train_batches(eval_every=8, steps=21, next_step=lambda s=s: s)) for s in at]
    assert [len(stretch) for stretch in stretches] == [8, 8, 5]
    assert [*chain(*stretches)] == rows(train_batches(eval_every=21, steps=21))


def test_a_resumed_run_draws_no_epoch_before_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    epoch = EpochDraw.epoch
    monkeypatch.setattr(EpochDraw, "epoch", lambda self, n: (made.append(n), epoch(self, n))[1])
    straight = rows(train_batches(steps=63, eval_every=63))
    assert made == [0, 1, 2]
    made.clear()
    assert rows(train_batches(steps=63, eval_every=63, next_step=lambda: 45)) == straight[45:]
    assert made == [2]


@pytest.mark.parametrize(("accumulate", "world_size"), [(4, 1), (1, 2), (2, 2)])
def test_parts_make_the_same_batch(accumulate: int, world_size: int) -> None:
    whole = rows(train_batches())
    parts = [
        rows(train_batches(accumulate=accumulate, world_size=world_size, rank=rank))
        for rank in range(world_size)
    ]
    assert len(parts[0]) == 21 * accumulate
    for step, batch in enumerate(whole):
        micro = (rank[step * accumulate + index] for rank in parts for index in range(accumulate))
        own = [*chain(*micro)]
        assert sorted(own) == sorted(batch)


def test_parts_of_unequal_size_are_weighted() -> None:
    """The mean over parts of (weight x mean of the part) is the mean of the batch."""
    whole = list(train_batches())
    parts = list(train_batches(accumulate=4))
    for step, batch in enumerate(whole):
        own = parts[4 * step :][:4]
        means = [part[0].weight * np.mean([key.row for key in part]) for part in own]
        assert np.mean(means) == pytest.approx(np.mean([key.row for key in batch]))


def test_no_part_is_empty() -> None:
    """Twenty batches of 16 and one of 10, which is cut into 16 parts: six examples come twice."""
    assert steps_per_epoch(330, 16) == 21
    parts = rows(train_batches(accumulate=16, steps=21))
    assert [len(part) for part in parts] == [1] * 21 * 16
    weights = [batch[0].weight for batch in train_batches(accumulate=16, steps=21)]
    assert sorted(set(weights)) == [0.0, 1.0, 1.6] and weights.count(0.0) == 6
    seen = [row for part in parts for row in part]
    assert set(seen) == set(range(330)) and len(seen) == 336


@pytest.mark.parametrize("batch_size", [5, 16])
@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 1), (4, 1), (1, 3), (2, 4), (16, 1)])
def test_the_loss_is_the_mean_over_all_counted(
    accumulate: int, world_size: int, batch_size: int
) -> None:
    """Each micro-batch has the mean loss of its tokens; weighted, these average to the batch's."""
    rng = np.random.default_rng(batch_size)
    counts = rng.integers(1, 300, size=330)
    losses = rng.normal(size=330) * counts  # sums over the tokens of each example
    cut: dict[str, Any] = {"accumulate": accumulate, "world_size": world_size}
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "steps": steps_per_epoch(330, batch_size),
        "eval_every": 99,
    }
    ranks = [
        list(train_batches(**common, **cut, rank=rank, counts=counts)) for rank in range(world_size)
    ]
    for step, batch in enumerate(rows(train_batches(**common))):
        parts = [part for rank in ranks for part in rank[step * accumulate :][:accumulate]]
        means = [
            part[0].weight * losses[own].sum() / counts[own].sum()
            for part in parts
            for own in [[key.row for key in part]]
        ]
        assert all(key.weight == part[0].weight for part in parts for key in part)
        assert np.mean(means) == pytest.approx(losses[batch].sum() / counts[batch].sum())
        assert sum(part[0].weight == 0 for part in parts) == max(0, len(parts) - len(batch))


def test_equal_counts_weigh_as_none() -> None:
    def weights(counts: object) -> list[float]:
        return [part[0].weight for part in train_batches(accumulate=4, counts=counts)]

    assert weights(np.full(330, 7)) == pytest.approx(weights(None))


GROUPS = np.random.default_rng(2).choice([0, 1, 5], size=330, p=[0.3, 0.6, 0.1])


def test_batches_are_of_one_group_but_for_what_is_left() -> None:
    batches = train_batches(groups=GROUPS)
    seen = rows(batches)
    assert len(seen) == steps_per_epoch(330, 16) == 21
    assert sorted(row for batch in seen for row in batch) == list(range(330))
    assert sorted(map(len, seen)) == [10, *[16] * 20]
    counts = np.unique(GROUPS, return_counts=True)[1]
    mixed = [batch for batch in seen if len(set(GROUPS[batch].tolist())) > 1]
    whole = sum(count // 16 for count in counts.tolist())
    assert 0 < len(mixed) <= 21 - whole < 3
    assert rows(batches) == seen
    assert rows(train_batches(groups=GROUPS, seed=1)) != seen
    assert rows(train_batches(groups=GROUPS, next_step=lambda: 21)) != seen


def test_grouped_batches_are_shuffled_and_of_similar_lengths() -> None:
    seen = rows(train_batches(groups=GROUPS))
    lengths = [LENGTHS[batch] for batch in seen]
    assert 1 - LENGTHS.sum() / sum(len(each) * each.max() for each in lengths) < 0.2
    firsts = [int(GROUPS[batch[0]]) for batch in seen]
    assert firsts != sorted(firsts)


@pytest.mark.parametrize("sizes", [(32, 16), (3, 2), (16, 1), (1, 31)])
def test_groups_of_any_size(sizes: tuple[int, int]) -> None:
    groups = np.repeat([0, 1], sizes)
    examples = len(groups)
    steps = steps_per_epoch(examples, 16)
    seen = rows(train_batches(lengths=LENGTHS[:examples], groups=groups, steps=steps))
    assert len(seen) == steps
    assert sorted(row for batch in seen for row in batch) == list(range(examples))


def test_one_group_alone_has_whole_batches_first() -> None:
    seen = rows(train_batches(groups=np.zeros(330, dtype=np.int64)))
    assert sorted(map(len, seen)) == [10, *[16] * 20]


def test_little_is_padded() -> None:
    def padding(batches: list[list[int]]) -> float:
        lengths = [LENGTHS[batch] for batch in batches]
        return 1 - LENGTHS.sum() / sum(len(each) * each.max() for each in lengths)

    shuffled = np.random.default_rng(1).permutation(np.arange(330))
    assert padding(rows(train_batches())) < 0.1
    assert padding([part.tolist() for part in np.array_split(shuffled, 21)]) > 0.4


def test_evaluation_sees_every_example_of_every_set_once() -> None:
    lengths = {"dev": np.array([3, 9, 5, 7]), "hans": np.array([2, 4])}
    batches = list(EvalBatches(lengths, batch_size=3))
    assert batches == [
        [Key("dev", 1), Key("dev", 3), Key("dev", 2)],
        [Key("dev", 0)],
        [Key("hans", 1), Key("hans", 0)],
    ]
    ranks = [list(EvalBatches(lengths, 3, rank, world_size=2)) for rank in (0, 1)]
    assert sorted(chain(*chain(*ranks))) == sorted(chain(*batches))
    assert [len(batch) for batch in ranks[1]] == [2, 1]
    assert len(EvalBatches(lengths, 3, 1, 2)) == 2
