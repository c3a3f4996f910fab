"""The loss of token gradient conflict in a run."""

from __future__ import annotations

import pytest
from tiny_runs import Run


@pytest.mark.slow
def test_conflicts_are_recorded_where_the_loss_counts(run: Run) -> None:
    late = ("moe.conflict.weight=1", "moe.conflict.start=5", "trainer.accumulate_grad_batches=2")
    records = run(*late, moe="topk").read("routing")
    train = [r for r in records if r["source"] == "train" and r["layer"] == "blocks.0.mlp"]
    assert [r["step"] for r in train] == [0, 4, 8]
    for record in train[:2]:
        assert record["conflict_share"] is None and record["conflict_cosine"] is None
    assert 0 < train[2]["conflict_share"] < 1
    assert -1 < train[2]["conflict_cosine"] < 1
    assert all("conflict_share" not in r for r in records if r["source"] != "train")
