"""Lines of progress: what they say, where they go, and that they are read from one place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dynmoe import process
from dynmoe.data.base import StepPlan
from dynmoe.records import RunFolder
from dynmoe.training import progress
from dynmoe.training.build import announcement
from dynmoe.training.progress import RunLines, duration, evaluated

FACTS: dict[str, Any] = {
    "selects": {"sets": ["1/out", "2/out"], "measure": "accuracy"},
    "reported": {"sets": ["0/in"], "measure": "accuracy"},
}
RESULT = {
    "step": 9,
    "loss": 0.5,
    "scores": {"1/out": {"accuracy": 0.4}, "2/out": {"accuracy": 0.6}, "0/in": {"accuracy": 0.25}},
}
EVALUATED = (
    "evaluated, training loss 0.5000, accuracy 50.0 on 2 sets (selects), "
    "accuracy 25.0 on 0/in (reported)"
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def lines_of(folder: RunFolder, **options: bool) -> tuple[RunLines, Any]:
    recorder: Any = SimpleNamespace(folder=folder, facts=FACTS, result=None)
    plan = StepPlan(seed=0, steps=30, eval_every=10)
    trainer = SimpleNamespace(
        global_step=0, max_steps=30, is_global_zero=True, datamodule=SimpleNamespace(plan=plan)
    )
    return RunLines(recorder, seconds=30, **options), trainer


def test_a_record_in_one_line() -> None:
    assert evaluated(RESULT, FACTS) == EVALUATED
    same = {**FACTS, "reported": FACTS["selects"]}
    assert "reported" not in evaluated(RESULT, same)


@pytest.mark.parametrize(
    ("options", "printed"),
    [({}, [0, 1, 2]), ({"has_bar": True}, [2]), ({"quiet": True}, [])],
)
def test_lines_of_a_run(
    options: dict[str, bool],
    printed: list[int],
    clock: list[float],
    tmp_path: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "_role", "command")
    folder = RunFolder(tmp_path)
    lines, trainer = lines_of(folder, **options)
    lines.on_train_start(trainer, None)
    step = {"loss": torch.tensor(1.5)}
    clock[0], trainer.global_step = 129.0, 9
    lines.on_train_batch_end(trainer, None, step)  # too soon
    clock[0], trainer.global_step = 140.0, 10
    lines.on_train_batch_end(trainer, None, step)
    lines.on_validation_start()
    clock[0] = 180.0
    lines.on_validation_batch_end(trainer, None, None, None, 3)
    lines.on_validation_end()
    lines.on_train_epoch_end(trainer, None)  # no record yet
    lines.recorder.result = RESULT
    lines.on_train_epoch_end(trainer, None)
    expected = [
        "step 10 of 30: 0.25 steps/s, 80 s left, loss 1.5000",
        "step 10 of 30: evaluating, batch 4",
        f"step 10 of 30: 0.25 steps/s, 3 min left, {EVALUATED}",  # 20 steps, 2 evaluations
    ]
    log = (folder.path / "run.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in log] == expected
    assert capsys.readouterr().out.splitlines() == [expected[i] for i in printed]


def test_time_left_after_an_early_evaluation(clock: list[float], tmp_path: Any) -> None:
    # Image runs are evaluated after their first step: 40 s here, and a step takes 1 s.
    lines, trainer = lines_of(RunFolder(tmp_path))
    trainer.datamodule.plan = StepPlan(seed=0, steps=30, eval_every=29, eval_after_first=True)
    lines.on_train_start(trainer, None)
    clock[0], trainer.global_step = 101.0, 1
    lines.on_validation_start()
    clock[0] = 141.0
    lines.on_validation_end()
    lines.recorder.result = {**RESULT, "step": 0}
    lines.on_train_epoch_end(trainer, None)
    assert "1.00 steps/s, 69 s left" in (tmp_path / "run.log").read_text()  # not 20 min


def test_beside_other_jobs_a_line_names_its_run(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_role", "worker")
    RunFolder(tmp_path / "digits_topk_seed0").say("evaluated")
    assert capsys.readouterr().out == "digits_topk_seed0: evaluated\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(119, "119 s"), (600, "10 min"), (7199, "120 min"), (9000, "2.5 h")]
)
def test_time_spans(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_a_run_is_before_it_trains() -> None:
    facts = {
        "algorithm": "TopK",
        "backbone": "vit",
        "weights": "from scratch",
        "start_experts": {"blocks.0.mlp": 4, "blocks.2.mlp": 4},
        "dataset": "PACS",
        "sizes": {"train": 1200, "dev": 300},
        "steps": 501,
        "batch_size": 32,
        "eval_every": 50,
        "device": "cpu",
        "threads": 1,
        "costs": {"slots": {}, "parameters": {"other": 22_000_000, "layers": {}}},
        "trained_parameters": 22_000_000,
        "tokens_by_block": None,
    }
    assert announcement(facts, -1) == [
        "model: TopK, vit, from scratch; MoE layers with 4, 4 experts",
        "data: PACS, train 1,200, dev 300",
        "steps: 501 with batch size 32, an evaluation every 50",
        "device: cpu, 1 thread",
    ]
    many = {**facts, "start_experts": {}, "threads": 2, "sizes": dict.fromkeys("abcdefg", 10)}
    model, data, steps, device = announcement(many, 99)
    assert model.endswith("no MoE layer") and data == "data: PACS, 70 examples in 7 sets"
    assert steps.endswith("resumed after step 99") and device == "device: cpu, 2 threads"
    frozen = {**facts, "trained_parameters": 1_300_000, "tokens_by_block": [197, 140, 72]}
    assert announcement(frozen, -1)[0].endswith(
        "4, 4 experts; 1.3 of 22.0 M parameters are trained; 72 tokens are left in the last block"
    )
