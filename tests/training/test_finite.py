"""A run that diverges: it stops with its step, or goes on and says so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import Run, tiny_config
from torch import nn

from dynmoe import job
from dynmoe.errors import Diverged, UserError
from dynmoe.records import RunFolder
from dynmoe.report import summary
from dynmoe.report.run import read_run
from dynmoe.tasks.images import DomainGeneralization
from dynmoe.training.finite import FiniteLoss

DIVERGES = ("task.optimizer.lr=1e30", "task.steps=5", "task.eval_every=4")


def strict(file: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{file}: {constant}")

    text = file.read_text()
    lines = [text] if file.suffix == ".json" else text.splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_a_run_that_diverges_stops_before_anything_is_recorded(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(Diverged, match=r"not finite in optimizer step [12]; .*task\.optimizer\.lr"):
        job.train(tiny_config(*DIVERGES), folder)
    assert folder.state == "failed" and "not finite in optimizer step" in folder.failure
    assert folder.read_run()["nonfinite_step"] in (1, 2)
    assert [record["step"] for record in folder.read("results")] == [0]  # of the finite loss
    weights = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_going_on_leaves_json_and_marks_the_run(run: Run) -> None:
    folder = run(*DIVERGES, "task.on_nonfinite=continue")
    assert summary.to_markdown(read_run(folder))
    for name in ("results.jsonl", "routing.jsonl", "events.jsonl", "run.json"):
        if (folder.path / name).exists():
            strict(folder.path / name)
    first, last = folder.read("results")
    assert math.isfinite(first["loss"]) and "nonfinite_step" not in first
    step = folder.read_run()["nonfinite_step"]
    assert last["nonfinite_step"] == step in (1, 2)
    # One loss of the window was finite: the window has no mean all the same.
    assert strict(folder.path / "results.jsonl")[-1]["loss"] is None


def test_a_run_that_ends_before_its_last_step_is_not_done(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(UserError, match=r"after 1 of 9 steps\. The same command"):
        job.train(tiny_config("trainer.max_epochs=1", moe="dense"), folder)


class Strategy:
    root_device = torch.device("cpu")

    def reduce(self, tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "min"
        return tensor


def watched(tmp_path: Path, ranks: int = 1, **settings: Any) -> tuple[FiniteLoss, Any, Any]:
    folder = RunFolder(tmp_path)
    folder.write_run({})
    task = nn.Linear(2, 2)
    task.nonfinite_step = None  # type: ignore[assignment]
    trainer = SimpleNamespace(
        global_step=0,
        world_size=ranks,
        strategy=Strategy(),
        is_global_zero=True,
        state=SimpleNamespace(fn="fit"),
    )
    return FiniteLoss(folder, **settings), trainer, task


def step(callback: FiniteLoss, trainer: Any, task: Any, loss: float) -> None:
    callback.on_train_batch_start(trainer)
    trainer.global_step += 1
    callback.on_train_batch_end(trainer, task, {"loss": torch.tensor(loss)}, None, 0)


def test_ranks_stop_together_at_the_next_tenth_step(tmp_path: Path) -> None:
    callback, trainer, task = watched(tmp_path, ranks=2)
    for loss in (1.0, math.nan, *[1.0] * 7):
        step(callback, trainer, task, loss)
    with pytest.raises(Diverged, match="optimizer step 1;"):
        step(callback, trainer, task, 1.0)


@pytest.mark.parametrize("hook", ["on_validation_start", "on_save_checkpoint"])
def test_weights_are_looked_at_before_they_are_evaluated_or_saved(
    tmp_path: Path, hook: str
) -> None:
    callback, trainer, task = watched(tmp_path)
    step(callback, trainer, task, 1.0)
    task.weight.data[0, 0] = math.inf  # of a gradient that was not finite
    arguments = (trainer, task) if hook == "on_validation_start" else (trainer, task, {})
    with pytest.raises(Diverged, match="the weights were not finite in optimizer step 0;"):
        getattr(callback, hook)(*arguments)


def test_a_resumed_run_remembers_the_step(tmp_path: Path) -> None:
    callback, trainer, task = watched(tmp_path, action="continue")
    for loss in (1.0, math.inf, 1.0):
        step(callback, trainer, task, loss)
    again, trainer, task = watched(tmp_path, action="continue")
    again.load_state_dict(callback.state_dict())
    again.on_train_start(trainer, task)
    assert task.nonfinite_step == 1 == RunFolder(tmp_path).read_run()["nonfinite_step"]


def task_alone() -> Any:
    task: Any = DomainGeneralization(
        backbone=nn.Linear(1, 1), optimizer=None, aux_weight=0, seed=0, env_names=["a"]
    )
    strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: tensor)
    task._trainer = SimpleNamespace(strategy=strategy, global_rank=0)
    return task


def test_a_resumed_run_goes_on_with_the_losses_since_the_last_evaluation() -> None:
    straight, killed, resumed = task_alone(), task_alone(), task_alone()
    first, second = torch.tensor(1 / 3), torch.tensor(2 / 7)
    checkpoint: dict[str, Any] = {}
    killed._add_to_window(first, second)
    killed.on_save_checkpoint(checkpoint)
    resumed.on_load_checkpoint(checkpoint)
    for task in (straight, resumed):
        if task is straight:
            task._add_to_window(first, second)
        task._add_to_window(second, first)
    assert resumed.losses_since_last() == straight.losses_since_last()


def test_sums_of_losses_stay_exact_in_a_model_of_few_bits() -> None:
    task = task_alone().to(torch.bfloat16)
    for _ in range(1000):
        task._add_to_window(torch.tensor(1.542), torch.tensor(0.5))
    assert task.losses_since_last() == pytest.approx({"loss": 1.542, "aux_loss": 0.5})
    assert all(map(math.isnan, task.losses_since_last().values()))  # without a step
