"""Which evaluations leave records of routing."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynmoe.records import RunFolder
from dynmoe.selection import measured_by
from dynmoe.training.callbacks import RunRecorder

SCORES = (0.6, 0.5, 0.7, 0.6, 0.6, 0.6)
LOSSES = (0.9, 0.8, 0.8, 0.8, 0.7, 0.8)


@pytest.mark.parametrize(
    ("rule", "every", "kept"),
    [
        ("best_dev", 1, [0, 1, 2, 3, 4, 5]),
        ("best_dev", 6, [0, 1, 2, 4, 5]),  # 2 has the best score, 1 and 4 the least loss so far
        ("last_step", 4, [0, 4, 5]),
    ],
)
def test_routing_of_sets(tmp_path: Path, rule: str, every: int, kept: list[int]) -> None:
    facts = {"selection": rule, "test_envs": [0], **measured_by(rule, ["dev"], [0])}
    found = []
    before = RunRecorder(RunFolder(tmp_path), facts, {}, float)
    for step, (score, loss) in enumerate(zip(SCORES, LOSSES, strict=True)):
        recorder = RunRecorder(RunFolder(tmp_path), facts, {}, float, routing_every=every)
        recorder.load_state_dict(before.state_dict())  # stopped and started in between
        recorder._compare({"step": step, "scores": {"dev": {"score": score, "loss": loss}}})
        if recorder._keeps_routing(step, is_last=step == len(SCORES) - 1):
            found.append(step)
        before = recorder
    assert found == kept
