"""Proves that batches are pure functions of seed and step, however ranks and restarts cut them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmoe.data.base import StepBatches, StepPlan
from dynmoe.data.images.batches import (
    EnvironmentDraw,
    ImageEvalBatches,
    ImageExamples,
    ImageKey,
    class_balanced_weights,
)
from dynmoe.data.images.environments import image_folders
from dynmoe.seeding import split

DRAW = EnvironmentDraw(
    pools={1: np.arange(0, 50), 3: np.arange(100, 130)}, weights=None, batch_size=8, seed=5
)
PLAN = StepPlan(seed=5, steps=12, eval_every=5, eval_after_first=True)
BATCHES = StepBatches(PLAN, DRAW, next_step=lambda: 1)


def at(step: int) -> Callable[[], int]:
    return lambda: step


def test_a_pass_ends_with_an_evaluation_step() -> None:
    lengths = {step: len(list(replace(BATCHES, next_step=at(step)))) for step in range(12)}
    assert lengths == {0: 1, 1: 5, 2: 4, 3: 3, 4: 2, 5: 1, 6: 5, 7: 4, 8: 3, 9: 2, 10: 1, 11: 1}
    assert not hasattr(BATCHES, "__len__")


def test_a_restart_at_any_step_continues_with_the_same_batches() -> None:
    uninterrupted = list(BATCHES)  # steps 1..5
    for step in range(2, 6):
        assert list(replace(BATCHES, next_step=at(step))) == uninterrupted[step - 1 :]


def test_a_batch_holds_every_training_environment_in_order() -> None:
    first = next(iter(BATCHES))
    assert [key.env for key in first] == [1] * 8 + [3] * 8
    assert all(key.item < 50 for key in first[:8])
    assert all(100 <= key.item < 130 for key in first[8:])
    assert len({key.draw_seed for key in first}) == 16


@settings(max_examples=30)
@given(world_size=st.sampled_from([1, 2, 4]), accumulate=st.sampled_from([1, 2]))
def test_ranks_and_micro_batches_share_one_batch(world_size: int, accumulate: int) -> None:
    batches = replace(BATCHES, world_size=world_size, plan=replace(PLAN, accumulate=accumulate))
    parts = [list(replace(batches, rank=rank)) for rank in range(world_size)]
    for step, whole in enumerate(BATCHES):
        micro = slice(step * accumulate, (step + 1) * accumulate)
        union = [key for rank in parts for batch in rank[micro] for key in batch]
        assert sorted(union) == sorted(whole)
        sizes = {len(batch) for rank in parts for batch in rank[micro]}
        assert sizes == {16 // (world_size * accumulate)}


def test_draws_are_uniform_with_replacement_over_the_pool() -> None:
    draw = replace(DRAW, batch_size=30_000)
    items = np.array([key.item for key in draw.of_environment(0, 3)])
    counts = np.bincount(items - 100, minlength=30)
    assert counts.sum() == 30_000 and abs(counts - 1000).max() < 150


def test_weighted_draws_follow_their_weights() -> None:
    weights = {1: np.full(50, 1 / 50), 3: class_balanced_weights(np.array([0] * 3 + [1] * 27))}
    draw = replace(DRAW, batch_size=30_000, weights=weights)
    items = np.array([key.item for key in draw.of_environment(0, 3)])
    assert (items < 103).mean() == pytest.approx(0.5, abs=0.01)


def test_class_weights_as_in_domainbed() -> None:
    weights = class_balanced_weights(np.array([0, 1, 0, 2, 3, 0]))
    assert weights.sum() == pytest.approx(1)
    assert weights[0] == pytest.approx(weights[1] / 3)


def test_evaluation_covers_each_example_once_and_never_mixes() -> None:
    splits = [split(n, 0, env, 0.2) for env, n in enumerate([20, 33])]
    batches = ImageEvalBatches(
        splits=splits, augmented=frozenset({1}), batch_size=8, seed=0, next_step=at(6)
    )
    seen = list(batches)
    assert len(seen) == len(batches) == 2 + 1 + 4 + 1
    assert [next(iter({(k.env, k.split) for k in batch})) for batch in seen] == [
        *[(0, 0)] * 2,
        (0, 1),
        *[(1, 0)] * 4,
        (1, 1),
    ]
    assert all(len({(k.env, k.split) for k in batch}) == 1 for batch in seen)
    for env, parts in enumerate(splits):
        for part, indices in enumerate(parts):
            keys = [k for batch in seen for k in batch if (k.env, k.split) == (env, part)]
            assert [k.item for k in keys] == indices.tolist()
    assert {k.env for batch in seen for k in batch if k.draw_seed is not None} == {1}
    ranks = [list(replace(batches, rank=rank, world_size=2)) for rank in range(2)]
    assert ranks == [seen[0::2], seen[1::2]]
    assert [len(replace(batches, rank=rank, world_size=2)) for rank in range(2)] == [4, 4]


def test_an_augmentation_depends_on_its_key_alone(tree: Path) -> None:
    examples = ImageExamples(image_folders(str(tree)), image_size=16)
    load = partial(ImageKey, 0, 0, 3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = examples[load(11)].image
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(examples[load(11)].image, first)
    assert not torch.equal(examples[load(12)].image, first)
    assert torch.equal(examples[load(None)].image, examples[load(None)].image)
